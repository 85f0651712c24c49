"""What a linear should come out as, once what came before it is already quantized.

`min |x' W^T - x Q^T|^2`, with `x'` from the full-precision model and `x` from the one that will be stored, equals
`|x (Q - W*)^T|^2` and a constant, with `W* = W + W C H^-1`, `C = E (x' - x) x^T`, `H = E x x^T`. So any rounding of
`W*` in place of `W` corrects errors upstream (QEP, arXiv 2504.09629; Qronos, 2505.11695). Where the output is added
to a stream `r` that carries errors of its own, `E (r' - r) x^T` joins `W C` (LoaQ, 2509.06297). Both are shrunk by
`alpha`: they are learned from the calibration text, and fit it the better the fewer tokens it has.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llmcompress.compress.feedback import STRIPE, damped, dampings, factorise
from llmcompress.compress.rounding import Seen, finite
from llmcompress.model.products import linear
from llmcompress.types import QuantizerOptions

PLENTY, ENOUGH = 30, 8  # tokens per column
ALPHAS = (0.75, 0.5, 0.25)


def alpha_for(tokens: int, columns: int) -> float:
    """How much of the difference to correct, from the number of calibration tokens per column."""
    ratio = tokens / columns
    return ALPHAS[0] if ratio >= PLENTY else ALPHAS[1] if ratio >= ENOUGH else ALPHAS[2]


class Targets:
    """The corrected weights of the linears that share one input; the Hessian is factorised once."""

    def __init__(self, seen: Seen, damp: float, alpha: float | None) -> None:
        self.seen = seen
        self.alpha = alpha_for(seen.tokens, len(seen.hessian)) if alpha is None else alpha
        self._lower: Tensor | None = None
        self._solved: Tensor | None = None
        if not self.alpha or not seen.finite:
            return
        for tried in dampings(damp):
            lower = damped(seen.hessian, tried).T
            if not factorise(lower):
                self._lower = lower
                return

    def prepare(self, rows: int) -> None:
        """Work `C H^-1` out once, where so many rows without a term of their own are more than it has."""
        drift = self.seen.drift
        if self._lower is None or drift is None or rows <= len(drift) or not finite(drift):
            return
        solved = torch.empty_like(drift, dtype=torch.float32)  # transposed
        for start in range(0, len(drift), STRIPE):
            part = slice(start, start + STRIPE)
            solved[:, part] = _solved(drift[part].double().T, self._lower)
        self._solved = solved if finite(solved) else None

    def of(self, weight: Tensor, term: Tensor | None = None) -> Tensor:
        """`W + alpha (W C + R) H^-1`, float32; the weight itself where there is nothing to correct.

        weight  (rows, columns)  float32
        term    (rows, columns)  `R`, the mean of `(r' - r) x^T`; without a drift `W C + R`, the mean of
                                 `((W x' + r') - (W x + r)) x^T`
        """
        if self._lower is None or (self.seen.drift is None and term is None):
            return weight
        if term is None and self._solved is not None:
            return weight + self.alpha * linear(weight, self._solved)
        found = torch.empty(weight.shape, device=weight.device)
        for start in range(0, len(weight), STRIPE):
            part = slice(start, start + STRIPE)
            cross = self._cross(weight[part], None if term is None else term[part])
            if not finite(cross):
                return weight
            found[part] = weight[part] + self.alpha * _solved(cross.T, self._lower).T
        return found

    def _cross(self, weight: Tensor, term: Tensor | None) -> Tensor:
        """`W C + R` of some rows in float64."""
        cross = torch.zeros(weight.shape, dtype=torch.float64, device=weight.device)
        if self.seen.drift is not None:
            wide = weight.double()
            for start in range(0, weight.shape[1], STRIPE):
                part = slice(start, start + STRIPE)
                cross[:, part] = wide @ self.seen.drift[:, part].double()
        return cross if term is None else cross.add_(term)


def _solved(right: Tensor, lower: Tensor) -> Tensor:
    """`(L L^T)^-1 B` in the place of `B`, both lying by columns; `torch.cholesky_solve` would copy `L`."""
    torch.linalg.solve_triangular(lower, right, upper=False, out=right)
    torch.linalg.solve_triangular(lower.T, right, upper=True, out=right)
    return right


def aim(
    options: QuantizerOptions, seen: Seen, weights: Sequence[Tensor], terms: Sequence[Tensor | None]
) -> tuple[list[Tensor], Seen]:
    """The weights to round in place of the original ones, and what is left for the quantizer to know."""
    known = terms if options.target == "residual" else [None] * len(weights)
    if options.target in ("layer", "gptaq") or (seen.drift is None and all(term is None for term in known)):
        return list(weights), seen
    targets = Targets(seen, options.damp, options.alpha)
    targets.prepare(sum(len(weight) for weight, term in zip(weights, known, strict=True) if term is None))
    found = [targets.of(weight, term) for weight, term in zip(weights, known, strict=True)]
    return found, replace(seen, drift=None)
