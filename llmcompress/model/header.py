"""Read a safetensors header, believing nothing in it.

Offsets are checked against the file before anything is read or allocated (stdlib only).
"""

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llmcompress.errors import InputError
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
LARGEST_HEADER_BYTES = 100_000_000
LARGEST_ELEMENTS = 1 << 48
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
    the tensors cover the payload exactly: no overlap, no hole, nothing after the end.
    """
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
        document = parse_json(stream.read(length), path.name)
    if not isinstance(document, dict):
        raise InputError(f"{path.name}: the header is not a table of tensors", DAMAGED)
    document.pop("__metadata__", None)
    entries = [_entry(path, name, facts, length + 8) for name, facts in document.items()]
    ordered = tuple(sorted(entries, key=lambda entry: (entry.start, entry.stop)))
    _check_cover(path, ordered, length + 8, size)
    return ordered


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _entry(path: Path, name: str, facts: Any, payload: int) -> TensorEntry:
    where = f"{path.name}: tensor {name!r}"
    if not isinstance(facts, dict) or set(facts) != {"dtype", "shape", "data_offsets"}:
        raise InputError(f"{where}: header entry is malformed", DAMAGED)
    dtype, shape, offsets = facts["dtype"], facts["shape"], facts["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise InputError(f"{where}: unknown dtype {dtype!r}", "known dtypes: " + ", ".join(DTYPE_BYTES))
    if not isinstance(shape, list) or not all(map(_whole, shape)):
        raise InputError(f"{where}: shape {shape!r} is not a list of sizes"[:200], DAMAGED)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_whole, offsets)):
        raise InputError(f"{where}: offsets {offsets!r} are malformed"[:200], DAMAGED)
    entry = TensorEntry(name, dtype, tuple(shape), path, payload + offsets[0], payload + offsets[1])
    if entry.elements > LARGEST_ELEMENTS:
        raise InputError(f"{where}: {entry.elements} values are more than any model has", DAMAGED)
    needed = entry.elements * DTYPE_BYTES[dtype]
    if entry.stop - entry.start != needed:
        raise InputError(f"{where}: {entry.stop - entry.start} bytes, its shape needs {needed}", DAMAGED)
    return entry


def _check_cover(path: Path, ordered: tuple[TensorEntry, ...], payload: int, size: int) -> None:
    position = payload
    for entry in ordered:
        if entry.start != position:
            kind = "overlaps another" if entry.start < position else "leaves a hole before it"
            raise InputError(f"{path.name}: tensor {entry.name!r} {kind}", DAMAGED)
        position = entry.stop
    if position != size:
        raise InputError(f"{path.name}: file is {size} bytes, its tensors end at {position}", DAMAGED)
