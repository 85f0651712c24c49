"""The house rules as functions from a parsed module to a list of complaints."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

LONGEST_FILE, LONGEST_BODY, DEEPEST, MOST_PARAMETERS, POSITIONAL = 350, 40, 4, 6, 3
GROUND = (
    *("errors", "spec", "traces", "types", "options", "files", "plugins"),
    *("recipes", "pictures", "preflight", "hub", "runtimes"),
)
# room -> rooms of ours it may import (itself always), and outside packages it may not
ROOMS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "": (GROUND, ("torch", "transformers", "click", "rich")),  # llmcompress/__init__.py
    "errors": ((), ("torch", "transformers", "click", "rich")),
    "spec": (("errors",), ("torch", "transformers", "click", "rich")),
    "traces": (("spec",), ("torch", "transformers", "click", "rich")),
    "types": (("errors", "spec", "options", "traces"), ("torch", "transformers", "click", "rich")),
    "options": (("spec", "errors"), ("torch", "transformers", "click", "rich")),
    "pictures": (("types", "errors", "files"), ("torch", "transformers", "click", "rich")),
    "files": (("errors",), ("torch", "transformers", "click", "rich")),
    "preflight": (("errors", "files", "plugins"), ("torch", "transformers", "numpy", "click", "rich")),
    "hub": (("errors", "files"), ("torch", "transformers", "numpy", "click", "rich")),
    "plugins": (("errors",), ("torch", "transformers", "click", "rich")),
    "runtimes": (("types", "traces", "spec", "errors", "plugins"), ("torch", "transformers", "click", "rich")),
    "recipes": (GROUND, ("torch", "transformers", "click", "rich")),
    "kernels": (("types", "spec", "errors", "files", "plugins"), ("transformers", "click", "rich")),
    "experts": (("errors",), ("click", "rich")),
    "runtime": (("kernels", "experts", *GROUND), ("click", "rich")),
    "model": (("experts", *GROUND), ("click", "rich")),
    "compress": (("model", "runtime", "kernels", "experts", *GROUND), ("click", "rich")),
    "eval": (("model", "runtime", "experts", *GROUND), ("click", "rich")),
    "gate": (("eval", *GROUND), ("torch", "transformers", "scipy", "click", "rich")),
    "pages": (("eval", "gate", *GROUND), ("torch", "transformers", "click", "rich")),
    "cli": (GROUND, ("torch", "transformers")),
    "__main__": (("cli",), ("torch",)),
}
TORCHLESS = (
    "eval.facts",
    "eval.report",
    "eval.statistics",
    "compress.allocate.integer",
    "compress.allocate.budget",
    "compress.allocate.order",
    "compress.allocate.quadratic",
    "compress.allocate.ratio",
    "compress.allocate.spend",
    "compress.allocate.sweep",
)
FORBIDDEN_WORDS = ("NotImplementedError", "TODO", "FIXME")
LAZY = re.compile(r"# lazy: *\S")


def room_of(module: str) -> str:
    """`llmcompress.compress.grid` -> `compress`."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def functions(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, bool]]:
    """Every function, and whether it is a method."""
    for parent in ast.walk(tree):
        for child in ast.iter_child_nodes(parent):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield child, isinstance(parent, ast.ClassDef)


def _decorators(function: ast.FunctionDef | ast.AsyncFunctionDef) -> set[str]:
    return {name.id if isinstance(name, ast.Name) else getattr(name, "attr", "") for d in function.decorator_list
            for name in [d.func if isinstance(d, ast.Call) else d]}  # fmt: skip


def long_bodies(tree: ast.Module) -> list[str]:
    """Functions whose body, docstring aside, is too long."""
    found = []
    for function, _ in functions(tree):
        body = function.body[1:] if ast.get_docstring(function) else function.body
        if body and (lines := (body[-1].end_lineno or 0) - body[0].lineno + 1) > LONGEST_BODY:
            found.append(f"{function.lineno}: {function.name} has {lines} lines")
    return found


def deep_nesting(tree: ast.Module) -> list[str]:
    """Functions nested deeper than allowed."""
    blocks = (ast.If, ast.For, ast.AsyncFor, ast.While, ast.With, ast.AsyncWith, ast.Try, ast.TryStar, ast.Match)

    def depth(node: ast.AST) -> int:
        below = max((depth(child) for child in ast.iter_child_nodes(node)), default=0)
        return below + isinstance(node, blocks)

    return [f"{f.lineno}: {f.name} nests too deeply" for f, _ in functions(tree) if depth(f) > DEEPEST]


