"""The house rules, executed: over the package, and over snippets that break each of them."""

import ast
import re
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import house_rules as rules
import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "llmcompress"
FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
NAMES = {path: rules.module_name(ROOT, path) for path in FILES}

TREE_RULES: dict[str, tuple[Callable[[ast.Module], list[str]], str]] = {
    "long bodies": (rules.long_bodies, "def f() -> int:\n" + "    x = 1\n" * 41),
    "nesting": (
        rules.deep_nesting,
        "def f() -> None:\n if a:\n  for b in c:\n   while d:\n    with e:\n     if g:\n      pass\n",
    ),
    "parameters": (
        rules.many_parameters,
        "def f(a: int, b: int, *, c: int, d: int, e: int, g: int, h: int) -> None: ...",
    ),
    "by position": (rules.many_parameters, "def f(a: int, b: int, c: int, d: int, e: int, g: int) -> None: ..."),
    "annotations": (rules.missing_annotations, "def f(a) -> None: ..."),
    "annotations of the rest": (rules.missing_annotations, "def f(*a, **b: int) -> None: ..."),
    "return annotation": (rules.missing_annotations, "def f(a: int): ..."),
    "docstrings": (rules.missing_docstrings, '"""M."""\ndef f() -> None:\n    a = 1\n    return a\n'),
    "module docstring": (rules.missing_docstrings, "x = 1"),
    "assert": (rules.bad_habits, "assert x"),
    "broad except": (rules.bad_habits, "try:\n    pass\nexcept Exception:\n    pass"),
    "broad except among others": (rules.bad_habits, "try:\n    pass\nexcept (OSError, Exception):\n    pass"),
    "bare except": (rules.bad_habits, "try:\n    pass\nexcept:\n    pass"),
    "print": (rules.bad_habits, "print(1)"),
    "stub": (rules.bad_habits, "raise NotImplementedError"),
    "pickle": (rules.strange_imports, "import pickle"),
    "pickle of a part": (rules.strange_imports, "from joblib.externals import x"),
    "load from torch": (rules.strange_imports, "from torch import load"),
    "loads from json": (rules.strange_imports, "from json import loads"),
    "templates": (rules.strange_imports, "from jinja2 import Template, UndefinedError"),
    "global": (rules.bad_habits, "def f() -> None:\n    global x\n"),
}


@pytest.mark.parametrize("name", TREE_RULES)
def test_rule_holds_and_can_fail(name: str) -> None:
    check, broken = TREE_RULES[name]
    assert check(ast.parse(textwrap.dedent(broken)))
    complaints = [f"{path.relative_to(ROOT)}:{line}" for path in FILES for line in check(TREES[path])]
    assert not complaints, "\n".join(complaints)


STRANGE = [
    "torch.load(x)",
    "pickle.loads(x)",
    "numpy.load(x, allow_pickle=True)",
    "load(x, weights_only=False)",
    "AutoConfig.from_pretrained(x)",
    "transformers.AutoTokenizer.from_pretrained(x, trust_remote_code=flag)",
    "f(x, trust_remote_code=True)",
    "AutoModelForCausalLM.from_pretrained(x, trust_remote_code=False)",
    "shorter.from_pretrained(x)",
    "importlib.import_module(x)",
    "__import__(config['class'])",
    "yaml.safe_load(x)",
    "yaml.load_all(x)",
    "yaml.load(x, Loader=yaml.Loader)",
    "json.loads(x)",
    "tokenizer.apply_chat_template(x)",
    "simple_evaluate(apply_chat_template=True)",
    "eval(x)",
    "exec(x)",
    "compile(x, 'y', 'exec')",
    "subprocess.run(x, shell=True)",
]


@pytest.mark.parametrize("code", STRANGE)
def test_the_rule_about_strange_calls_can_fail(code: str) -> None:
    assert rules.strange_calls("llmcompress.model.x", ast.parse(code))


def test_the_rule_about_strange_calls_lets_the_safe_ones_through() -> None:
    code = (
        "AutoConfig.from_pretrained(x, trust_remote_code=False)\n"
        "AutoModel.from_pretrained(x, trust_remote_code=False, use_safetensors=True)\n"
        "importlib.import_module('torch')\nre.compile(x)\nnumpy.load(x, allow_pickle=False)\nyaml.safe_dump(x)\n"
    )
    assert not rules.strange_calls("llmcompress.model.x", ast.parse(code))
    assert not rules.strange_calls("llmcompress.files", ast.parse("yaml.load(x, Loader=_StrictLoader)"))


def test_nothing_runs_what_a_strangers_file_says() -> None:
    found = [f"{NAMES[p]}:{x}" for p in FILES for x in rules.strange_calls(NAMES[p], TREES[p])]
    assert not found, "\n".join(found)


def test_files_are_short() -> None:
    every = [*FILES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "tools").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]
    assert rules.too_long("x = 1\n" * (rules.LONGEST_FILE + 1))
    assert not rules.too_long("x = 1\n" * rules.LONGEST_FILE)
    long = [f"{p}:{x}" for p in every for x in rules.too_long(p.read_text(encoding="utf-8"))]
    assert not long, "\n".join(long)


