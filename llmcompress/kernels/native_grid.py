"""Scales, codes and weights of symmetric integers by the C library, and codes in words; each has torch's own bits.

Everything here gives None where it is not for the library (another device or dtype, no compiler, a weight that is not
a number), and whoever asks does it in torch. Work is shared among as many threads as torch has; results do not depend
on their number.
"""

import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llmcompress.kernels import compiled

JOB = struct.Struct("@19q2d")  # the fields of `Grid` in native/grid.c, in their order
STEPS, CODES, WEIGHTS, ERRORS, PACK, UNPACK, MOMENTS, BEYOND = range(8)
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
WORD_BYTES = 4
BEST = -1
LEVELS = {"plain": 0, "avx2": 1, "avx512": 3, "best": BEST}


class Wanted(NamedTuple):
    """The grid that scales are looked for: its codes, its groups, the dtype of its scales and the ranges to try."""

    bits: int
    group_size: int
    dtype: torch.dtype
    shrinks: Sequence[float]


def find_steps(weight: Tensor, wanted: Wanted, importance: Tensor | None = None, *, level: int = BEST) -> Tensor | None:
    """The stored scale of every group `(rows, columns / group size)` that loses least of those that are tried.

    weight      (rows, columns)  float32
    importance  (columns,)       float32, none negative
    """
    if not _fits(weight, torch.float32) or wanted.dtype not in DTYPES or weight.shape[1] % wanted.group_size:
        return None
    weight, shrink = weight.contiguous(), torch.tensor(wanted.shrinks, dtype=torch.float32)
    importance = torch.ones(weight.shape[1]) if importance is None else importance.contiguous()
    scale = torch.empty((len(weight), weight.shape[1] // wanted.group_size), dtype=wanted.dtype)
    given = {"weight": weight, "importance": importance, "shrink": shrink, "scale": scale}
    return scale if _run(STEPS, weight.shape, wanted.bits, given, level=level) else None


def nearest_codes(weight: Tensor, scale: Tensor, bits: int, *, level: int = BEST) -> Tensor | None:
    """Codes uint8 `(rows, columns)` nearest to weights, with scales `(rows, groups)` as stored."""
    if not _fits(weight, torch.float32) or scale.dtype not in DTYPES:
        return None
    weight, scale, codes = weight.contiguous(), scale.contiguous(), torch.empty(weight.shape, dtype=torch.uint8)
    given = {"weight": weight, "scale": scale, "codes": codes}
    return codes if _run(CODES, weight.shape, bits, given, level=level) else None


def weights_of(codes: Tensor, scale: Tensor, bits: int, *, level: int = BEST) -> Tensor | None:
    """Weights float32 `(rows, columns)` of symmetric codes."""
    if not _fits(codes, torch.uint8) or scale.dtype not in DTYPES:
        return None
    codes, scale, restored = codes.contiguous(), scale.contiguous(), torch.empty(codes.shape, dtype=torch.float32)
    given = {"codes": codes, "scale": scale, "restored": restored}
    return restored if _run(WEIGHTS, codes.shape, bits, given, level=level) else None


def squared_errors(weight: Tensor, codes: Tensor, scale: Tensor, bits: int, *, level: int = BEST) -> Tensor | None:
    """Of each row the squared error of its codes and the square of its weights, float64 `(rows, 2)`."""
    if not _fits(weight, torch.float32) or not _fits(codes, torch.uint8) or scale.dtype not in DTYPES:
        return None
    weight, codes, scale = weight.contiguous(), codes.contiguous(), scale.contiguous()
    sums = torch.empty((len(weight), 2), dtype=torch.float64)
    given = {"weight": weight, "codes": codes, "scale": scale, "sums": sums}
    return sums if _run(ERRORS, weight.shape, bits, given, level=level) else None


def pack(codes: Tensor, bits: int, *, level: int = BEST) -> Tensor | None:
    """Codes `(rows, columns)`, each below `2**bits`, in int32 words `(rows, words)`, as `reference.pack`."""
    if not _fits(codes, torch.uint8):
        return None
    codes = codes.contiguous()
    packed = torch.empty((len(codes), -(-codes.shape[1] * bits // (8 * WORD_BYTES))), dtype=torch.int32)
    return packed if _run(PACK, codes.shape, bits, {"codes": codes, "packed": packed}, level=level) else None


def unpack(packed: Tensor, bits: int, columns: int, *, level: int = BEST) -> Tensor | None:
    """Inverse of `pack`: codes uint8 `(rows, columns)`."""
    if not _fits(packed, torch.int32) or packed.shape[1] * 8 * WORD_BYTES < columns * bits:
        return None
    packed, codes = packed.contiguous(), torch.empty((len(packed), columns), dtype=torch.uint8)
    return codes if _run(UNPACK, codes.shape, bits, {"codes": codes, "packed": packed}, level=level) else None


def moments(weight: Tensor, *, level: int = BEST) -> Tensor | None:
    """Of each row the mean and the sum of squares about it, float64 `(rows, 2)`; for rows that lie as they are."""
    return _summed(MOMENTS, weight, level, (0.0, 0.0))


def beyond(weight: Tensor, mean: float, deviation: float, *, level: int = BEST) -> Tensor | None:
    """Of each row how many weights are more than `deviation` above and below `mean`, float64 `(rows, 2)`."""
    return _summed(BEYOND, weight, level, (mean, deviation))


def _summed(task: int, weight: Tensor, level: int, around: tuple[float, float]) -> Tensor | None:
    if weight.ndim != 2 or not _fits(weight, torch.float32) or not weight.is_contiguous():
        return None
    sums = torch.empty((len(weight), 2), dtype=torch.float64)
    given = {"weight": weight, "sums": sums}
    return sums if _run(task, weight.shape, 1, given, level=level, around=around) else None


def _fits(tensor: Tensor, dtype: torch.dtype) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == dtype and tensor.numel() > 0


def _run(
    task: int,
    shape: torch.Size,
    bits: int,
    given: Mapping[str, Tensor],
    *,
    level: int,
    around: tuple[float, float] = (0.0, 0.0),
) -> bool:
    """Whether a task was done; tensors, contiguous, by their field in the job; `around` is mean and deviation."""
    library, _ = compiled.library()
    scale, packed, shrink = given.get("scale"), given.get("packed"), given.get("shrink")
    if (
        library is None
        or not 1 <= bits <= 8
        or (scale is not None and (not scale.numel() or shape[1] % scale.shape[1]))
    ):
        return False
    at = {name: tensor.data_ptr() for name, tensor in given.items()}
    job = JOB.pack(
        task, shape[0], shape[1], shape[1] if scale is None else shape[1] // scale.shape[1], bits,
        at.get("weight", 0), at.get("importance", 0), at.get("shrink", 0), 0 if shrink is None else len(shrink),
        at.get("scale", 0), 0 if scale is None else DTYPES[scale.dtype],
        at.get("codes", 0), at.get("restored", 0), at.get("sums", 0), at.get("packed", 0),
        0 if packed is None else packed.shape[1] * WORD_BYTES,
        torch.get_num_threads(), level, compiled.team(), *around,
    )  # fmt: skip
    return not library.llmcompress_grid(job)
