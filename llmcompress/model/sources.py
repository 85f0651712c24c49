"""Where calibration and evaluation text comes from: built in, a file, or a data set on the hub.

Everything is read as the iterator advances, so that a very large file or data set costs only what is used of it.
"""

import codecs
import difflib
import importlib
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from llmcompress.errors import InputError, MachineError
from llmcompress.model.corpus import Split, documents

WORDS = ("builtin", "self")
SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
FIELDS = ("text", "content")
SEPARATOR = "<|endoftext|>"
LONGEST_LINE_BYTES = 64 << 20
LONGEST_DOCUMENT = 64 << 20  # characters; what is longer goes on as another document
PARQUET_ROWS = 256
DATA_SET = re.compile(r"(?P<name>[\w-][\w.-]*/[\w.-]+)(:(?P<part>[^:]+)(:(?P<column>[^:]+))?)?")
KINDS = "use builtin, self, a .txt, .jsonl, .json or .parquet file, or a hub data set org/name[:split[:column]]"
FIELD_HINT = "name the field text or content, keep one string field, or give messages with role and content"


def read_documents(spec: str, split: Split) -> tuple[str, Iterator[str]]:
    """What to call a source of text, without its folder, and its documents in order; blank ones are left out.

    spec   builtin, a .txt, .jsonl, .json or .parquet file, or a hub data set org/name[:split[:column]]
    split  which part of the built-in text; other sources have no split

    Raises InputError for what is missing, unreadable or not understood and MachineError when the network
    fails; a damaged place inside a file is met, and named, only when the iterator gets there.
    """
    name, found = _opened(spec, split)
    return name, _not_blank(name, found)


def _not_blank(name: str, found: Iterator[str]) -> Iterator[str]:
    empty = True
    for document in found:
        if document.strip():
            empty = False
            yield document
    if empty:
        raise InputError(f"text {name}: empty, there is no text in it", "give a source with text in it, or use builtin")


def _opened(spec: str, split: Split) -> tuple[str, Iterator[str]]:
    if spec == "builtin":
        return spec, (text for _, text in documents(split))
    if spec == "self":
        raise InputError("text self: sampled from a model, so it can only be used to calibrate that model", KINDS)
    path = Path(spec)
    if path.suffix.lower() in SUFFIXES:
        return path.name, _file_documents(path)
    if path.exists():
        kind = "a folder" if path.is_dir() else "an unknown kind of file"
        raise InputError(f"text {path.name or spec!r}: {kind}", KINDS)
    found = DATA_SET.fullmatch(spec)
    if found is None:
        close = difflib.get_close_matches(spec.lower(), WORDS, n=1)
        raise InputError(f"text {spec!r} is not understood", f"did you mean {close[0]}? {KINDS}" if close else KINDS)
    name, part, column = found["name"], found["part"] or "train", found["column"]
    label = f"{name}:{part}:{column}" if column else f"{name}:{part}"
    return label, _hub_documents(name, part, column)


def _file_documents(path: Path) -> Iterator[str]:
    if not path.is_file():
        kind = "a folder, not a file" if path.is_dir() else "no such file"
        raise InputError(f"text {path.name}: {kind}", _nearest_file(path))
    readers = {".txt": _text_documents, ".jsonl": _line_documents, ".json": _list_documents}
    return readers.get(path.suffix.lower(), _parquet_documents)(path)


def _nearest_file(path: Path) -> str:
    names = sorted(p.name for p in path.parent.iterdir() if p.is_file()) if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(close)}?" if close else f"check the path; {KINDS}"


def _decoded(data: bytes, where: str) -> str:
    if b"\0" in data:
        raise InputError(f"text {where}: binary data", "give text in UTF-8")
    try:
        return data.decode().replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise InputError(f"text {where}: not UTF-8 (byte {error.start})", "convert the file to UTF-8") from None


