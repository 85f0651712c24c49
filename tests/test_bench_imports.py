"""Benchmarks find what they import from each other and from the program: nobody runs them all on every change."""

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BENCH = ROOT / "bench"
SCRIPTS = sorted(BENCH.rglob("*.py"))


def source_of(module: str) -> Path | None:
    """The file of a module of the benchmarks or the program, None of another; a package is its `__init__.py`."""
    base = ROOT if module.partition(".")[0] in ("llmcompress", "tests") else BENCH
    path = base.joinpath(*module.split("."))
    return next((found for found in (path.with_suffix(".py"), path / "__init__.py") if found.is_file()), None)


def names_of(path: Path) -> set[str]:
    """What the statements of a module define, wherever in it."""
    tree, found = ast.parse(path.read_text(encoding="utf-8")), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    return found


def missing(path: Path) -> Iterator[str]:
    """What a script imports from a file of ours that does not have it, or from no library that is needed to start."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or node.module is None:
            continue
        ours, source = node.module.partition(".")[0] in ("llmcompress", "tests"), source_of(node.module)
        if source is None:
            optional = path.parent.name == "peers" or node not in tree.body
            known = not ours and (optional or importlib.util.find_spec(node.module.partition(".")[0]))
            if not known and not BENCH.joinpath(*node.module.split(".")).is_dir():
                yield node.module
        elif source.name != "__init__.py" or source.stat().st_size:
            names = names_of(source)
            inside = {alias.name for alias in node.names if source_of(f"{node.module}.{alias.name}") is not None}
            yield from (f"{node.module}.{x.name}" for x in node.names if x.name not in names | inside)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.relative_to(BENCH).as_posix())
def test_what_a_benchmark_imports_is_there(path: Path) -> None:
    assert list(missing(path)) == []


def test_what_is_not_there_is_found(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    lines = ("from nowhere import x", "from common import publish, absent", "from llmcompress.gone import y")
    script.write_text("\n".join(lines))
    assert list(missing(script)) == ["nowhere", "common.absent", "llmcompress.gone"]
