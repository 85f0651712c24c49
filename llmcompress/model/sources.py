"""Where calibration and evaluation text comes from: built in, a file, or a data set on the hub."""

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from llmcompress.errors import InputError, MachineError
from llmcompress.model.corpus import Split, documents

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
FIELDS = ("text", "content")
SEPARATOR = "<|endoftext|>"
LONGEST_LINE = 64 << 20
DATASET = re.compile(r"[\w.-]+/[\w.-]+(:[^:]+){0,2}")
KINDS = "use builtin, self, a .txt, .jsonl, .json or .parquet file, or a hub data set org/name[:split[:column]]"


def read_documents(spec: str, split: Split) -> tuple[str, Iterator[str]]:
    """What to call the source, and its documents. Raises InputError or MachineError."""
    if spec == "builtin":
        return "builtin", iter([text for _, text in documents(split)])
    path = Path(spec)
    if path.suffix.lower() in SUFFIXES:
        return path.name, _file_documents(path)
    if path.exists():
        raise InputError(f"text {path.name}: unknown kind of file", KINDS)
    if DATASET.fullmatch(spec) and not spec.startswith((".", "/")):
        return spec, _hub_documents(spec)
    raise InputError(f"text {spec!r} is not understood", KINDS)


def _file_documents(path: Path) -> Iterator[str]:
    if not path.is_file():
        raise InputError(f"text {path.name}: no such file", KINDS)
    if path.suffix.lower() == ".parquet":
        return _parquet_documents(path)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"text {path.name}: not UTF-8 text (byte {error.start})", "convert it to UTF-8") from None
    except OSError as error:
        raise InputError(f"text {path.name}: {error.strerror}", "check the path and its permissions") from None
    if not text.strip():
        raise InputError(f"text {path.name}: empty", "give a file with text in it")
    if "\0" in text:
        raise InputError(f"text {path.name}: binary data", "give a text file")
    if path.suffix.lower() == ".txt":
        return iter([part for part in text.split(f"\n{SEPARATOR}\n") if part.strip()])
    return iter(_json_documents(path, text))


def _json_documents(path: Path, text: str) -> list[str]:
    if path.suffix.lower() == ".json":
        rows = _parse(text, path.name)
        if not isinstance(rows, list):
            raise InputError(f"text {path.name}: not a list", "give a JSON list of strings or of {text: ...}")
        return [_field(row, f"{path.name}: entry {place}") for place, row in enumerate(rows, 1)]
    found = []
    for place, line in enumerate(text.split("\n"), 1):
        if len(line) > LONGEST_LINE:
            raise InputError(f"text {path.name}: line {place} is longer than {LONGEST_LINE} characters", "split it")
        if line.strip():
            found.append(_field(_parse(line, f"{path.name}: line {place}"), f"{path.name}: line {place}"))
    return found


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(f"text {where}: not valid JSON", "give one JSON object per line") from None


def _field(row: Any, where: str) -> str:
    """The text of one row: a string, a `text` or `content` field, the only string field, or chat messages."""
    if isinstance(row, str):
        return row
    if isinstance(row, dict):
        if isinstance(row.get("messages"), list):
            parts = [m for m in row["messages"] if isinstance(m, dict)]
            return "\n".join(f"{m.get('role', '')}: {m.get('content', '')}" for m in parts)
        for name in FIELDS:
            if isinstance(row.get(name), str):
                return str(row[name])
        strings = [value for value in row.values() if isinstance(value, str)]
        if len(strings) == 1:
            return strings[0]
    raise InputError(f"text {where}: no text field", "name the field text or content")


def _extra(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise InputError(f"{module} is not installed", "pip install 'llmcompress[data]'") from None


def _parquet_documents(path: Path) -> Iterator[str]:
    table = _extra("pyarrow.parquet")
    try:
        rows = table.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        words = " ".join(str(error).split())[:120]
        raise InputError(f"text {path.name}: {words}", "give a parquet file with a text column") from None
    return iter([_field(row, f"{path.name}: row {place}") for place, row in enumerate(rows, 1)])


def _hub_documents(spec: str) -> Iterator[str]:
    name, _, rest = spec.partition(":")
    part, _, column = rest.partition(":")
    library = _extra("datasets")
    try:
        rows = library.load_dataset(name, split=part or "train", streaming=True)
        for row in rows:
            yield str(row[column]) if column else _field(row, f"{name}: a row")
    except KeyError:
        raise InputError(f"text {spec}: no column {column!r}", "name another column") from None
    except (OSError, ValueError) as error:
        words = " ".join(str(error).split())[:120]
        raise MachineError(f"text {spec}: {words}", "check the name and the network; builtin needs neither") from None