def test_nothing_is_left_for_later() -> None:
    assert rules.unfinished("x = 1  # TO" "DO: more\n")  # fmt: skip
    assert not rules.unfinished('x = "TO" "DO"  # done\n')
    found = [f"{NAMES[p]}:{x}" for p in FILES for x in rules.unfinished(p.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("llmcompress.eval.x", "from llmcompress.compress import grid"),
        ("llmcompress.model.x", "from llmcompress.runtime import packed"),
        ("llmcompress.kernels.x", "import transformers"),
        ("llmcompress.cli.x", "import torch"),
        ("llmcompress.types", "def f() -> None:\n    import torch"),
        ("llmcompress.eval.report", "import torch"),
        ("llmcompress.eval.x", "from llmcompress import compress"),
        ("llmcompress.eval.x", "import llmcompress.compress.grid"),
        ("llmcompress.eval.x", "from ..compress import grid"),
        ("llmcompress", "import torch"),
        ("llmcompress.attic.x", "x = 1"),
    ],
)
def test_import_rule_can_fail(module: str, code: str) -> None:
    assert rules.wrong_directions(module, ast.parse(code))


def test_imports_go_one_way() -> None:
    complaints = [f"{NAMES[p]}:{line}" for p in FILES for line in rules.wrong_directions(NAMES[p], TREES[p])]
    assert not complaints, "\n".join(complaints)


def test_plugins_do_not_import_each_other() -> None:
    for broken in ("quantizers.rtn import quantize", "quantizers import rtn"):
        tree = ast.parse(f"from llmcompress.compress.{broken}")
        assert rules.plugins_importing_each_other("llmcompress.compress.quantizers.x", tree)
    found = [f"{NAMES[p]}:{x}" for p in FILES for x in rules.plugins_importing_each_other(NAMES[p], TREES[p])]
    assert not found


def test_imports_inside_functions_say_why() -> None:
    for broken in ("def f() -> None:\n    import json\n", "def f() -> None:\n    import json  # lazy:\n"):
        assert rules.inner_imports("llmcompress.model.x", ast.parse(broken), broken)
    found = [f"{NAMES[p]}:{x}" for p in FILES for x in rules.inner_imports(NAMES[p], TREES[p], p.read_text())]
    assert not found, "\n".join(found)


def test_no_import_cycles() -> None:
    graph = rules.import_graph({NAMES[path]: tree for path, tree in TREES.items()})
    assert any(graph.values())
    assert not rules.cycles(graph)


def test_a_cycle_is_found() -> None:
    code = {
        "llmcompress.a": "from llmcompress import b",
        "llmcompress.b": "import llmcompress.c",
        "llmcompress.c": "def f() -> None:\n    from llmcompress.a import x\n",
        "llmcompress.d": "from llmcompress.a import x",
    }
    graph = rules.import_graph({name: ast.parse(text) for name, text in code.items()})
    assert rules.cycles(graph) == ["llmcompress.a", "llmcompress.b", "llmcompress.c", "llmcompress.d"]
    assert not rules.cycles(graph | {"llmcompress.c": set()})


def test_help_is_light() -> None:
    words = [sys.executable, "-X", "importtime", "-m", "llmcompress", "--help"]
    found = subprocess.run(words, capture_output=True, text=True, check=True)
    heavy = {"torch", "transformers", "accelerate", "scipy", "numpy", "huggingface_hub"}
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in found.stderr.splitlines()}
    assert "click" in imported
    assert not heavy & imported


def test_public_names_are_sorted() -> None:
    import llmcompress

    assert list(llmcompress.__all__) == sorted(llmcompress.__all__)
    assert all(hasattr(llmcompress, name) for name in llmcompress.__all__)


def test_type_checkers_of_others_may_read_the_annotations() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_readme_lists_the_commands() -> None:
    help_text = subprocess.run(
        [sys.executable, "-m", "llmcompress", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert rules.help_commands(help_text)
    assert rules.readme_commands((ROOT / "README.md").read_text(encoding="utf-8")) == rules.help_commands(help_text)


def test_readme_and_help_are_read_right() -> None:
    table = "| command | does |\n|---|---|\n| `plan`, `score` | `kept` out |\n\n| `later` | no |\n"
    assert rules.readme_commands(table) == {"plan", "score"}
    assert rules.help_commands("  usage  no\nCommands:\n  plan   Decide.\n  score  Score.\n") == {"plan", "score"}


def test_the_project_names_no_machine() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not listed:
        pytest.skip("not a git clone")
    texts = {name: (ROOT / name).read_bytes() for name in listed if (ROOT / name).is_file()}
    bad = re.compile(rb"/" rb"(work|root|home)/[a-z]")
    assert [name for name, text in texts.items() if bad.search(text)] == []


def test_test_files_have_names_of_their_own() -> None:
    """pytest imports them by their bare names."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, number in names.items() if number > 1] == []
