"""The ways to multiply with a packed weight on GPUs, and which of them a product takes."""

from collections.abc import Mapping

import torch
from torch import Tensor

from llmcompress.kernels.nvrtc import many
from llmcompress.kernels.nvrtc import small as nvrtc
from llmcompress.kernels.triton.large import multiply as multiply_strips
from llmcompress.kernels.triton.layout import Packing
from llmcompress.kernels.triton.proof import multiplies
from llmcompress.kernels.triton.small import multiply as multiply_tile
from llmcompress.kernels.triton.tuning import Choice, Fused, Lean, Strips, choose, choose_many

LARGE = 256  # tokens from which on weights are unpacked first, unless a table says otherwise


def chosen(x: Tensor, prepared: Mapping[str, Tensor], packing: Packing, rows: int) -> Choice:
    """The way for these inputs: as tables and the rule say, but never a kernel that failed its proof on this GPU."""
    if packing.planar is None:
        return Strips()
    if len(x) <= LARGE:
        lean = nvrtc.fits(packing, x.dtype, x.device)
        few = choose(packing, rows, len(x), x.device, lean)
        if not isinstance(few, Lean) or multiplies(x, prepared, packing, rows, few):
            return few
        return choose(packing, rows, len(x), x.device)
    if x.dtype == torch.float32:
        return Strips()
    found = choose_many(packing, rows, len(x), x.device, many.fits(packing, x.dtype, x.device))
    if isinstance(found, Fused) and not (
        many.has_room(packing, found) and multiplies(x, prepared, packing, rows, found)
    ):
        return Strips()
    return found


def product(x: Tensor, prepared: Mapping[str, Tensor], packing: Packing, rows: int, config: Choice) -> Tensor:
    """`x` (M, columns) times the transposed weight, (M, rows), in one certain way."""
    if isinstance(config, Lean):
        return nvrtc.multiply(x, prepared, packing, rows, config)
    if isinstance(config, Fused):
        return many.multiply(x, prepared, packing, rows, config)
    if isinstance(config, Strips):
        return multiply_strips(x, prepared, packing, rows)
    return multiply_tile(x, prepared, packing, rows, config)
