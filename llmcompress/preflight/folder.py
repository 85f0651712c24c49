"""Which files of a model directory are read or copied, and whether they are ordinary files of its own."""

import os
import stat
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from llmcompress.errors import Finding
from llmcompress.files import ALLOW_EXTERNAL, allowed

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
# name in the directory -> the most bytes that are read of it; what matches nothing here is never opened
READ: tuple[tuple[str, int], ...] = (
    ("*.safetensors", 1 << 50),
    ("*.safetensors.index.json", 64 * MIB),
    ("config.json", 4 * MIB),
    ("generation_config.json", 4 * MIB),
    ("tokenizer_config.json", 32 * MIB),
    ("tokenizer*.json", 128 * MIB),
    ("vocab.json", 128 * MIB),
    ("special_tokens_map.json", 32 * MIB),
    ("added_tokens.json", 32 * MIB),
    ("chat_template.json", 4 * MIB),
    ("*processor_config.json", 4 * MIB),
    ("adapter_config.json", 4 * MIB),
    ("llmcompress.json", 128 * MIB),
    ("*.jinja", 4 * MIB),
    ("merges.txt", 128 * MIB),
    ("vocab.txt", 128 * MIB),
    ("tokenizer*.model*", 128 * MIB),
    ("spiece.model", 128 * MIB),
    ("sentencepiece.*", 128 * MIB),
    ("*.tiktoken", 128 * MIB),
    ("README.md", 16 * MIB),
    ("LICEN[CS]E*", 16 * MIB),
    ("NOTICE*", 16 * MIB),
    ("USE_POLICY*", 16 * MIB),
)
FOLDERS = ("adapter", "additional_chat_templates")  # the only ones that are looked into
EXTERNAL = "copy the file into the model directory, or pass --allow-external-files if you made the link"
ORDINARY = "give a model directory with ordinary files"


def limit_of(name: str) -> int | None:
    """The most bytes that are read of a file of this name, None for one that is not read."""
    return next((limit for pattern, limit in READ if fnmatchcase(name, pattern)), None)


def link_allowed(folder: Path, real: Path) -> bool:
    """Inside the directory, or in the `blobs` of the hub cache whose `snapshots` hold it, or where users say so."""
    if allowed(ALLOW_EXTERNAL):
        return True
    home = folder.resolve()
    if home in real.parents:
        return True
    return home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs"


def check_entry(folder: Path, relative: str) -> Finding | None:
    """What is wrong with a file that is read: a link that leads out, not an ordinary file, too large."""
    path = folder / relative
    if not relative.isprintable():
        return Finding(f"{relative!r}: not a name for a file of a model", "rename or remove it")
    try:
        link = stat.S_ISLNK(path.lstat().st_mode)
        real = path.resolve(strict=True) if link else path
        status = real.stat()
    except (OSError, RuntimeError, ValueError):
        return Finding(f"{relative}: missing or a broken link", "the download is incomplete; fetch it again")
    if link and not link_allowed(folder, real):
        return Finding(f"{relative}: a link to a file outside the model", EXTERNAL)
    if not stat.S_ISREG(status.st_mode):
        return Finding(f"{relative}: not a regular file", ORDINARY)
    if not os.access(real, os.R_OK):
        return Finding(f"{relative}: may not be read", "check its permissions")
    limit = limit_of(path.name)
    if limit is not None and status.st_size > limit:
        return Finding(f"{relative}: {status.st_size:,} bytes, {limit:,} is the limit", "no model has one of this size")
    return None


def check_folder(folder: Path) -> Iterator[tuple[str, Finding]]:
    """Every entry of a model directory that is read or copied and should not be, with its relative name."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        yield "", Finding(f"{folder.name}: {error.strerror}", "check the directory and its permissions")
        return
    for entry in entries:
        if entry.name in FOLDERS:
            yield from _check_inner(folder, entry.name)
        elif limit_of(entry.name) is not None and (found := check_entry(folder, entry.name)) is not None:
            yield entry.name, found


def _check_inner(folder: Path, name: str) -> Iterator[tuple[str, Finding]]:
    """The same for one of the folders that a model directory may have."""
    path = folder / name
    if not path.is_dir() or (path.is_symlink() and not link_allowed(folder, path.resolve())):
        yield name, Finding(f"{name}: not a folder of this model", ORDINARY)
        return
    for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
        relative = f"{name}/{entry.name}"
        found = check_entry(folder, relative) if limit_of(entry.name) is not None else None
        if found is not None:
            yield relative, found
