"""Scales from weights, and rounding onto them: the base quantizer every method shares.

Symmetric full range (methods of AutoRound and llama.cpp): `scale = +-absmax / 2**(bits - 1)` with
the sign chosen so that the largest weight lands on the most negative code, which uses the one code
plain symmetric quantization wastes.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from llmcompress.kernels import fourbit, native_grid
from llmcompress.kernels.codes import Codes as Codes
from llmcompress.model.products import linear
from llmcompress.spec import HIGH_BITS
from llmcompress.types import LinearSpec

CLIPS = tuple(1.0 - 0.02 * step for step in range(26))
# group size -> squared error of standard normal weights at 2, 3, ... 8 bits, with the clip search; a test measures it
GAUSSIAN_DISTORTION = {
    32: (0.112, 0.0268, 0.00678, 0.00172, 0.00044, 0.000113, 0.0000282),
    64: (0.126, 0.0313, 0.00816, 0.0021, 0.000538, 0.000139, 0.0000347),
    128: (0.136, 0.0348, 0.00937, 0.00247, 0.000637, 0.000164, 0.0000412),
    256: (0.142, 0.0372, 0.0103, 0.0028, 0.000733, 0.000189, 0.0000478),
}
ASYMMETRIC_DISTORTION = {  # the same with zero-points and scales that span each group
    32: (0.139, 0.0261, 0.00593, 0.00143, 0.00035, 0.0000884, 0.0000234),
    64: (0.189, 0.0355, 0.00798, 0.00188, 0.000456, 0.000114, 0.0000293),
    128: (0.24, 0.045, 0.00994, 0.00233, 0.000565, 0.00014, 0.0000353),
    256: (0.292, 0.0543, 0.0119, 0.00278, 0.000673, 0.000166, 0.0000415),
}
TABLE_DISTORTION = {"nf4": 0.00843, "fp4": 0.01483, "fp8": 0.00068}
LLOYD_MAX_DISTORTION = (0.1175, 0.03455, 0.0095, 0.0025, 0.00064, 0.000163, 0.0000412)  # at 2, 3, ... 8 bits
TABLE_BLOCK = 64  # weights that share a scale in the layout of bitsandbytes
LANES = 16  # running sums side by side in a search for scales
SHIFT_ROWS = 1 << 22  # a search for scales works on chunks of about this many weights
CACHED_WEIGHTS = 1 << 18  # on the CPU of so many, which stay in a core's own cache


def round_to_grid(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Nearest codes, as floats in `[0, 2**bits)`; `scale` broadcasts against `weight`."""
    half = 1 << (bits - 1)
    return torch.clamp(torch.round(weight / scale) + half, 0, 2 * half - 1)


def stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round scales to the dtype they are stored in; a group of zeros gets 1, no scale becomes 0 or infinite."""
    limits = torch.finfo(dtype)
    rounded = scale.clamp(-limits.max, limits.max).to(dtype)
    lost = rounded == 0
    tiny = torch.full_like(rounded, limits.tiny)
    return torch.where(lost, torch.where(scale == 0, torch.ones_like(rounded), tiny), rounded)


def full_range_scale(groups: Tensor, bits: int) -> Tensor:
    """Scale of each group `(..., group size)` that puts its largest weight on code `-2**(bits - 1)`."""
    place = groups.abs().argmax(dim=-1, keepdim=True)
    largest = groups.gather(-1, place).squeeze(-1)
    return -largest / (1 << (bits - 1))


def shrinks(clip: bool) -> tuple[float, ...]:
    """The ranges that a search for scales tries, or only the whole one."""
    return CLIPS if clip else CLIPS[:1]


def find_scale(
    weight: Tensor, spec: LinearSpec, dtype: torch.dtype, *, clip: bool = True, importance: Tensor | None = None
) -> Tensor:
    """Scale of every group, already rounded to `dtype`.

    weight      (rows, columns)  float32
    importance  (columns,)       weight of each column's squared error in the clip search; None is uniform
    returns     (rows, columns / group size)

    With `clip` the range is shrunk over `CLIPS` and the shrink of least squared error kept, group by group.
    Shrinks that lose the same to the last bit: the larger range stays. The C library does the same sums (`lane_sum`).
    """
    clips = shrinks(clip)
    if importance is not None:
        importance = importance.to(weight.dtype)
    wanted = native_grid.Wanted(spec.bits, spec.group_size, dtype, clips)
    found = native_grid.find_steps(weight, wanted, importance)
    return find_scale_plainly(weight, spec, dtype, clips=clips, importance=importance) if found is None else found


def find_scale_plainly(
    weight: Tensor, spec: LinearSpec, dtype: torch.dtype, *, clips: Sequence[float], importance: Tensor | None
) -> Tensor:
    """`find_scale` in torch, for any device: what the C library is held against."""
    rows, columns = weight.shape
    size = spec.group_size
    step = _rows_at_once(weight)
    weights = None if importance is None else importance.view(1, columns // size, size)
    parts = []
    for start in range(0, rows, step):
        groups = weight[start : start + step].view(-1, columns // size, size)
        parts.append(_search(groups, spec.bits, dtype, clips=clips, importance=weights))
    return torch.cat(parts)


def _rows_at_once(weight: Tensor) -> int:
    return max((CACHED_WEIGHTS if weight.device.type == "cpu" else SHIFT_ROWS) // weight.shape[1], 1)


def lane_sum(values: Tensor) -> Tensor:
    """Sum over the last dimension in an order that does not depend on who adds.

    Value `i` goes to lane `i % 16`, each lane adds one after the other, then halves of the lanes are added up.
    """
    short = -values.shape[-1] % LANES
    padded = torch.nn.functional.pad(values, (0, short)) if short else values
    first, *others = padded.reshape(*padded.shape[:-1], -1, LANES).unbind(-2)
    total: Tensor = first.clone()
    for other in others:
        total += other
    width = LANES
    while width > 1:
        width //= 2
        total = total[..., :width] + total[..., width:]
    return total[..., 0]


def _search(
    groups: Tensor, bits: int, dtype: torch.dtype, *, clips: Sequence[float], importance: Tensor | None
) -> Tensor:
    full = full_range_scale(groups, bits)
    best = stored_scale(full, dtype)
    if len(clips) == 1:
        return best
    lowest = torch.full_like(full, torch.inf)
    half = 1 << (bits - 1)
    error = torch.empty_like(groups, memory_format=torch.contiguous_format)
    for shrink in clips:
        scale = stored_scale(full * shrink, dtype)
        wide = scale.to(groups.dtype)[..., None]
        torch.mul(groups, wide.reciprocal(), out=error).round_().clamp_(-half, half - 1)
        error.mul_(wide).sub_(groups).square_()
        loss = lane_sum(error if importance is None else error.mul_(importance))
        better = loss < lowest
        best = torch.where(better, scale, best)
        lowest = torch.where(better, loss, lowest)
    return best


def expand_scale(scale: Tensor, columns: int) -> Tensor:
    """One float32 scale per weight, `(rows, columns)`."""
    return scale.to(torch.float32).repeat_interleave(columns // scale.shape[1], dim=1)


def round_weight(weight: Tensor, scale: Tensor, spec: LinearSpec) -> Codes:
    """Round every weight to its nearest code, with scales as stored."""
    codes = native_grid.nearest_codes(weight, scale, spec.bits)
    return Codes(round_plainly(weight, scale, spec.bits) if codes is None else codes, scale, spec)


def round_plainly(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The codes of `round_weight` in torch, for any device."""
    columns = weight.shape[1]
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    step = _rows_at_once(weight)
    for start in range(0, len(weight), step):
        part = slice(start, start + step)
        codes[part] = round_to_grid(weight[part], expand_scale(scale[part], columns), bits).to(torch.uint8)
    return codes


