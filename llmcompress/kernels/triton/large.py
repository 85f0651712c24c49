"""Products of many tokens, or of codes with no planar order: a library multiplies strips of unpacked rows.

A strip is small enough to stay in the cache between the two. Weights are rounded to the dtype of the input.
"""

import functools
from collections.abc import Mapping

import torch
import triton
from torch import Tensor

from llmcompress.kernels.nvrtc import small as nvrtc
from llmcompress.kernels.triton.jit.dequantize import dequantize_dense, dequantize_planar
from llmcompress.kernels.triton.layout import Packing
from llmcompress.kernels.triton.proof import unpacks

MANY, STRIP_BYTES = 1024, (1 << 26, 1 << 25)  # strips for fewer and for more tokens
LANES = 2
ROWS, COLUMNS, WARPS = 16, 256, 4  # of one program


def multiply(
    x: Tensor, prepared: Mapping[str, Tensor], packing: Packing, rows: int, *, strip: int = 0, lanes: int = LANES
) -> Tensor:
    """`x` (M, columns) times the transposed weight, (M, rows), `strip` rows at a time (0: as many as suit `x`).

    On a GPU strips take turns in `lanes` streams, so that one is unpacked while another is multiplied.
    """
    most = STRIP_BYTES[len(x) >= MANY]
    step = strip or max(most // (packing.columns * x.element_size()) // ROWS * ROWS, ROWS)
    out = torch.empty((len(x), rows), dtype=x.dtype, device=x.device)
    spans = [(first, min(first + step, rows)) for first in range(0, rows, step)]
    if not x.is_cuda or len(spans) == 1 or lanes == 1:
        for span in spans:
            _multiply_strip(x, prepared, packing, span, out)
        return out
    now, streams = torch.cuda.current_stream(), _streams(x.device, lanes)
    for stream in streams:
        stream.wait_stream(now)
    for turn, span in enumerate(spans):
        with torch.cuda.stream(streams[turn % lanes]):
            _multiply_strip(x, prepared, packing, span, out)
    for stream in streams:
        now.wait_stream(stream)
    return out


def _multiply_strip(
    x: Tensor, prepared: Mapping[str, Tensor], packing: Packing, span: tuple[int, int], out: Tensor
) -> None:
    torch.matmul(x, dequantize(prepared, packing, span, x.dtype).T, out=out[:, span[0] : span[1]])


@functools.lru_cache(maxsize=16)
def _streams(device: torch.device, lanes: int) -> tuple[torch.cuda.Stream, ...]:
    return tuple(torch.cuda.Stream(device) for _ in range(lanes))  # type: ignore[no-untyped-call]


def dequantize(prepared: Mapping[str, Tensor], packing: Packing, span: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Rows `span[0] ... span[1] - 1` of the weight, `(rows, columns)`."""
    if nvrtc.fits(packing, dtype, prepared["words"].device) and unpacks(prepared, packing, dtype):
        return nvrtc.dequantize(prepared, packing, span, dtype)
    if dtype != torch.float32 and packing.planar is not None:
        # Triton 3.6 mixes up fields of 2 and 3 bits where the result has 16
        return dequantize(prepared, packing, span, torch.float32).to(dtype)
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
