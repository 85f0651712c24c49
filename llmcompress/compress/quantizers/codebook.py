"""A table of values for each row by weighted k-means, then GPTQ's feedback onto it (LeanQuant, arXiv 2407.10032).

Each output row has `2**bits` 16-bit values of its own and no scales. Squared errors of a column count by
`1 / [H^-1]_jj`, the loss they leave when all other columns have made up for them. The output is in llmcompress's own
layout.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmcompress.compress.feedback import Factor, Loop, column_order, inverse_factor, round_columns
from llmcompress.compress.grid import Codes
from llmcompress.compress.rounding import NOT_FINITE, Quantized, Request, Seen
from llmcompress.compress.tables import fit_codebooks, nearest_entries
from llmcompress.types import LinearSpec, QuantizerOptions

NEEDS_HESSIAN = True


def formats(bits: int, columns: int, *, group_size: int, options: QuantizerOptions) -> LinearSpec | None:
    """A codebook has no groups, and any number of columns will do."""
    return LinearSpec(bits=bits, group_size=0, kind="codebook")


def quantize(
    requests: Sequence[Request], seen: Seen | None, *, options: QuantizerOptions, dtype: torch.dtype
) -> list[Quantized]:
    """Quantize linears that read one input; `dtype` is not used, tables are float16.

    Without a finite, regular Hessian all columns count the same and there is no feedback; it is recorded.
    """
    factor: Factor | None = None
    notes: tuple[str, ...] = (NOT_FINITE,)
    if seen is not None and seen.finite:
        order = column_order(seen.hessian.diagonal(), "plain" if options.order == "plain" else "act", 1)
        factor, notes = seen.once("factor", lambda: inverse_factor(seen.hessian, order, options.damp))
    return [Quantized(codebook_codes(r.weight, r.spec, factor), notes, blind=factor is None) for r in requests]


def codebook_codes(weight: Tensor, spec: LinearSpec, factor: Factor | None) -> Codes:
    """Tables and codes of a weight `(rows, columns)`; without a factor, nearest entries of plain k-means."""
    rows, columns = weight.shape
    importance = torch.ones(columns, device=weight.device)
    if factor is not None:
        importance[factor.order] = 1 / factor.upper.square().sum(0)  # higher powers, as published, measured worse
    table = fit_codebooks(weight, importance, spec.bits)
    wide = table.float()
    if factor is None:
        codes, _ = nearest_entries(weight, wide)
    else:

        def nearest(_: int, values: Tensor) -> tuple[Tensor, Tensor]:
            found, stored = nearest_entries(values[:, None], wide)
            return found[:, 0], stored[:, 0]

        codes = torch.empty((rows, columns), dtype=torch.uint8, device=weight.device)
        codes[:, factor.order] = round_columns(weight[:, factor.order], factor.upper, Loop(nearest))
    return Codes(codes, torch.empty((rows, 0), device=weight.device), spec, codebook=table)