def squared_errors(weight: Tensor, codes: Codes) -> tuple[float, float]:
    """Squared error of `codes` against the weight `(rows, columns)` they were to be, and the square of the weight."""
    plain = codes.spec.kind in ("int", "int8") and codes.high is None and codes.correction() is None
    sums = native_grid.squared_errors(weight, codes.codes, codes.scale, codes.spec.bits) if plain else None
    if sums is None:
        return float(codes.dequantize().sub_(weight).square_().sum()), float(weight.square().sum())
    error, whole = sums.sum(0).tolist()
    return error, whole


def table_format(kind: Literal["nf4", "fp4"], bits: int, columns: int, *, double: bool) -> LinearSpec | None:
    """The one format of a 4-bit table. Rows are whole blocks: other readers misread what runs over the end of a row."""
    if bits != 4 or columns % TABLE_BLOCK:
        return None
    return LinearSpec(bits=4, group_size=TABLE_BLOCK, kind=kind, double=double)


def table_codes(weight: Tensor, spec: LinearSpec) -> Codes:
    """The nearest values of the `nf4` or `fp4` table for a weight `(rows, columns)`."""
    codes, absmax = fourbit.quantize_blocks(weight, spec.kind, spec.group_size)
    if not spec.double:
        return Codes(codes, absmax, spec)
    double = fourbit.double_quantize(absmax)
    return Codes(codes, double.decode(), spec, double=double)


def proxy_loss(weight: Tensor, dequantized: Tensor, hessian: Tensor) -> float:
    """`tr(dW H dW^T)`: squared output error summed over outputs, in the units of `hessian`."""
    error = (dequantized - weight).to(hessian.dtype)
    return float(linear(error, hessian).mul_(error).sum())


def gaussian_distortion(spec: LinearSpec) -> float:
    """Relative squared error of Gaussian weights in a format; other group sizes count as the nearest in the table."""
    if spec.kind in TABLE_DISTORTION:
        return TABLE_DISTORTION[spec.kind]
    if spec.kind == "codebook":
        return LLOYD_MAX_DISTORTION[spec.bits - 2]
    tables = ASYMMETRIC_DISTORTION if spec.kind == "asymmetric" else GAUSSIAN_DISTORTION
    table = tables[min(tables, key=lambda size: abs(math.log(size / spec.group_size)))]
    high = spec.high_share and spec.high_share * table[spec.bits - 2 + HIGH_BITS]
    return (1 - spec.high_share) * table[spec.bits - 2] + high


def group_size_for(columns: int, wanted: int) -> int | None:
    """The wanted group size, or the next smaller of 128, 64, 32 that divides `columns`; None if none does."""
    sizes = [wanted, *(size for size in (128, 64, 32) if size < wanted)]
    return next((size for size in sizes if columns % size == 0), None)