def many_parameters(tree: ast.Module) -> list[str]:
    """Functions with more than six parameters, or more than five required ones that may be given by position."""
    found = []
    for function, method in functions(tree):
        if _decorators(function) & {"command", "jit"} or function.name == "__exit__":
            continue
        positional = [*function.args.posonlyargs, *function.args.args]
        if method and "staticmethod" not in _decorators(function):
            positional = positional[1:]
        required = positional[: len(positional) - len(function.args.defaults)]
        total = len(positional) + len(function.args.kwonlyargs)
        if total > MOST_PARAMETERS:
            found.append(f"{function.lineno}: {function.name} takes {total} parameters")
        if len(required) > POSITIONAL + 2:
            found.append(f"{function.lineno}: {function.name} takes {len(required)} by position")
    return found


def missing_annotations(tree: ast.Module) -> list[str]:
    """Functions without full annotations."""
    found = []
    for function, method in functions(tree):
        if _decorators(function) & {"jit", "constexpr_function"}:  # Triton's language: types are those of the call
            continue
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        rest = [a for a in (function.args.vararg, function.args.kwarg) if a is not None]
        skip = 1 if method and "staticmethod" not in _decorators(function) else 0
        if function.returns is None or any(a.annotation is None for a in [*arguments[skip:], *rest]):
            found.append(f"{function.lineno}: {function.name} is not annotated")
    return found


def missing_docstrings(tree: ast.Module) -> list[str]:
    """Public functions, methods of public classes, classes, and the module, without a docstring."""
    found = [] if ast.get_docstring(tree) else ["1: the module has no docstring"]
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    for node in [*tree.body, *(method for each in classes for method in each.body)]:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        short = isinstance(node, ast.FunctionDef) and len(node.body) <= 1  # a property that says all in one line
        if not ast.get_docstring(node) and not short:
            found.append(f"{node.lineno}: {node.name} has no docstring")
    return found


def bad_habits(tree: ast.Module) -> list[str]:
    """print, assert, bare or broad except, global statements, unfinished work."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            found.append(f"{node.lineno}: assert")
        elif isinstance(node, ast.Global):
            found.append(f"{node.lineno}: global")
        elif isinstance(node, ast.ExceptHandler) and _broad(node.type):
            found.append(f"{node.lineno}: broad except")
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "print":
            found.append(f"{node.lineno}: print()")
        elif isinstance(node, ast.Name) and node.id in FORBIDDEN_WORDS:
            found.append(f"{node.lineno}: {node.id}")
    return found


UNPICKLERS = ("pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")
FROM = ("torch.load", "yaml.load", "json.load", "json.loads", "importlib.import_module")  # say whose they are
TEMPLATES = ("apply_chat_template", "get_chat_template", "render_jinja_template")
# modules that may import by a name that is no literal: the folder of plug-ins, and the constants of two calls
IMPORTERS = ("llmcompress.plugins", "llmcompress.model.sources")
# readers of JSON that is no stranger's document: rows of calibration text, and the user's own table of tile sizes
LOOSE_JSON = ("llmcompress.files", "llmcompress.model.sources", "llmcompress.kernels.triton.tuning")


def strange_imports(tree: ast.Module) -> list[str]:
    """Modules that run what they read: unpicklers, and jinja2 but for the error that templates of others raise."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not (
            node.module == "jinja2" and {alias.name for alias in node.names} == {"UndefinedError"}
        ):
            names = [node.module or "", *(f"{node.module}.{a.name}" for a in node.names)]
        else:
            continue
        found += [f"{node.lineno}: {n}" for n in names if n.split(".")[0] in (*UNPICKLERS, "jinja2") or n in FROM]
    return found


def strange_calls(module: str, tree: ast.Module) -> list[str]:
    """Calls that could run what a stranger's file says, or that read it less strictly than `files` does."""
    found = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name, given = ast.unparse(call.func), {k.arg: ast.unparse(k.value) for k in call.keywords}
        owner, _, leaf = name.rpartition(".")
        literal = bool(call.args) and isinstance(call.args[0], ast.Constant)
        complaints = {
            "unpickles": name == "torch.load" or owner.split(".")[0] in UNPICKLERS,
            "unpickles arrays": given.get("allow_pickle", "False") != "False",
            "unpickles weights": given.get("weights_only", "True") != "True",
            "runs the model's code": given.get("trust_remote_code", "False") != "False",
            "may ask to run the model's code": leaf == "from_pretrained"
            and _auto(owner)
            and given.get("trust_remote_code") != "False",
            "may open pickles": leaf == "from_pretrained"
            and not _auto(owner, besides="AutoModel")
            and given.get("use_safetensors") != "True",
            "imports by a name it is given": leaf in ("import_module", "__import__")
            and not literal
            and module not in IMPORTERS,
            "reads YAML loosely": owner == "yaml"
            and "load" in leaf
            and not (module == "llmcompress.files" and given.get("Loader") == "_StrictLoader"),
            "reads JSON loosely": name in ("json.load", "json.loads") and module not in LOOSE_JSON,
            "renders a template": leaf in TEMPLATES or "apply_chat_template" in given,
            "runs text": name in ("eval", "exec", "compile", "os.system", "os.popen") or given.get("shell") == "True",
        }
        found += [f"{call.lineno}: {name}() {what}" for what, wrong in complaints.items() if wrong]
    return found


