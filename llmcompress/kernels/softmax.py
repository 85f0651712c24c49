"""Attention weights on a logarithmic grid of half octaves, computed with whole octaves (RepQuant, arXiv 2402.05628).

A code `q` stands for `scale * 2**(-q/2)`. The same number is `scale * sqrt(2)**(q odd) * 2**-ceil(q/2)`, so multiplying
by it is a shift; but the factor `sqrt(2)` belongs to single elements, so a product with the values needs two
accumulators, one over even and one over odd codes, combined once at the end.
"""

import math

import torch
from torch import Tensor

QUANTILES = (0.999, 0.9999, 0.99999)


def zero_code(bits: int) -> int:
    """The code of an attention weight too small for the grid, which counts as 0; one above the largest of the grid."""
    return 1 << bits


def log_codes(attention: Tensor, scale: float, bits: int) -> Tensor:
    """`round(-2 log2(a / scale))`, int64 in `[0, 2**bits]`; weights above the scale get 0, tiny ones `zero_code`.

    attention  any shape, in [0, 1]
    """
    codes = torch.round(-2 * torch.log2(attention.double() / scale))
    return codes.clamp(0, zero_code(bits)).long()


def log_values(codes: Tensor, scale: float, bits: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """What codes stand for."""
    values = scale * torch.pow(2.0, -codes.to(dtype) / 2)
    return torch.where(codes == zero_code(bits), torch.zeros_like(values), values)


def octave_values(codes: Tensor, scale: float, bits: int) -> Tensor:
    """The same numbers from whole octaves and a scale that depends on parity, float64."""
    odd = (codes % 2).double()
    values = scale * (1 + (math.sqrt(2) - 1) * odd) * torch.pow(2.0, -((codes + 1) // 2).double())
    return torch.where(codes == zero_code(bits), torch.zeros_like(values), values)


def accumulate(codes: Tensor, values: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Products of attention codes with whole-number values, by shifts, summed apart over even and over odd codes.

    codes    (..., queries, keys)   int64
    values   (..., keys, channels)  int64
    returns  two of (..., queries, channels), int64, in units of `2**-ceil((2**bits - 1) / 2)`
    """
    top = zero_code(bits) // 2
    shift = torch.ones_like(codes) << (top - (codes.clamp_max(zero_code(bits) - 1) + 1) // 2)
    shift = torch.where(codes == zero_code(bits), torch.zeros_like(shift), shift)
    even = codes % 2 == 0
    return torch.where(even, shift, 0) @ values, torch.where(even, 0, shift) @ values


def combine(even: Tensor, odd: Tensor, scale: float, bits: int) -> Tensor:
    """`scale (S_even + sqrt(2) S_odd)` in float64, from the two sums of `accumulate`."""
    return scale * (even.double() + math.sqrt(2) * odd.double()) * 2.0 ** -(zero_code(bits) // 2)


def choose_scale(attention: Tensor, bits: int) -> float:
    """Among a few high quantiles of the attention weights, the scale of least squared error.

    Weights that are exactly 0, as masked ones are, do not count.
    """
    seen = attention[attention > 0].double().flatten().sort().values
    if not len(seen):
        return 1.0
    scales = [float(seen[min(int(quantile * len(seen)), len(seen) - 1)]) for quantile in QUANTILES]
    errors = [float((log_values(log_codes(seen, scale, bits), scale, bits) - seen).square().sum()) for scale in scales]
    return scales[min(range(len(scales)), key=errors.__getitem__)]
