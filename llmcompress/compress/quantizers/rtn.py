"""Round to nearest, after a search for the scale that clips best. Needs no data."""

from collections.abc import Sequence

import torch

from llmcompress.compress.rounding import Quantized, Request, Seen, nearest
from llmcompress.types import QuantizerOptions

NEEDS_HESSIAN = False


def quantize(
    requests: Sequence[Request], seen: Seen | None, *, options: QuantizerOptions, dtype: torch.dtype
) -> list[Quantized]:
    """Quantize linears by rounding; `seen` is not used. `dtype` is that of the stored scales."""
    return [nearest(r, options, dtype) for r in requests]
