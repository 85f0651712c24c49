"""Half-quadratic search for zero-points, robust to outliers (HQQ). Needs no data.

Scales span the smallest and largest weight of a group; the zero-point then moves so that `sum |w - w'|**0.7` falls,
by alternating between setting large errors aside and averaging the rest. Errors are measured in steps of the grid,
so the unit of the weights does not matter, and a zero-point counts as it is stored: in 8 bits. The output is in
llmcompress's own layout.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmcompress.compress.grid import SHIFT_ROWS, Codes, group_size_for, stored_scale
from llmcompress.compress.rounding import Quantized, Request, Seen
from llmcompress.spec import ZERO_BITS
from llmcompress.types import LinearSpec, QuantizerOptions

NEEDS_HESSIAN = False
POWER = 0.7
BETA, GROWTH, STEPS = 10.0, 1.01, 20


def formats(bits: int, columns: int, *, group_size: int, options: QuantizerOptions) -> LinearSpec | None:
    """Integers with a zero-point for each group."""
    size = group_size_for(columns, group_size)
    return None if size is None else LinearSpec(bits=bits, group_size=size, kind="asymmetric")


def quantize(
    requests: Sequence[Request], seen: Seen | None, *, options: QuantizerOptions, dtype: torch.dtype
) -> list[Quantized]:
    """Quantize linears one by one; `seen` and `options` are not used. `dtype` is that of the stored scales."""
    return [Quantized(zero_codes(r.weight, r.spec, dtype)) for r in requests]


def zero_codes(weight: Tensor, spec: LinearSpec, dtype: torch.dtype) -> Codes:
    """Codes, scales and zero-points of a weight `(rows, columns)`."""
    rows, columns = weight.shape
    step = max(SHIFT_ROWS // columns, 1)
    parts = [_rows(part.view(len(part), -1, spec.group_size), spec.bits, dtype) for part in torch.split(weight, step)]
    codes, scale, zero = (torch.cat(found) for found in zip(*parts, strict=True))
    return Codes(codes.view(rows, columns), scale, spec, zero=zero)


def _rows(groups: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    largest = (1 << bits) - 1
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = stored_scale((high - low) / largest, dtype)
    wide = scale.to(groups.dtype)[..., None]
    steps = groups / wide  # every weight in steps of its grid
    zero = _stored(-low / wide[..., 0], bits)
    best, lowest = zero, _loss(steps, zero, bits)
    beta = BETA
    for _ in range(STEPS):
        codes = _codes(steps, zero, bits)
        error = steps - (codes - zero[..., None])
        aside = error.sign() * (error.abs() - error.abs().clamp_min(1e-8).pow(POWER - 1) / beta).clamp_min(0)
        zero = _stored((codes - (steps - aside)).mean(-1), bits)
        loss = _loss(steps, zero, bits)
        best, lowest = torch.where(loss < lowest, zero, best), torch.minimum(loss, lowest)
        beta *= GROWTH
    codes = _codes(steps, best, bits).to(torch.uint8)
    return codes.flatten(1), scale, (best * (1 << (ZERO_BITS - bits))).to(torch.uint8)


def _stored(zero: Tensor, bits: int) -> Tensor:
    """The nearest zero-point that 8 bits can say."""
    parts = 1 << (ZERO_BITS - bits)
    return (zero * parts).round().clamp(0, (1 << ZERO_BITS) - 1) / parts


def _codes(steps: Tensor, zero: Tensor, bits: int) -> Tensor:
    return (steps + zero[..., None]).round().clamp(0, (1 << bits) - 1)


def _loss(steps: Tensor, zero: Tensor, bits: int) -> Tensor:
    """`sum |error|**0.7` of each group, in steps of its grid."""
    return (steps - (_codes(steps, zero, bits) - zero[..., None])).abs().pow(POWER).sum(-1)
