"""GPTQ (arXiv 2210.17323): round column by column, pushing each error onto the columns still unrounded.

By default columns are taken in order of decreasing Hessian diagonal ("act-order") with static groups: all scales
are fixed beforehand on the unpermuted weights, so the file keeps its plain layout. `quantize.order: group` keeps
groups together instead and chooses each scale when its group is reached. Afterwards `quantize.sweeps` passes of
coordinate descent over codes and scales lower the same loss further.
"""

from collections.abc import Sequence

import torch

from llmcompress.compress.rounding import Quantized, Request, Seen
from llmcompress.compress.sequential import round_with_feedback
from llmcompress.types import QuantizerOptions

NEEDS_HESSIAN = True
TWO_SIDED = True  # takes output-side feedback


def quantize(
    requests: Sequence[Request], seen: Seen | None, *, options: QuantizerOptions, dtype: torch.dtype
) -> list[Quantized]:
    """Quantize linears that read one input; `dtype` is that of the stored scales.

    The scale of the Hessian does not matter. A Hessian that is not finite, or stays singular after three tenfold
    increases of the damping, falls back to rounding; both are recorded.
    """
    return round_with_feedback(requests, seen, options=options, dtype=dtype)
