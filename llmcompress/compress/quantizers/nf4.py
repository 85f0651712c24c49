"""Round to the 4-bit NormalFloat table, in blocks of 64 weights (QLoRA, arXiv 2305.14314). Needs no data.

With `quantize.double` (the default) the scales of the blocks are stored in 8 bits. One width: 4 bits. The output is
in the layout of bitsandbytes.
"""

from collections.abc import Sequence

import torch

from llmcompress.compress.grid import table_codes
from llmcompress.compress.rounding import Quantized, Request, Seen
from llmcompress.types import LinearSpec, QuantizerOptions

NEEDS_HESSIAN = False
BLOCK = 64


def formats(bits: int, columns: int, *, group_size: int, options: QuantizerOptions) -> LinearSpec | None:
    """The one format there is. Rows are whole blocks: other readers misread what runs over the end of a row."""
    if bits != 4 or columns % BLOCK:
        return None
    return LinearSpec(bits=4, group_size=BLOCK, kind="nf4", double=options.double)


def quantize(
    requests: Sequence[Request], seen: Seen | None, *, options: QuantizerOptions, dtype: torch.dtype
) -> list[Quantized]:
    """Quantize linears to the nearest values of the table; `seen`, `options` and `dtype` are not used."""
    return [Quantized(table_codes(r.weight, r.spec)) for r in requests]
