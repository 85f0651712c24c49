"""The folder is the registry: a plug-in's file name is the word the user types."""

import ast
import difflib
import importlib
import pkgutil
from pathlib import Path
from types import ModuleType

from llmcompress.errors import InputError


def available(package: str) -> tuple[str, ...]:
    """Names of the plug-ins in `package`, sorted; none of them is imported."""
    folder = importlib.import_module(package)
    return tuple(sorted(m.name for m in pkgutil.iter_modules(folder.__path__) if not m.name.startswith("_")))


def nearest(word: str, words: tuple[str, ...]) -> str:
    """A hint that names the words closest to `word`, or all of them."""
    close = difflib.get_close_matches(word, words, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"choose one of: {', '.join(words)}"


def summary(package: str, name: str) -> str:
    """First sentence of a plug-in's docstring, read without importing it."""
    source = Path(importlib.import_module(package).__path__[0]) / f"{name}.py"
    text = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split())


def find(package: str, name: str) -> ModuleType:
    """Import one plug-in. Raises InputError with the nearest names when there is none of that name."""
    names = available(package)
    if name not in names:
        kind = package.rpartition(".")[2].rstrip("s")
        raise InputError(f"unknown {kind}: {name}", nearest(name, names))
    return importlib.import_module(f"{package}.{name}")
