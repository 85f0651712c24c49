"""SignRound (AutoRound, arXiv 2309.05516) from GPTQ's answer: signed gradient steps on a block's output error.

Learned are an offset of each weight within the grid, which can take its code one up or down, and a factor on each
group's scale. Where nothing is learned (scores, trials) the answer is GPTQ's.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from llmcompress.compress.grid import Codes, expand_scale, stored_scale
from llmcompress.compress.rounding import Quantized, Request, Seen
from llmcompress.compress.sequential import round_with_feedback
from llmcompress.types import QuantizerOptions

NEEDS_HESSIAN = True
TWO_SIDED = True  # takes output-side feedback
EDGES = (0.25, 0.49)  # of a step from its code: how far a weight may begin; some blocks want room, some do not
SCALE_SHARE = 0.2  # relative change of a scale, per unit of travel of an offset


def quantize(
    requests: Sequence[Request], seen: Seen | None, *, options: QuantizerOptions, dtype: torch.dtype
) -> list[Quantized]:
    """Quantize linears that read one input, as `gptq` does: where learning begins."""
    return round_with_feedback(requests, seen, options=options, dtype=dtype)


class _SignRound:
    """A latent code for each weight, and a factor for each group's scale."""

    def __init__(self, weight: Tensor, codes: Codes, options: QuantizerOptions, edge: float) -> None:
        self.spec, self.scale = codes.spec, codes.scale.float()
        self.half = 1 << (codes.spec.bits - 1)
        level = codes.codes.float() - self.half
        wanted = weight / expand_scale(codes.scale, weight.shape[1])
        self.latent = torch.clamp(wanted, level - edge, level + edge).requires_grad_(True)
        self.factor = torch.ones_like(self.scale).requires_grad_(True)
        self.rate = options.rate or 1 / options.iterations

    def weight(self) -> Tensor:
        rounded = torch.clamp(torch.round(self.latent), -self.half, self.half - 1)
        straight = self.latent + (rounded - self.latent).detach()
        inside = torch.clamp(straight, -self.half, self.half - 1)
        rows, columns = inside.shape
        grouped = inside.view(rows, self.scale.shape[1], -1) * (self.scale * self.factor)[..., None]
        return grouped.view(rows, columns)

    def step(self, progress: float) -> None:
        rate = self.rate * (1 - progress)
        with torch.no_grad():
            for parameter, share in ((self.latent, 1.0), (self.factor, SCALE_SHARE)):
                if parameter.grad is not None:
                    parameter -= rate * share * parameter.grad.sign()
                    parameter.grad = None

    def penalty(self, progress: float) -> float:
        del progress
        return 0.0

    def codes(self, dtype: torch.dtype) -> Codes:
        with torch.no_grad():
            level = torch.clamp(torch.round(self.latent), -self.half, self.half - 1) + self.half
            scale = stored_scale(self.scale * self.factor, dtype)
        return Codes(level.to(torch.uint8), scale, self.spec)


def learn(weight: Tensor, codes: Codes, options: QuantizerOptions, *, edge: float = EDGES[0]) -> _SignRound:
    """Begin from codes; `weight` `(rows, columns)` says which way each of them is most easily moved.

    At an `edge` near 0.5 a choice of GPTQ that is not the nearest code is given up at the first steps.
    """
    return _SignRound(weight, codes, options, edge)


LEARNERS = tuple(partial(learn, edge=edge) for edge in EDGES)
