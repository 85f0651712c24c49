"""Weights and inputs as 8-bit integers: few tokens in one kernel, many through the library's integer product."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from llmcompress.kernels.triton.jit import int8 as jit

FEW = 16  # tokens up to which the kernel multiplies; the library's product needs more
MULTIPLE = 8  # of rows and columns, for the library
ROWS, TOKENS, DEPTH = 64, 16, 128  # of one program
PROGRAMS_PER_PROCESSOR, MOST_PARTS, PROCESSORS_OF_CPU = 2, 16, 4


@dataclass(frozen=True)
class Weight:
    """codes int8 (rows, columns) around zero, scale (rows,); sums of codes int32 (rows,); counters int32 zeros."""

    codes: Tensor
    scale: Tensor
    sums: Tensor
    counters: Tensor


def weight_of(codes: Tensor, scale: Tensor) -> Weight:
    """A weight `codes * scale[:, None]`, ready to be multiplied: codes int8 `(rows, columns)`, any shape of scales."""
    tiles = triton.cdiv(len(codes), ROWS) * triton.cdiv(FEW, TOKENS)
    counters = torch.zeros(tiles, dtype=torch.int32, device=codes.device)
    return Weight(codes.contiguous(), scale.reshape(-1), codes.sum(1, dtype=torch.int32), counters)


def linear(x: Tensor, weight: Weight, scale: Tensor | None = None, zero: Tensor | None = None) -> Tensor:
    """Rounded inputs times the weight, without gradients; sums are exact.

    x        (M, columns)  any float
    scale    (1,)          of every input; None: of each token its own, its largest magnitude over 127.5
    zero     (1,) int8     the code of 0, with `scale`; None: 0
    returns  (M, rows)     in the dtype of `x`
    """
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        return _linear(x.detach().contiguous(), weight, scale, zero)


def _linear(x: Tensor, weight: Weight, scale: Tensor | None, zero: Tensor | None) -> Tensor:
    codes, scales = quantize(x, scale, zero)
    tokens, columns = codes.shape
    rows = len(weight.codes)
    out = torch.empty((tokens, rows), dtype=x.dtype, device=x.device)
    none = weight.counters
    operands = (scales, none if zero is None else zero, weight.scale, weight.sums, out)
    flags = {"STATIC": scale is not None, "ZERO": zero is not None}
    if tokens > FEW and rows % MULTIPLE == 0 and columns % MULTIPLE == 0:
        sums = torch._int_mm(codes, weight.codes.T)
        grid = (triton.cdiv(rows, 128), triton.cdiv(tokens, 8))
        jit.finish[grid](sums, *operands, tokens, rows, **flags, BN=128, BM=8)
        return out
    steps, tiles = triton.cdiv(columns, DEPTH), (triton.cdiv(rows, ROWS), triton.cdiv(tokens, TOKENS))
    split = 1 if tokens > FEW else _split(tiles[0], steps, x.device)
    partials = torch.empty((split, tokens, rows), dtype=torch.int32, device=x.device) if split > 1 else none
    jit.multiply[(tiles[0], split, tiles[1])](
        codes, weight.codes, *operands, partials, weight.counters, tokens, rows, columns,
        **flags, STEPS=steps, SPLIT=split, BN=ROWS, BM=TOKENS, BK=DEPTH, num_warps=4, num_stages=4,
    )  # fmt: skip
    return out


def quantize(x: Tensor, scale: Tensor | None, zero: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes int8 of `x` (M, columns), and their scale: the given one, or float32 (M,)."""
    tokens, columns = x.shape
    codes = torch.empty((tokens, columns), dtype=torch.int8, device=x.device)
    scales = torch.empty(tokens, dtype=torch.float32, device=x.device) if scale is None else scale
    block = min(triton.next_power_of_2(columns), 4096)
    flags = {"STATIC": scale is not None, "ZERO": zero is not None, "STEPS": triton.cdiv(columns, block)}
    jit.quantize[(tokens,)](x, scales, scales if zero is None else zero, codes, scales, columns, **flags, BK=block)
    return codes, scales


def _split(tiles: int, steps: int, device: torch.device) -> int:
    """Programs for each tile, so that the GPU is full."""
    found = (
        torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else PROCESSORS_OF_CPU
    )
    return int(max(min(PROGRAMS_PER_PROCESSOR * found // tiles, steps // 2, MOST_PARTS), 1))
