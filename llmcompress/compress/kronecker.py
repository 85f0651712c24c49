"""Output-side feedback: errors of rows already rounded move the rows still unrounded (YAQA, arXiv 2505.22988).

The rise of the loss is taken for `tr(H_O D H_I D^T)`, with `D` the error of a weight, `H_I = E x x^T` of its inputs and
`H_O = E g g^T` of the gradients `g` at its outputs, for labels drawn from the model. With `H_O = C C^T` and the factor
`L = C diag(C_II)^-1` of blocks of rows `I`, rounding the last block first, each towards

    T_I = W_I - sum_{J > I} L_JI^T D_J

by feedback along its columns, is the two-sided LDL of that paper, but for rows of one block, which do not interact.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from llmcompress.compress.grid import Codes
from llmcompress.compress.rounding import Request, stacked

DAMP = 0.05  # of the mean of the diagonal: gradients of few tokens say little


def row_factor(curvature: Tensor, rows: int) -> Tensor | None:
    """`L`, float32 `(outputs, outputs)`, of blocks of `rows` outputs; None where `H_O` has no factor.

    curvature  (outputs, outputs)  `H_O`; its scale does not matter
    """
    full = curvature.double()
    full = full + torch.eye(len(full), dtype=full.dtype, device=full.device) * (DAMP * full.diagonal().mean())
    lower, failed = torch.linalg.cholesky_ex(full)
    if int(failed) or not bool(torch.isfinite(lower).all()):
        return None
    found = torch.empty_like(lower)
    for start in range(0, len(full), rows):
        block = slice(start, start + rows)
        found[:, block] = torch.linalg.solve_triangular(lower[block, block], lower[:, block], upper=False, left=False)
    return found.float()


def round_by_rows(
    requests: Sequence[Request],
    factors: Sequence[Tensor],
    rows: int,
    rounded: Callable[[Sequence[Request]], list[Codes]],
) -> list[Codes]:
    """Round weights of any heights, their last blocks of `rows` rows first, those of all weights side by side.

    factors  `L` of each weight, see `row_factor`
    rounded  rounds weights along their columns
    """
    errors = [torch.zeros_like(r.weight) for r in requests]
    parts: list[list[Codes]] = [[] for _ in requests]
    last = max(-(-len(r.weight) // rows) for r in requests)
    for place in reversed(range(last)):
        here = slice(place * rows, (place + 1) * rows)
        asked = [i for i, r in enumerate(requests) if place * rows < len(r.weight)]
        targets = []
        for i in asked:
            later = (place + 1) * rows
            aimed = requests[i].weight[here] - factors[i][later:, here].T @ errors[i][later:]
            targets.append(Request(aimed, requests[i].spec))
        for i, codes in zip(asked, rounded(targets), strict=True):
            errors[i][here] = codes.dequantize() - requests[i].weight[here]
            parts[i].insert(0, codes)
    return [stacked(found) for found in parts]
