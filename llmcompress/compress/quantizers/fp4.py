"""Round to a 4-bit floating-point table, in blocks of 64 weights, as bitsandbytes does. Needs no data.

With `quantize.double` (the default) the scales of the blocks are stored in 8 bits. One width: 4 bits. The output is
in the layout of bitsandbytes.
"""

from collections.abc import Sequence

import torch

from llmcompress.compress.grid import table_codes, table_format
from llmcompress.compress.rounding import Quantized, Request, Seen
from llmcompress.types import LinearSpec, QuantizerOptions

NEEDS_HESSIAN = False


def formats(bits: int, columns: int, *, group_size: int, options: QuantizerOptions) -> LinearSpec | None:
    """Blocks of 64 weights at 4 bits; nothing else."""
    return table_format("fp4", bits, columns, double=options.double)


def quantize(
    requests: Sequence[Request], seen: Seen | None, *, options: QuantizerOptions, dtype: torch.dtype
) -> list[Quantized]:
    """Quantize linears to the nearest values of the table; `seen`, `options` and `dtype` are not used."""
    return [Quantized(table_codes(r.weight, r.spec)) for r in requests]
