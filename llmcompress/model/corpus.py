"""The built-in text: what every Python installation carries, split by file.

Standard-library modules (source and docstrings) and the language reference of
`pydoc_data.topics`. A file belongs to exactly one split, decided by a digest of
its name, so that training, calibration and evaluation never share text and a
new Python version moves no file from one split to another.
"""

import hashlib
import importlib
import os
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


def _sources(split: Split) -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for folder, folders, files in os.walk(root):
        folders[:] = [x for x in folders if x not in SKIPPED_FOLDERS and not x.startswith("config-")]
        for file in files:
            path = Path(folder, file)
            name = path.relative_to(root).as_posix() if file.endswith(".py") else ""
            if not name or file.startswith("_sysconfigdata") or split_of(name) != split:
                continue
            if path.is_file() and SMALLEST_FILE_BYTES <= path.stat().st_size <= LARGEST_FILE_BYTES:
                yield name, path.read_text(encoding="utf-8", errors="replace")  # no broken link, and no folder


def _topics(split: Split) -> Iterator[tuple[str, str]]:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    for topic in sorted(topics):
        name = f"topics/{topic}"
        if split_of(name) == split and len(topics[topic]) >= SMALLEST_FILE_BYTES:
            yield name, topics[topic]


def documents(split: Split) -> list[tuple[str, str]]:
    """`(name, text)` of every file of one split, in a fixed order (by the digest of the name)."""
    return sorted((*_sources(split), *_topics(split)), key=lambda item: hashlib.sha256(item[0].encode()).digest())
