"""One pass over the weights: a sha256 per shard, and a search for NaN and infinity."""

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy
from numpy.typing import NDArray

from llmcompress.errors import InputError
from llmcompress.files import ALLOW_NONFINITE, CHUNK_BYTES, allowed
from llmcompress.preflight import SourceFiles
from llmcompress.preflight.header import DTYPE_BYTES, TensorEntry

# Little-endian integer view of each float, and the bits that are all set in NaN and infinity: those of the exponent,
# and for float8 all but the sign.
EXPONENTS: Mapping[str, tuple[str, int]] = MappingProxyType(
    {
        "F64": ("<u8", 0x7FF0_0000_0000_0000),
        "F32": ("<u4", 0x7F80_0000),
        "F16": ("<u2", 0x7C00),
        "BF16": ("<u2", 0x7F80),
        "F8_E4M3": ("<u1", 0x7F),
    }
)


SMALL_BYTES = 256 << 20  # a quarter of a second


@dataclass(frozen=True)
class FileDigest:
    """Name, size and sha256 of one shard."""

    name: str
    size_bytes: int
    sha256: str


def scan(files: SourceFiles) -> tuple[FileDigest, ...]:
    """Digest every shard. Raises InputError naming the file, tensor and index of the first NaN or infinity.

    As many shards at a time as torch has threads.
    """
    import torch  # lazy: small models are scanned by this module before it is imported

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return tuple(pool.map(partial(_scan_shard, files), files.shards))


def _scan_shard(files: SourceFiles, name: str) -> FileDigest:
    path = files.folder / name
    entries = sorted((e for e in files.tensors.values() if e.path == path), key=lambda e: e.start)
    state = hashlib.sha256()
    position = 0
    with path.open("rb") as stream:
        for entry in entries:
            while position < entry.start:
                piece = stream.read(min(CHUNK_BYTES, entry.start - position))
                if not piece:
                    break
                state.update(piece)
                position += len(piece)
            while position < entry.stop:
                piece = stream.read(min(CHUNK_BYTES, entry.stop - position))
                if not piece:
                    raise InputError(f"{name}: ends inside tensor {entry.name!r}", "the file changed while it was read")
                state.update(piece)
                check_finite(entry, numpy.frombuffer(piece, dtype=numpy.uint8), position - entry.start)
                position += len(piece)
        while piece := stream.read(CHUNK_BYTES):
            state.update(piece)
            position += len(piece)
    return FileDigest(name, position, state.hexdigest())


def check_finite(entry: TensorEntry, data: NDArray[numpy.uint8], offset: int = 0) -> None:
    """Raises InputError naming the first NaN or infinity among bytes of a tensor, uint8 `(bytes,)` from `offset` on.

    Users may allow them (`--allow-nonfinite`).
    """
    place = None if allowed(ALLOW_NONFINITE) else _first_bad(entry, data)
    if place is not None:
        place += offset // DTYPE_BYTES[entry.dtype]
        raise InputError(
            f"{entry.path.name}: tensor {entry.name!r} has NaN or infinity at index {place}",
            "the weights are damaged; download the model again",
        )


def _first_bad(entry: TensorEntry, data: NDArray[numpy.uint8]) -> int | None:
    """The place of the first NaN or infinity among bytes of a tensor."""
    if entry.dtype not in EXPONENTS:
        return None
    view, mask = EXPONENTS[entry.dtype]
    for start in range(0, len(data), CHUNK_BYTES):  # a multiple of every float's size, so that no value is cut
        bad = (data[start : start + CHUNK_BYTES].view(view) & mask) == mask
        if bad.any():
            return start // DTYPE_BYTES[entry.dtype] + int(bad.argmax())
    return None


def scan_small(files: SourceFiles) -> None:
    """The search alone, where the weights are few enough to be read once more later. Raises InputError as `scan`."""
    if sum(entry.stop - entry.start for entry in files.tensors.values()) <= SMALL_BYTES:
        for entry in files.tensors.values():
            check_finite(entry, _bytes_of(entry))


def nonfinite(files: SourceFiles) -> tuple[str, ...]:
    """Names of tensors with NaN or infinity, in the order of the file; empty where they are not allowed.

    Where they are not, `scan` refuses them, and this reads nothing.
    """
    if not allowed(ALLOW_NONFINITE):
        return ()
    return tuple(name for name, entry in files.tensors.items() if _first_bad(entry, _bytes_of(entry)) is not None)


def _bytes_of(entry: TensorEntry) -> NDArray[numpy.uint8]:
    """The bytes of a tensor, mapped."""
    if entry.stop == entry.start:
        return numpy.empty(0, numpy.uint8)
    return numpy.memmap(entry.path, numpy.uint8, "r", entry.start, (entry.stop - entry.start,))


def digest_source(digests: tuple[FileDigest, ...], config: Mapping[str, Any]) -> str:
    """One sha256 for a model: its shards' names, sizes and digests, and its config."""
    files = [[d.name, d.size_bytes, d.sha256] for d in digests]
    text = json.dumps([files, dict(config)], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