def _auto(owner: str, besides: str = "") -> bool:
    """Whether the class is one of transformers' Auto classes, other than those whose name starts with `besides`."""
    name = owner.rpartition(".")[2]
    return name.startswith("Auto") and not (besides and name.startswith(besides))


def unfinished(text: str) -> list[str]:
    """Comments that leave work for later."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = ((token.start[0], token.string) for token in tokens if token.type == tokenize.COMMENT)
    return [f"{line}: {comment}" for line, comment in comments if any(word in comment for word in FORBIDDEN_WORDS)]


def too_long(text: str) -> list[str]:
    """A file of more lines than a reader keeps in mind."""
    lines = len(text.splitlines())
    return [f"1: {lines} lines, at most {LONGEST_FILE}"] if lines > LONGEST_FILE else []


def _broad(kind: ast.expr | None) -> bool:
    kinds = kind.elts if isinstance(kind, ast.Tuple) else [kind]
    return any(one is None or ast.unparse(one) in ("Exception", "BaseException") for one in kinds)


def imports(tree: ast.AST) -> list[tuple[int, str]]:
    """Every imported module with its line; `if TYPE_CHECKING` blocks do not count.

    Names taken from our own packages keep their own place: `from llmcompress import eval` is `llmcompress.eval`.
    Relative imports keep their dots.
    """
    found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            ours = module.split(".")[0] == "llmcompress"
            found += [(node.lineno, f"{module}.{a.name}" if ours else module) for a in node.names]
        else:
            found += imports(node)
    return found


def module_imports(tree: ast.Module) -> list[tuple[int, str]]:
    """Imports made when the module is imported, not inside functions."""
    top = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return imports(ast.Module(body=top, type_ignores=[]))


def wrong_directions(module: str, tree: ast.Module) -> list[str]:
    """Imports the table of rooms does not allow."""
    room = room_of(module)
    if room not in ROOMS:
        return [f"1: {room} is no room of the table"]
    ours, outside = ROOMS[room]
    found = [f"{line}: relative import {name}" for line, name in imports(tree) if name.startswith(".")]
    at_import = module_imports(tree) if room == "cli" else imports(tree)
    for line, name in at_import:
        other = room_of(name) if name.startswith("llmcompress.") else None
        if other is not None and other != room and other not in (*ours, "__version__"):
            found.append(f"{line}: {room} imports {other}")
        if name.split(".")[0] in outside:
            found.append(f"{line}: {room} imports {name}")
    if module.removeprefix("llmcompress.") in TORCHLESS:
        found += [f"{line}: imports torch" for line, name in imports(tree) if name.split(".")[0] == "torch"]
    return found


def plugins_importing_each_other(module: str, tree: ast.Module) -> list[str]:
    """Plug-ins share code through the room's other modules, never through each other."""
    folder = module.rpartition(".")[0]
    if folder.rpartition(".")[2] not in ("scorers", "quantizers", "exporters", "formats", "reparam"):
        return []
    return [f"{line}: {name}" for line, name in imports(tree) if name.startswith(folder + ".") and name != module]


def inner_imports(module: str, tree: ast.Module, text: str) -> list[str]:
    """Imports inside functions, outside the command line, without a `# lazy:` and a reason."""
    if room_of(module) in ("cli", "__main__"):
        return []
    top = {line for line, _ in module_imports(tree)}
    lines = text.splitlines()
    return [f"{line}: {name}" for line, name in imports(tree) if line not in top and not LAZY.search(lines[line - 1])]


def readme_commands(text: str) -> set[str]:
    """The commands that the README's table of commands names in its first column."""
    table = text.partition("| command |")[2].partition("\n\n")[0]
    return {word for row in table.splitlines()[2:] for word in re.findall(r"`([a-z]+)`", row.split("|")[1])}


def help_commands(text: str) -> set[str]:
    """The commands that `--help` lists."""
    return set(re.findall(r"^  ([a-z]+)  ", text.partition("Commands:")[2], re.MULTILINE))


def import_graph(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Module -> modules of ours that it imports anywhere, also while type checking only."""
    graph = {}
    for name, tree in trees.items():
        edges = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                edges |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                edges |= {alias.name for alias in node.names}
        graph[name] = (edges & trees.keys()) - {name, "llmcompress"}
    return graph


def cycles(graph: dict[str, set[str]]) -> list[str]:
    """Modules that remain when modules importing none of the others are taken away, again and again."""
    left = dict(graph)
    while leaves := [name for name, edges in left.items() if not edges & left.keys()]:
        for name in leaves:
            del left[name]
    return sorted(left)


def module_name(root: Path, path: Path) -> str:
    """Dotted name of a file of the package."""
    parts = list(path.relative_to(root).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
