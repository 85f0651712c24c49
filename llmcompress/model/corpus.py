"""The built-in text: what every Python installation carries, split by file.

Standard-library modules (source and docstrings) and the language reference of
`pydoc_data.topics`. A file belongs to exactly one split, decided by a digest of
its name, so that training, calibration and evaluation never share text and a
new Python version moves no file from one split to another.
"""

import hashlib
import importlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

Split = Literal["train", "calibration", "evaluation"]

# Left out: what distributions often strip, generated tables, and copies of other projects.
SKIPPED_FOLDERS = frozenset(
    ("__pycache__", "config", "distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "lib-dynload",
     "msilib", "pydoc_data", "site-packages", "dist-packages", "test", "tests", "idle_test", "tkinter", "turtledemo")
)  # fmt: skip
SMALLEST_FILE_BYTES = 512
LARGEST_FILE_BYTES = 400_000


def split_of(name: str) -> Split:
    """The split a file belongs to: 1 in 12 evaluation, 1 in 12 calibration, the rest training."""
    bucket = hashlib.sha256(name.encode()).digest()[0] % 12
    if bucket == 0:
        return "evaluation"
    return "calibration" if bucket == 1 else "train"


def _sources() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        folders = relative.parts[:-1]
        if any(part in SKIPPED_FOLDERS or part.startswith("config-") for part in folders):
            continue
        if relative.name.startswith("_sysconfigdata") or not path.is_file():  # a broken link, or a folder
            continue
        if not SMALLEST_FILE_BYTES <= path.stat().st_size <= LARGEST_FILE_BYTES:
            continue
        yield relative.as_posix(), path.read_text(encoding="utf-8", errors="replace")


def _topics() -> Iterator[tuple[str, str]]:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for name in sorted(topics):
        if len(topics[name]) >= SMALLEST_FILE_BYTES:
            yield f"topics/{name}", topics[name]


def documents(split: Split) -> list[tuple[str, str]]:
    """`(name, text)` of every file of one split, in a fixed order (by the digest of the name)."""
    found = [(name, text) for name, text in (*_sources(), *_topics()) if split_of(name) == split]
    return sorted(found, key=lambda item: hashlib.sha256(item[0].encode()).digest())
