"""Codes as blocks of ggml: 32 integers and a float16 scale each, without loss where the integers fit.

    Q4_0  18 bytes: scale, then 16 bytes, byte j holding integer j + 8 in its lower and j + 16 in its upper half
    Q5_0  22 bytes: scale, 32 fifth bits of integer + 16, lowest first, then the lower four as in Q4_0
    Q8_0  34 bytes: scale, then 32 signed bytes

A weight is `integer * scale` in all three.
"""

import torch
from torch import Tensor

from llmcompress.kernels.codes import Codes
from llmcompress.spec import HIGH_BITS, ZERO_BITS

BLOCK = 32
HALVES = {"Q4_0": 8, "Q5_0": 16, "Q8_0": 128}  # integers from `-half` to `half - 1`, narrowest first


def integers_of(codes: Codes) -> tuple[Tensor, Tensor] | None:
    """A linear as integers, int16 `(rows, columns)`, times scales, float32 `(rows, groups)`.

    None where it is not: tables of values, float8, zero-points between codes, low-rank corrections. High columns are
    integers in quarters of a step.
    """
    spec, signed = codes.spec, codes.codes.to(torch.int16)
    if spec.kind not in ("int", "int8", "asymmetric") or spec.rank:
        return None
    scale = codes.scale.float()
    if codes.zero is not None:
        step = 1 << (ZERO_BITS - spec.bits)
        if bool((codes.zero % step).any()):
            return None
        zeros = (codes.zero // step).to(torch.int16)
        return signed - zeros.repeat_interleave(signed.shape[1] // zeros.shape[1], 1), scale
    middle = 1 << (spec.bits - 1)
    if codes.high is None:
        return signed - middle, scale
    finer = 1 << HIGH_BITS
    return torch.where(codes.high, signed - middle * finer, (signed - middle) * finer), scale / finer


def type_for(integers: Tensor, scale: Tensor) -> str | None:
    """The narrowest type that holds integers `(rows, columns)` with scales `(rows, groups)`, None where none does."""
    columns, groups = integers.shape[1], scale.shape[1]
    if columns % BLOCK or (columns // groups) % BLOCK:
        return None
    low, high = int(integers.min()), int(integers.max())
    return next((name for name, half in HALVES.items() if -half <= low and high < half), None)


def encode(integers: Tensor, scale: Tensor, kind: str) -> Tensor:
    """The bytes of a tensor, uint8 `(rows, bytes)`; `scale` is float16 `(rows, groups)`."""
    rows, columns = integers.shape
    blocks = columns // BLOCK
    wide = scale.repeat_interleave(blocks // scale.shape[1], 1).contiguous()
    heads = wide.view(torch.uint8).view(rows, blocks, 2)
    values = integers.view(rows, blocks, BLOCK)
    if kind == "Q8_0":
        return torch.cat([heads, values.to(torch.int8).view(torch.uint8)], 2).view(rows, -1)
    values = values + HALVES[kind]
    low = (values & 15).to(torch.uint8)
    nibbles = low[..., : BLOCK // 2] | (low[..., BLOCK // 2 :] << 4)
    if kind == "Q4_0":
        return torch.cat([heads, nibbles], 2).view(rows, -1)
    fifth = (values >> 4).view(rows, blocks, 4, 8) << torch.arange(8, dtype=torch.int16)
    return torch.cat([heads, fifth.sum(3).to(torch.uint8), nibbles], 2).view(rows, -1)
