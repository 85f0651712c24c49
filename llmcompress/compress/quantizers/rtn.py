"""Round to nearest, after a search for the scale that clips best. Needs no data."""

import torch
from torch import Tensor

from llmcompress.compress.grid import find_scale, round_weight
from llmcompress.compress.rounding import Quantized
from llmcompress.types import LinearSpec, QuantizerOptions

NEEDS_HESSIAN = False


def quantize(
    weight: Tensor, hessian: Tensor | None, spec: LinearSpec, *, options: QuantizerOptions, dtype: torch.dtype
) -> Quantized:
    """Quantize one linear by rounding; `hessian` is not used.

    weight  (rows, columns)  float32
    dtype   of the stored scales
    """
    scale = find_scale(weight, spec, dtype, clip=options.clip)
    return Quantized(round_weight(weight, scale, spec))