def _unreadable(path: Path, error: Exception) -> InputError:
    words = getattr(error, "strerror", None) or " ".join(str(error).split())[:120]
    return InputError(f"text {path.name}: {words}", "check the file and its permissions")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines with their line ends. A line too long for memory is refused before it is read."""
    try:
        with path.open("rb") as stream:
            for place in itertools.count(1):
                line = stream.readline(LONGEST_LINE_BYTES + 1)
                where = f"{path.name}: line {place}"
                if len(line) > LONGEST_LINE_BYTES:
                    raise InputError(f"text {where}: longer than {LONGEST_LINE_BYTES:,} bytes", "break it into lines")
                if not line:
                    return
                yield place, _decoded(line.removeprefix(codecs.BOM_UTF8) if place == 1 else line, where)
    except OSError as error:
        raise _unreadable(path, error) from None


def _text_documents(path: Path) -> Iterator[str]:
    parts: list[str] = []
    size = 0
    for _, line in _lines(path):
        ended = line.strip() == SEPARATOR
        if ended or size >= LONGEST_DOCUMENT:
            yield "".join(parts)
            parts, size = [], 0
        if not ended:
            parts.append(line)
            size += len(line)
    yield "".join(parts)


def _line_documents(path: Path) -> Iterator[str]:
    for place, line in _lines(path):
        if line.strip():
            where = f"{path.name}: line {place}"
            yield _field(_parse(line, where, "give one JSON object per line"), where)


def _list_documents(path: Path) -> Iterator[str]:
    try:
        data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise _unreadable(path, error) from None
    if not data.strip():
        return
    rows = _parse(_decoded(data, path.name), path.name, "give a JSON list; for one object per line use .jsonl")
    if not isinstance(rows, list):
        raise InputError(f"text {path.name}: not a list", "give a JSON list of strings or of objects with text")
    for place, row in enumerate(rows, 1):
        yield _field(row, f"{path.name}: entry {place}")


def _parse(text: str, where: str, hint: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise InputError(f"text {where}: nested too deeply", hint) from None
    except ValueError as error:
        raise InputError(f"text {where}: not valid JSON: {error}", hint) from None


def _field(row: Any, where: str) -> str:
    """The text of one row: itself, its `text` or `content`, its chat messages, or its only string."""
    text = _text_of(row)
    if text is None:
        fields = ", ".join(str(name)[:40] for name in list(row)[:8]) if isinstance(row, dict) else type(row).__name__
        raise InputError(f"text {where}: no text field, found {fields or 'nothing'}", FIELD_HINT)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"text {where}: half a surrogate pair (character {error.start})", "repair that row") from None
    return text


def _text_of(row: Any) -> str | None:
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        return None
    for name in FIELDS:
        if isinstance(row.get(name), str):
            return str(row[name])
    if isinstance(row.get("messages"), list):
        return _conversation(row["messages"])
    strings = [value for value in row.values() if isinstance(value, str)]
    return strings[0] if len(strings) == 1 else None


def _conversation(messages: list[Any]) -> str | None:
    """Plain `role: content` lines. No chat template is rendered: a template is code that came with a model."""
    lines = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            return None
        content = message.get("content")
        if isinstance(content, list):
            content = "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
        if not isinstance(content, str | None):
            return None
        lines.append(f"{message['role']}: {content or ''}")
    return "\n".join(lines)


def _extra(module: str, where: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise InputError(f"text {where}: needs {package}, not installed", "pip install 'llmcompress[data]'") from None


def _parquet_documents(path: Path) -> Iterator[str]:
    library = _extra("pyarrow.parquet", path.name)
    try:
        with library.ParquetFile(path) as table:
            pieces = (batch.to_pylist() for batch in table.iter_batches(batch_size=PARQUET_ROWS))
            for place, row in enumerate(itertools.chain.from_iterable(pieces), 1):
                yield _field(row, f"{path.name}: row {place}")
    except (OSError, ValueError, RuntimeError) as error:
        raise _unreadable(path, error) from None


def _hub_documents(name: str, part: str, column: str | None) -> Iterator[str]:
    library = _extra("datasets", name)
    failures = (OSError, ValueError, RuntimeError, library.exceptions.DatasetsError)
    try:
        for place, row in enumerate(library.load_dataset(name, split=part, streaming=True), 1):
            yield _field(row, f"{name}: row {place}") if column is None else _cell(row, column, f"{name}: row {place}")
    except failures as error:
        raise _hub_error(name, error) from None


def _cell(row: dict[str, Any], column: str, where: str) -> str:
    if column not in row:
        raise InputError(f"text {where}: no column {column!r}", f"choose one of: {', '.join(map(str, row))}")
    if not isinstance(row[column], str):
        kind = type(row[column]).__name__
        raise InputError(f"text {where}: column {column!r} holds {kind}, not text", "name a column of strings")
    return _field(row[column], where)


def _hub_error(name: str, error: Exception) -> InputError | MachineError:
    """Our mistake or the network's: what does not exist and what is asked for wrongly is the user's to change."""
    words = " ".join(str(error).split())[:200]
    if isinstance(error, FileNotFoundError | ValueError):
        return InputError(f"text {name}: {words}", "check name, split and column: org/name[:split[:column]]")
    return MachineError(f"text {name}: the hub cannot be read: {words}", "try again later; builtin needs no network")
