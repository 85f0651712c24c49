"""GPTQ (arXiv 2210.17323): round column by column, pushing each error onto the columns still unrounded.

Columns are taken in order of decreasing Hessian diagonal ("act-order") with static groups: all scales
are fixed beforehand on the unpermuted weights, so the file keeps its plain layout.
"""

import torch
from torch import Tensor

from llmcompress.compress.grid import Codes, expand_scale, find_scale, round_to_grid, round_weight
from llmcompress.compress.rounding import Quantized
from llmcompress.types import LinearSpec, QuantizerOptions

NEEDS_HESSIAN = True
BLOCK_COLUMNS = 128
DAMP_RETRIES = 3


def quantize(
    weight: Tensor, hessian: Tensor | None, spec: LinearSpec, *, options: QuantizerOptions, dtype: torch.dtype
) -> Quantized:
    """Quantize one linear.

    weight   (rows, columns)     float32
    hessian  (columns, columns)  sum or mean of x x^T over calibration tokens; its scale does not matter
    dtype    of the stored scales

    A Hessian that is not finite, or stays singular after three tenfold increases of the damping, falls
    back to rounding; both are recorded.
    """
    if hessian is None or not bool(torch.isfinite(hessian).all()):
        scale = find_scale(weight, spec, dtype, clip=options.clip)
        return Quantized(round_weight(weight, scale, spec), ("calibration inputs are not finite: rounded instead",))
    diagonal = hessian.diagonal()
    importance = diagonal / diagonal.mean().clamp_min(1e-30)
    scale = find_scale(weight, spec, dtype, clip=options.clip, importance=importance.clamp_min(1e-6))
    factor, notes = inverse_factor(hessian, options)
    if factor is None:
        return Quantized(round_weight(weight, scale, spec), notes)
    order, upper = factor
    codes = round_columns(weight[:, order], expand_scale(scale, weight.shape[1])[:, order], upper, bits=spec.bits)
    restored = torch.empty_like(codes)
    restored[:, order] = codes
    return Quantized(Codes(restored, scale, spec), notes)


def inverse_factor(hessian: Tensor, options: QuantizerOptions) -> tuple[tuple[Tensor, Tensor] | None, tuple[str, ...]]:
    """Column order, and the upper Cholesky factor `U` of the damped inverse, `H^-1 = U^T U`, in that order.

    Returns None in place of both when the Hessian cannot be factorised, and the notes to record.
    """
    full = hessian.to(torch.float64)
    dead = full.diagonal() <= 0
    full = full + torch.diag(dead.to(full.dtype) * full.diagonal().mean().clamp_min(1e-30))
    descending = torch.argsort(full.diagonal(), descending=True, stable=True)
    order = descending if options.act_order else torch.arange(len(full), device=full.device)
    full = full[order][:, order]
    identity = torch.eye(len(full), dtype=full.dtype, device=full.device)
    damp = options.damp
    for attempt in range(DAMP_RETRIES + 1):
        lower, failed = torch.linalg.cholesky_ex(full + identity * (damp * full.diagonal().mean()))
        if not int(failed):
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        if not int(failed):
            notes = () if attempt == 0 else (f"singular Hessian: damping raised to {damp:g}",)
            return (order, upper.to(torch.float32)), notes
        damp *= 10
    return None, (f"Hessian still singular at damping {damp / 10:g}: rounded instead",)


def round_columns(weight: Tensor, scale: Tensor, upper: Tensor, *, bits: int) -> Tensor:
    """The feedback loop, blocked: columns of a block are updated at once, later blocks after each block.

    weight   (rows, columns)     in processing order
    scale    (rows, columns)     one per weight, in processing order
    upper    (columns, columns)  upper Cholesky factor of the inverse Hessian
    returns  (rows, columns)     uint8 codes, in processing order
    """
    left = weight.clone()
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    columns = weight.shape[1]
    half = 1 << (bits - 1)
    for start in range(0, columns, BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, columns)
        block = left[:, start:stop].clone()
        errors = torch.empty_like(block)
        factor = upper[start:stop, start:stop]
        for inside in range(stop - start):
            step = scale[:, start + inside]
            code = round_to_grid(block[:, inside], step, bits)
            codes[:, start + inside] = code.to(torch.uint8)
            error = (block[:, inside] - (code - half) * step) / factor[inside, inside]
            block[:, inside:] -= error[:, None] * factor[inside, inside:][None, :]
            errors[:, inside] = error
        left[:, stop:] -= errors @ upper[start:stop, stop:]
    return codes
