"""Rounding with a low-rank correction beside the codes: `W ~ Q + up down` (LQER, arXiv 2402.02446).

The correction is the best of its rank on what the linear reads: with `E = W - Q` and `H = mean x x^T`, of all `up down`
it leaves the least `tr (E - up down) H (E - up down)^T`. By Eckart and Young that is `U U^T E`, with `U` the leading
eigenvectors of `E H E^T`, so that nothing has to be inverted and `H` may be singular.
"""

from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor

from llmcompress.compress.rounding import Quantized, Request, Seen
from llmcompress.types import QuantizerOptions

UNSEEN = "no calibration token reached it: rounded without data"


def factors_of(error: Tensor, hessian: Tensor | None, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`up` `(rows, rank)` and `down` `(rank, columns)`, both of `dtype`, whose product is nearest to `error`.

    error    (rows, columns)     float32
    hessian  (columns, columns)  mean of `x x^T`; every input counts the same where None
    rank     at most the smaller side of `error`

    `down` is fitted to `up` as it is stored. Costs an eigendecomposition of a `(rows, rows)` matrix in float64.
    """
    exact = error.double()
    weighted = exact if hessian is None else exact @ hessian.double()
    gram = weighted @ exact.T
    _, vectors = torch.linalg.eigh((gram + gram.T) / 2)
    up = vectors[:, -rank:].flip(1).to(dtype)
    known = up.double()
    down = torch.linalg.solve(known.T @ known, known.T @ exact)
    return up.contiguous(), down.to(dtype).contiguous()


def corrected(
    quantizer: ModuleType,
    requests: Sequence[Request],
    seen: Seen | None,
    *,
    options: QuantizerOptions,
    dtype: torch.dtype,
) -> list[Quantized]:
    """What a quantizer makes of linears that read one input, with the corrections that their formats have.

    Where calibration showed nothing of the input, as of an expert that no token was routed to, it goes without: mostly
    that is rounding to nearest. It is recorded. What it works out from `seen` alone stays there for the next call.
    """
    unseen = seen is not None and quantizer.NEEDS_HESSIAN and seen.nothing
    seen = None if unseen else seen
    results: list[Quantized] = quantizer.quantize(requests, seen, options=options, dtype=dtype)
    results = [replace(result, fallbacks=(UNSEEN,), blind=False) for result in results] if unseen else results
    hessian = seen.hessian if seen is not None and seen.finite else None
    found = []
    for request, result in zip(requests, results, strict=True):
        rank = request.spec.rank_of(*request.weight.shape)
        if rank:
            error = request.weight - result.codes.dequantize()
            up, down = factors_of(error, hessian, rank, dtype)
            result = replace(result, codes=replace(result.codes, up=up, down=down))
        found.append(result)
    return found


def quantized(
    quantizer: ModuleType,
    requests: Sequence[Request],
    seen: Seen | None,
    *,
    options: QuantizerOptions,
    dtype: torch.dtype,
) -> list[Quantized]:
    """`corrected`, and nothing stays."""
    found = corrected(quantizer, requests, seen, options=options, dtype=dtype)
    if seen is not None:
        seen.known.clear()
    return found
