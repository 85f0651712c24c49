"""Products of many tokens, or of codes with no planar order: a library multiplies strips of unpacked rows.

A strip is small enough to stay in the cache between the two. Weights are rounded to the dtype of the input.
"""

from collections.abc import Mapping

import torch
import triton
from torch import Tensor

from llmcompress.kernels.nvrtc import small as nvrtc
from llmcompress.kernels.triton.jit.dequantize import dequantize_dense, dequantize_planar
from llmcompress.kernels.triton.layout import Packing

STRIP_BYTES = 1 << 24
ROWS, COLUMNS, WARPS = 16, 256, 4  # of one program


def multiply(x: Tensor, prepared: Mapping[str, Tensor], packing: Packing, rows: int, strip: int = 0) -> Tensor:
    """`x` (M, columns) times the transposed weight, (M, rows), `strip` rows at a time (0: as many as suit a cache)."""
    step = strip or max(STRIP_BYTES // (packing.columns * x.element_size()) // ROWS * ROWS, ROWS)
    out = torch.empty((len(x), rows), dtype=x.dtype, device=x.device)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        weights = dequantize(prepared, packing, (first, last), x.dtype)
        torch.matmul(x, weights.T, out=out[:, first:last]) if first or last < rows else torch.matmul(
            x, weights.T, out=out
        )
    return out


def dequantize(prepared: Mapping[str, Tensor], packing: Packing, span: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Rows `span[0] ... span[1] - 1` of the weight, `(rows, columns)`."""
    if nvrtc.fits(packing, dtype, prepared["words"].device):
        return nvrtc.dequantize(prepared, packing, span, dtype)
    first, last = span
    words, none, columns = prepared["words"], prepared["counters"], packing.columns
    out = torch.empty((last - first, columns), dtype=dtype, device=words.device)
    rows = prepared["scale"].shape[1] if "scale" in prepared else len(words)
    tensors = (words, prepared.get("scale", none), prepared.get("zero", none), prepared.get("table", none), out)
    sizes = (first, last, rows, columns, words.shape[1])
    shared = {"BITS": packing.bits, "GROUP": packing.group, "ZERO": packing.zero, "TABLE": packing.table}
    order = packing.planar
    if order is None:
        grid = (triton.cdiv(last - first, ROWS), triton.cdiv(columns, COLUMNS))
        dequantize_dense[grid](*tensors, *sizes, **shared, BN=ROWS, BK=COLUMNS, num_warps=WARPS)
    else:
        shape = {"WORDS": order.words, "FIELDS": order.fields, "PLANES": order.planes}
        grid = (triton.cdiv(last - first, ROWS), order.blocks(columns))
        dequantize_planar[grid](*tensors, *sizes, **shared, **shape, BN=ROWS, num_warps=WARPS)
    return out
