"""Read a safetensors header, believing nothing in it.

Offsets are checked against the file before anything is read or allocated (standard library only).
"""

import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llmcompress.errors import Finding, InputError, Refused
from llmcompress.files import parse_json

DTYPE_BYTES: Mapping[str, int] = MappingProxyType(
    {
        "F64": 8,
        "F32": 4,
        "F16": 2,
        "BF16": 2,
        "F8_E4M3": 1,
        "F8_E5M2": 1,
        "I64": 8,
        "I32": 4,
        "I16": 2,
        "I8": 1,
        "U8": 1,
        "BOOL": 1,
    }
)
LARGEST_HEADER_BYTES = 32 << 20  # a quarter of a million tensors
LARGEST_PADDING_BYTES = 1 << 20
LARGEST_ELEMENTS = 1 << 48
LONGEST_NAME = 512
MOST_DIMENSIONS = 8
DAMAGED = "the file is truncated or damaged; download it again"


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: bytes `[start, stop)` of the file at `path`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    stop: int

    @property
    def elements(self) -> int:
        """Number of values."""
        total = 1
        for size in self.shape:
            total *= size
        return total


def read_header(path: Path) -> tuple[TensorEntry, ...]:
    """The tensors of one shard in the order of their bytes.

    Raises InputError unless the file is a regular file, the header is strict JSON of known dtypes and
    the tensors cover the payload exactly: no overlap, no hole, nothing after the end. Where the header
    can be read, all that is wrong with it is said at once (Refused).
    """
    document, payload, size = _read(path)
    metadata = document.pop("__metadata__", {})
    findings: list[Finding] = []
    entries: list[TensorEntry] = []
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        findings.append(Finding(f"{path.name}: __metadata__ is not a table of texts", DAMAGED))
    for name, facts in document.items():
        found = _entry(path, name, facts, payload)
        if isinstance(found, Finding):
            findings.append(found)
        else:
            entries.append(found)
    ordered = tuple(sorted(entries, key=lambda entry: (entry.start, entry.stop)))
    if len(entries) == len(document):  # with some left out there would be holes
        findings += _cover(path, ordered, payload, size)
    if findings:
        raise Refused(findings)
    return ordered


def _read(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header as a table, where the payload begins, and the size of the file."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO must not hang us
    except OSError as error:
        raise InputError(f"{path.name}: {error.strerror}", "check that the file exists and can be read") from None
    with os.fdopen(handle, "rb") as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path.name}: not a regular file", "give a model directory with ordinary files")
        size = status.st_size
        if size < 8:
            raise InputError(f"{path.name}: file is {size} bytes, a header needs at least 8", DAMAGED)
        length = int.from_bytes(stream.read(8), "little")
        if length > LARGEST_HEADER_BYTES:
            raise InputError(f"{path.name}: header claims {length} bytes, {LARGEST_HEADER_BYTES} is the limit", DAMAGED)
        if length + 8 > size:
            raise InputError(f"{path.name}: file is {size} bytes, header needs {length + 8}", DAMAGED)
        text = stream.read(length)
    if not text.startswith(b"{"):
        raise InputError(f"{path.name}: the header is not a table of tensors", DAMAGED)
    if length - len(text.rstrip(b" ")) > LARGEST_PADDING_BYTES:
        raise InputError(f"{path.name}: the header is padded with more than {LARGEST_PADDING_BYTES} bytes", DAMAGED)
    document: dict[str, Any] = parse_json(text, path.name)  # a table, as it begins with a brace
    return document, length + 8, size


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _entry(path: Path, name: str, facts: Any, payload: int) -> TensorEntry | Finding:
    where = f"{path.name}: tensor {name[:120]!r}"
    if not name or len(name) > LONGEST_NAME or not name.isprintable():
        return Finding(f"{where}: not a name of a tensor", DAMAGED)
    if not isinstance(facts, dict) or set(facts) != {"dtype", "shape", "data_offsets"}:
        return Finding(f"{where}: header entry is malformed", DAMAGED)
    dtype, shape, offsets = facts["dtype"], facts["shape"], facts["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        return Finding(f"{where}: unknown dtype {str(dtype)[:40]!r}", "known dtypes: " + ", ".join(DTYPE_BYTES))
    if not isinstance(shape, list) or len(shape) > MOST_DIMENSIONS or not all(map(_whole, shape)):
        return Finding(f"{where}: shape {str(shape)[:60]} is not a list of sizes", DAMAGED)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_whole, offsets)):
        return Finding(f"{where}: offsets {str(offsets)[:60]} are malformed", DAMAGED)
    entry = TensorEntry(name, dtype, tuple(shape), path, payload + offsets[0], payload + offsets[1])
    if max(*shape, entry.elements, 0, 0) > LARGEST_ELEMENTS:
        return Finding(f"{where}: more values than any model has", DAMAGED)
    needed = entry.elements * DTYPE_BYTES[dtype]
    if entry.stop - entry.start != needed:
        return Finding(f"{where}: {entry.stop - entry.start} bytes, its shape needs {needed}"[:240], DAMAGED)
    return entry


def _cover(path: Path, ordered: tuple[TensorEntry, ...], payload: int, size: int) -> Iterator[Finding]:
    position = payload
    for entry in ordered:
        if entry.start != position:
            kind = "overlaps another" if entry.start < position else "leaves a hole before it"
            yield Finding(f"{path.name}: tensor {entry.name[:120]!r} {kind}", DAMAGED)
        position = max(position, entry.stop)
    if position != size:
        yield Finding(f"{path.name}: file is {size} bytes, its tensors end at {position}"[:240], DAMAGED)
