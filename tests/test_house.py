"""The house rules, executed: over the package, and over snippets that break each of them."""

import ast
import re
import subprocess
import sys
import textwrap
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
    "return annotation": (rules.missing_annotations, "def f(a: int): ..."),
    "docstrings": (rules.missing_docstrings, '"""M."""\ndef f() -> None:\n    a = 1\n    return a\n'),
    "module docstring": (rules.missing_docstrings, "x = 1"),
    "assert": (rules.bad_habits, "assert x"),
    "broad except": (rules.bad_habits, "try:\n    pass\nexcept Exception:\n    pass"),
    "bare except": (rules.bad_habits, "try:\n    pass\nexcept:\n    pass"),
    "print": (rules.bad_habits, "print(1)"),
    "torch.load": (rules.bad_habits, "torch.load(x)"),
    "pickle": (rules.bad_habits, "import pickle"),
    "stub": (rules.bad_habits, "raise NotImplementedError"),
    "global": (rules.bad_habits, "def f() -> None:\n    global x\n"),
}


@pytest.mark.parametrize("name", TREE_RULES)
def test_rule_holds_and_can_fail(name: str) -> None:
    check, broken = TREE_RULES[name]
    assert check(ast.parse(textwrap.dedent(broken)))
    complaints = [f"{path.relative_to(ROOT)}:{line}" for path in FILES for line in check(TREES[path])]
    assert not complaints, "\n".join(complaints)


def test_files_are_short() -> None:
    every = [*FILES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "tools").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]
    long = [f"{p}: {n}" for p in every if (n := len(p.read_text().splitlines())) > rules.LONGEST_FILE]
    assert not long


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("llmcompress.eval.x", "from llmcompress.compress import grid"),
        ("llmcompress.model.x", "from llmcompress.runtime import packed"),
        ("llmcompress.kernels.x", "import transformers"),
        ("llmcompress.cli.x", "import torch"),
        ("llmcompress.types", "def f() -> None:\n    import torch"),
        ("llmcompress.eval.report", "import torch"),
    ],
)
def test_import_rule_can_fail(module: str, code: str) -> None:
    assert rules.wrong_directions(module, ast.parse(code))


def test_imports_go_one_way() -> None:
    complaints = [f"{NAMES[p]}:{line}" for p in FILES for line in rules.wrong_directions(NAMES[p], TREES[p])]
    assert not complaints, "\n".join(complaints)


def test_plugins_do_not_import_each_other() -> None:
    broken = ast.parse("from llmcompress.compress.quantizers.rtn import quantize")
    assert rules.plugins_importing_each_other("llmcompress.compress.quantizers.x", broken)
    found = [f"{NAMES[p]}:{x}" for p in FILES for x in rules.plugins_importing_each_other(NAMES[p], TREES[p])]
    assert not found


def test_imports_inside_functions_say_why() -> None:
    broken = "def f() -> None:\n    import json\n"
    assert rules.inner_imports("llmcompress.model.x", ast.parse(broken), broken)
    found = [f"{NAMES[p]}:{x}" for p in FILES for x in rules.inner_imports(NAMES[p], TREES[p], p.read_text())]
    assert not found, "\n".join(found)


def test_no_import_cycles() -> None:
    known = set(NAMES.values())
    graph: dict[str, set[str]] = {}
    for path in FILES:
        edges = set()
        for node in ast.walk(TREES[path]):
            if isinstance(node, ast.ImportFrom) and node.module:
                edges |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        graph[NAMES[path]] = (edges & known) - {NAMES[path], "llmcompress"}
    while leaves := [name for name, edges in graph.items() if not edges & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph, f"cycle among {sorted(graph)}"


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


def test_readme_lists_every_command() -> None:
    help_text = subprocess.run(
        [sys.executable, "-m", "llmcompress", "--help"], capture_output=True, text=True, check=True
    ).stdout
    commands = set(re.findall(r"^  ([a-z]+)  ", help_text.partition("Commands:")[2], re.MULTILINE))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert commands
    assert {name for name in commands if f"llmcompress {name}" not in readme and f"`{name}`" not in readme} == set()


def test_the_project_names_no_machine() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not listed:
        pytest.skip("not a git clone")
    texts = {name: (ROOT / name).read_bytes() for name in listed if (ROOT / name).is_file()}
    bad = re.compile(rb"/" rb"(work|root|home)/[a-z]")
    assert [name for name, text in texts.items() if bad.search(text)] == []
