"""Lazy reads of one tensor at a time, by the name it has in the file, from a validated source."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, runtime_checkable

import numpy
import torch
from torch import Tensor, nn

from llmcompress.errors import InputError
from llmcompress.files import CHUNK_BYTES
from llmcompress.model.integrity import check_finite
from llmcompress.preflight.header import TensorEntry

TORCH_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "I64": torch.int64,
        "I32": torch.int32,
        "I16": torch.int16,
        "I8": torch.int8,
        "U8": torch.uint8,
        "F8_E4M3": torch.float8_e4m3fn,
        "BOOL": torch.bool,
    }
)
DTYPE_NAMES: Mapping[torch.dtype, str] = MappingProxyType({dtype: name for name, dtype in TORCH_DTYPES.items()})


class TensorReader(Protocol):
    """Where a model's tensors come from: a checkpoint, or a packed checkpoint seen dequantized."""

    def names(self) -> tuple[str, ...]: ...

    def read(self, name: str) -> Tensor: ...


@runtime_checkable
class RoundingReader(Protocol):
    """A reader of a checkpoint some of whose modules round what they read."""

    def prepare(self, model: nn.Module, module_of: Mapping[str, str]) -> None: ...

    def attach(self, weight: str, module: nn.Module) -> None: ...

    def detach(self, root: nn.Module) -> None: ...


def read_raw(entry: TensorEntry) -> bytes:
    """The bytes of one tensor as they stand in its shard. Raises InputError when the file changed underneath."""
    with entry.path.open("rb") as stream:
        stream.seek(entry.start)
        data = stream.read(entry.stop - entry.start)
    if len(data) != entry.stop - entry.start:
        raise InputError(f"{entry.path.name}: ends inside tensor {entry.name}", "the file changed while it was read")
    return data


def read_tensor(entry: TensorEntry) -> Tensor:
    """One tensor in the dtype and shape it has on disk. Raises InputError where it has NaN or infinity."""
    dtype = TORCH_DTYPES[entry.dtype]
    if entry.elements == 0:
        return torch.empty(entry.shape, dtype=dtype)
    buffer = numpy.fromfile(entry.path, dtype=numpy.uint8, count=entry.stop - entry.start, offset=entry.start)
    if len(buffer) != entry.stop - entry.start:
        raise InputError(f"{entry.path.name}: ends inside tensor {entry.name}", "the file changed while it was read")
    check_finite(entry, buffer)
    return torch.from_numpy(buffer).view(dtype).reshape(entry.shape)


def read_float(entry: TensorEntry) -> Tensor:
    """One tensor in float32, without ever holding the whole of it as it is on disk. Raises as `read_tensor` does."""
    dtype = TORCH_DTYPES[entry.dtype]
    if not dtype.is_floating_point or entry.elements == 0:
        return read_tensor(entry)
    found = torch.empty(entry.shape, dtype=torch.float32)
    flat, buffer = found.view(-1), numpy.empty(CHUNK_BYTES, dtype=numpy.uint8)
    with entry.path.open("rb") as stream:
        stream.seek(entry.start)
        for start in range(0, entry.stop - entry.start, CHUNK_BYTES):
            piece = buffer[: min(CHUNK_BYTES, entry.stop - entry.start - start)]
            if stream.readinto(piece.data) != len(piece):
                what = f"{entry.path.name}: ends inside tensor {entry.name}"
                raise InputError(what, "the file changed while it was read")
            check_finite(entry, piece, start)
            numbers = torch.from_numpy(piece).view(dtype)
            place = start // dtype.itemsize
            flat[place : place + len(numbers)].copy_(numbers)
    return found


class CheckpointReader:
    """Tensors of a plain checkpoint, straight from the validated shards."""

    def __init__(self, tensors: Mapping[str, TensorEntry]) -> None:
        self._tensors = tensors

    def names(self) -> tuple[str, ...]:
        return tuple(self._tensors)

    def read(self, name: str) -> Tensor:
        """One tensor as stored."""
        return read_tensor(self._tensors[name])

    def read_float(self, name: str) -> Tensor:
        """The same in float32."""
        return read_float(self._tensors[name])


def folder_bytes(folder: Path) -> int:
    """Total size of the regular files of a flat directory."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
