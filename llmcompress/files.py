"""Atomic writes, digests and strict JSON / YAML. No torch."""

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from llmcompress.errors import InputError, MachineError

CHUNK_BYTES = 1 << 20
LARGEST_DOCUMENT_BYTES = 256 << 20
LARGEST_NUMBER = 2**32 - 1  # that a user may give as a count or a seed; torch and numpy go on from there
LONE = re.compile("[\ud800-\udfff]")
ALLOW_NONFINITE, ALLOW_EXTERNAL = "LLMCOMPRESS_ALLOW_NONFINITE", "LLMCOMPRESS_ALLOW_EXTERNAL_FILES"


def allowed(variable: str) -> bool:
    """Whether the user allows what is refused otherwise: an option sets the variable, for what it starts, too."""
    return os.environ.get(variable) == "1"


def _umask() -> int:
    # Reading the mask through os.umask() would change it for a moment, for every thread.
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    except OSError:
        pass
    return 0o022


def cache_folder(*parts: str) -> Path:
    """Where this user keeps what can be made again: `~/.cache/llmcompress`, or below XDG_CACHE_HOME.

    Raises FileNotFoundError for a user without a home, as in containers. Relative paths are no homes.
    """
    for base in (os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")):
        if os.path.isabs(base):
            return Path(base).joinpath("llmcompress", *parts)
    raise FileNotFoundError("no folder for caches: neither HOME nor XDG_CACHE_HOME names one")


def own_folder(folder: Path) -> Path:
    """A folder, made where it is not there, that code may be run from: nobody else can put anything into it.

    Raises PermissionError where others may write to it, OSError where it cannot be made.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{folder.name}: others may write to the cache folder")
    return folder


def sync_folder(folder: Path) -> None:
    """fsync a directory, so that a rename inside it survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _drop_stale(path: Path) -> None:
    """Remove what processes that are no more left beside `path` when they died writing it."""
    start = f"{path.name}.tmp-"
    for name in os.listdir(path.parent):
        number = name.removeprefix(start)
        if name.startswith(start) and number.isdecimal() and not _lives(int(number)):
            (path.parent / name).unlink(missing_ok=True)


def _lives(pid: int) -> bool:
    """Whether another process has this id."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return pid != os.getpid()


def commit_bytes(path: Path, *pieces: bytes | memoryview) -> None:
    """Write `path` durably and atomically: aside, fsync, rename, fsync the folder.

    Raises MachineError when the disk refuses; `path` is then as it was, or complete.
    """
    commit_pieces(path, pieces)


def commit_pieces(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """`commit_bytes` of pieces that are made as they are written; what making one raises leaves `path` as it was."""
    aside = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        _drop_stale(path)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        handle = os.open(aside, flags, 0o666 & ~_umask())
        try:
            with os.fdopen(handle, "wb") as stream:
                for piece in pieces:
                    stream.write(piece)
                stream.flush()
                os.fsync(stream.fileno())
            os.rename(aside, path)
        finally:
            aside.unlink(missing_ok=True)
        sync_folder(path.parent)
    except OSError as error:
        hint = "free space and run the same command again; finished work is kept"
        raise MachineError(f"cannot write {path.name}: {error.strerror or error}", hint) from error


def check_name(path: Path) -> None:
    """Raises InputError for a path that is no UTF-8: several libraries cannot open files there."""
    if LONE.search(str(path.absolute())):
        raise InputError(f"{path.name}: not a name in UTF-8", "rename it, or set a UTF-8 locale, as LC_ALL=C.UTF-8")


def to_json(value: object) -> str:
    """Strict, readable JSON: no NaN, no Infinity, one trailing newline; what is no UTF-8 becomes `?`."""
    return LONE.sub("?", json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)) + "\n"


def commit_json(path: Path, value: object) -> None:
    """Write a JSON document durably and atomically."""
    commit_bytes(path, to_json(value).encode())


def file_digest(path: Path) -> str:
    """sha256 of a file's content."""
    state = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            state.update(chunk)
    return state.hexdigest()


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"duplicate key {key!r}")
        found[key] = value
    return found


def _no_constant(word: str) -> float:
    raise ValueError(f"{word} is not JSON")


def _finite(word: str) -> float:
    number = float(word)
    if not math.isfinite(number):
        raise ValueError(f"{word[:20]} is more than a number can be")
    return number


def parse_json(text: str | bytes, where: str) -> Any:
    """Strict JSON in UTF-8: duplicate keys, NaN, infinity and absurd nesting raise InputError naming `where`."""
    try:
        plain = text if isinstance(text, str) else text.decode()  # json would guess the encoding
        return json.loads(plain, object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        what = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:160]
        raise InputError(f"{where}: not valid JSON: {what}", "download the file again or repair it") from None


def read_small(path: Path, largest: int = LARGEST_DOCUMENT_BYTES) -> bytes:
    """A file of at most `largest` bytes. Raises InputError where it is larger, no regular file, or cannot be read.

    Nothing is read from a pipe or a device, and a file that grows meanwhile is not read beyond the limit.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe must not hang us
        with os.fdopen(handle, "rb") as stream:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise InputError(f"{path.name}: not a regular file", "give an ordinary file in its place")
            data = stream.read(largest + 1)
    except OSError as error:
        raise InputError(f"{path.name}: {error.strerror}", "check the path and its permissions") from None
    if len(data) > largest:
        raise InputError(f"{path.name}: more than {largest:,} bytes", "no model has one of this size; do not trust it")
    return data


def read_json(path: Path, largest: int = LARGEST_DOCUMENT_BYTES) -> Any:
    """`parse_json` of a file. Raises InputError when it cannot be read, or is larger than `largest` bytes."""
    return parse_json(read_small(path, largest), path.name)


class _StrictLoader(yaml.SafeLoader):
    """YAML without aliases, tags and duplicate keys."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuse aliases, which can blow a small file up, and tags, which choose what is made of a value."""
        if self.check_event(yaml.events.AliasEvent):
            line = self.peek_event().start_mark.line + 1  # type: ignore[no-untyped-call]
            raise yaml.YAMLError(f"line {line}: aliases are not allowed")
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "tag", None) is not None:
            raise yaml.YAMLError(f"line {event.start_mark.line + 1}: tags are not allowed")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """Refuse duplicate and non-text keys."""
        seen: set[object] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: keys must be words")
            if key in seen:
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: duplicate key {key!r}")
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, where: str) -> Any:
    """Safe YAML without aliases, tags or duplicate keys. Raises InputError naming the line."""
    try:
        return yaml.load(text, Loader=_StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        words = " ".join(str(error).split())
        raise InputError(
            f"{where}: not a valid recipe: {words}", "see `llmcompress list recipes` for examples"
        ) from None
