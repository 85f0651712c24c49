"""Round to float8_e4m3fn under one scale per row, its largest weight on 448. Needs no data.

One width: 8 bits. With `quantize.inputs` of `fp8` or `fp8-token` both sides of every product are float8.
"""

from collections.abc import Sequence

import torch

from llmcompress.compress.grid import Codes, stored_scale
from llmcompress.compress.rounding import Quantized, Request, Seen
from llmcompress.kernels.inputs import FLOAT8, FLOAT8_MAX
from llmcompress.types import LinearSpec, QuantizerOptions

NEEDS_HESSIAN = False


def formats(bits: int, columns: int, *, group_size: int, options: QuantizerOptions) -> LinearSpec | None:
    """Rows of float8 at 8 bits; nothing else."""
    return LinearSpec(bits=8, group_size=columns, kind="fp8") if bits == 8 else None


def quantize(
    requests: Sequence[Request], seen: Seen | None, *, options: QuantizerOptions, dtype: torch.dtype
) -> list[Quantized]:
    """Quantize linears to the nearest float8; `seen` and `options` are not used. `dtype` is that of stored scales."""
    found = []
    for request in requests:
        scale = stored_scale(request.weight.abs().amax(1, keepdim=True) / FLOAT8_MAX, dtype)
        values = (request.weight / scale.float()).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8)
        found.append(Quantized(Codes(values.view(torch.uint8), scale, request.spec)))
    return found
