"""The C library of `kernels/native`, on CPU: codes are read where the file has them.

Results are exact to float32, or where inputs have 16 bits to 3e-5. `LLMCOMPRESS_CPU_LEVEL=avx2`, or another of
`LEVELS`, keeps it to simpler instructions than the processor has.
"""

import os
import struct
from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor

from llmcompress.errors import InputError, MachineError
from llmcompress.kernels import compiled, stored
from llmcompress.kernels.pages import in_huge_pages
from llmcompress.spec import FOUR_BIT, PER_ROW, WORD_BITS, LinearSpec

# the fields of `Job` in native/job.h, in their order: sizes, the weight, and what is of one call
SIZES, WEIGHT, CALL = struct.Struct("@3q"), struct.Struct("@16q"), struct.Struct("@6q")
FORMATS = {"int": 0, "asymmetric": 1, "nf4": 2, "fp4": 2, "codebook": 3}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
INPUTS = (torch.float32, torch.bfloat16, torch.float16)
OFFSET = ".offset"
MAP, ABSMAX, HIGHER = stored.NESTED_MAP, stored.NESTED_ABSMAX, stored.PACKED_HIGH
WORD_BYTES = WORD_BITS // 8
BEST = -1
LEVELS = {"scalar": 0, "avx2": 1, "avx2_vnni": 2, "avx512": 3, "vnni": 4, "best": BEST}

VARIABLE = "LLMCOMPRESS_CPU_LEVEL"


@cache
def _most() -> int:
    """The level that the user leaves it, asked once. Raises InputError for one that there is not."""
    name = os.environ.get(VARIABLE, "best")
    if name not in LEVELS:
        raise InputError(f"{VARIABLE} is {name}", f"choose one of: {', '.join(LEVELS)}")
    return LEVELS[name]


def why_not(spec: LinearSpec, rows: int, columns: int, *, tokens: int, dtype: torch.dtype, device: str) -> str | None:
    """Why it cannot do a case, or None."""
    if str(device).partition(":")[0] != "cpu":
        return f"it is for CPU, not {device}"
    if dtype not in INPUTS:
        return f"inputs are {dtype}"
    if spec.kind in PER_ROW:
        return "one byte a weight is torch's business"
    if spec.kind in FOUR_BIT and (columns % 2 or columns % spec.group_size):
        return f"rows of {columns} weights are not whole blocks of {spec.group_size}"
    return compiled.library()[1] or None


def prepare(tensors: Mapping[str, Tensor], spec: LinearSpec) -> dict[str, Tensor]:
    """The tensors of the file, and what the record of a doubly quantized one says."""
    found = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if spec.double:
        found[OFFSET] = stored.nested_offset(spec.kind, tensors)
    for tensor in found.values():
        in_huge_pages(tensor)
    return found


def linear(
    x: Tensor, prepared: Mapping[str, Tensor], spec: LinearSpec, rows: int, columns: int, *, level: int = BEST
) -> Tensor:
    """Inputs `(..., columns)` times the weight, `(..., rows)`; `level` keeps to simpler instructions."""
    return _call(x, _weight(prepared, spec, columns), rows, columns, level=level)


def bind(
    prepared: Mapping[str, Tensor], spec: LinearSpec, rows: int, columns: int
) -> Callable[[Tensor], Tensor | None]:
    """The same for one weight, described once for as long as its tensors stay where they are."""
    tensors = tuple(prepared.values())
    known: tuple[list[int], bytes] = ([], b"")  # places and what describes them: replaced as one, for other threads

    def call(x: Tensor) -> Tensor | None:
        nonlocal known
        if x.dtype not in INPUTS or not x.is_cpu:
            return None
        now = [tensor.data_ptr() for tensor in tensors]
        places, fields = known
        if now != places:
            fields = _weight(prepared, spec, columns)
            known = (now, fields)
        return _call(x, fields, rows, columns, level=BEST)

    return call


def _call(x: Tensor, weight: bytes, rows: int, columns: int, *, level: int) -> Tensor:
    library, why = compiled.library()
    if library is None:
        raise MachineError(f"no native kernels: {why}", "use another backend")
    if level == BEST:
        level = _most()
    x = x.contiguous()
    out = torch.empty((*x.shape[:-1], rows), dtype=x.dtype)
    call = CALL.pack(x.data_ptr(), out.data_ptr(), DTYPES[x.dtype], torch.get_num_threads(), level, compiled.team())
    if library.llmcompress_linear(SIZES.pack(rows, columns, x.numel() // columns) + weight + call):
        raise MachineError("out of memory", "give fewer tokens at a time")
    return out


def _weight(prepared: Mapping[str, Tensor], spec: LinearSpec, columns: int) -> bytes:
    """The fields of a job from `format` to `high_stride`."""
    scale, zero, table, high = (prepared.get(name) for name in (stored.SCALE, stored.ZERO, stored.CODEBOOK, HIGHER))
    nested = (0, 0, 0)
    if spec.kind in FOUR_BIT:
        scale = prepared[stored.ABSMAX]
        codes, stride, table = prepared[stored.WEIGHT], columns // 2, prepared[stored.MAP]
        if spec.double:
            nested = (prepared[MAP].data_ptr(), prepared[ABSMAX].data_ptr(), prepared[OFFSET].data_ptr())
    else:
        codes = prepared[stored.PACKED]
        stride = codes.shape[1] * WORD_BYTES
    return WEIGHT.pack(
        FORMATS[spec.kind], spec.bits, spec.group_size, columns // (spec.group_size or columns), stride,
        codes.data_ptr(), 0 if scale is None else scale.data_ptr(), 0 if scale is None else DTYPES[scale.dtype],
        0 if zero is None else zero.data_ptr(), 0 if table is None else table.data_ptr(), *nested,
        0 if high is None else prepared[stored.HIGH].data_ptr(), 0 if high is None else high.data_ptr(),
        0 if high is None else high.shape[1] * WORD_BYTES,
    )  # fmt: skip
