"""AdaRound (arXiv 2004.10568): learn for each weight whether to round down or up, by a block's output error.

`Q = s clip(floor(W / s) + h(V))` with `h` a stretched sigmoid that a growing penalty drives to 0 or 1. Scales stay as
GPTQ's search found them, and where learning begins each `h` leans towards GPTQ's choice.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmcompress.compress.grid import Codes, expand_scale
from llmcompress.compress.rounding import Quantized, Request, Seen
from llmcompress.compress.sequential import round_with_feedback
from llmcompress.types import QuantizerOptions

NEEDS_HESSIAN = True
TWO_SIDED = True  # takes output-side feedback
STRETCH, SHIFT = 1.2, 0.1
LEAN = 0.25  # how far from the middle a choice begins, at least
PENALTY = 0.01  # per weight, against a relative output error
WARM = 0.2  # share of the steps without penalty
BETAS = (20.0, 2.0)
TRAVEL = 6.0  # of a choice before the sigmoid, over all steps


def quantize(
    requests: Sequence[Request], seen: Seen | None, *, options: QuantizerOptions, dtype: torch.dtype
) -> list[Quantized]:
    """Quantize linears that read one input, as `gptq` does: where learning begins."""
    return round_with_feedback(requests, seen, options=options, dtype=dtype)


def rectified(value: Tensor) -> Tensor:
    """The stretched sigmoid `h`, in [0, 1]."""
    return torch.clamp(STRETCH * torch.sigmoid(value) - SHIFT, 0, 1)


class _AdaRound:
    """A choice between two neighbouring codes for each weight."""

    def __init__(self, weight: Tensor, codes: Codes, options: QuantizerOptions) -> None:
        self.spec, self.scale = codes.spec, codes.scale
        self.half = 1 << (codes.spec.bits - 1)
        level = codes.codes.float() - self.half
        self.wide = expand_scale(codes.scale, weight.shape[1])
        fraction = weight / self.wide - level  # beyond half a step where GPTQ has moved the weight
        up = fraction > 0  # the neighbour is the next code up; its own code is the floor
        self.floor = torch.where(up, level, level - 1)
        begin = torch.where(up, fraction.clamp(0, 0.5 - LEAN), (1 + fraction).clamp(0.5 + LEAN, 1))
        share = ((begin + SHIFT) / STRETCH).clamp(1e-4, 1 - 1e-4)
        self.value = torch.log(share / (1 - share)).requires_grad_(True)
        self.optimizer = torch.optim.Adam([self.value], lr=options.rate or TRAVEL / options.iterations)

    def weight(self) -> Tensor:
        level = torch.clamp(self.floor + rectified(self.value), -self.half, self.half - 1)
        return level * self.wide

    def step(self, progress: float) -> None:
        del progress
        self.optimizer.step()
        self.optimizer.zero_grad()

    def penalty(self, progress: float) -> Tensor | float:
        if progress < WARM:
            return 0.0
        beta = BETAS[0] + (BETAS[1] - BETAS[0]) * (progress - WARM) / (1 - WARM)
        return PENALTY * (1 - (2 * rectified(self.value) - 1).abs().pow(beta)).mean()

    def codes(self, dtype: torch.dtype) -> Codes:
        del dtype
        with torch.no_grad():
            level = torch.clamp(self.floor + (rectified(self.value) >= 0.5), -self.half, self.half - 1) + self.half
        return Codes(level.to(torch.uint8), self.scale, self.spec)


def learn(weight: Tensor, codes: Codes, options: QuantizerOptions) -> _AdaRound:
    """Begin from codes; `weight` `(rows, columns)` says which neighbour each of them may become."""
    return _AdaRound(weight, codes, options)


LEARNERS = (learn,)
