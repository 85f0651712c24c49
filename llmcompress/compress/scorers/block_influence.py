"""Block influence: how far the hidden states turn from where they enter a block to where they leave it.

Option `block_influence.distance`: `cosine`, `1 - cos` (ShortGPT, arXiv 2403.03853), or `angular`,
`arccos(cos) / pi` (arXiv 2403.17887). `block_influence.tokens`: the mean over `all` tokens, or over the `last`
of each sequence. The importance given is the influence, and at least 1e-6, so that a block that turns nothing
counts next to nothing.
"""

import math

import torch
from torch import Tensor

from llmcompress.compress.scoring import Measured, Observer, ScoreJob, layers_from_blocks
from llmcompress.types import BlockTrace, Series, Unit

UNIT: Unit = "unitless"
NEEDS_DATA = True
FLOOR = 1e-6


def influence(entering: Tensor, leaving: Tensor, *, distance: str = "cosine") -> Tensor:
    """Distance between directions, float64 `(...,)`, from hidden states `(..., hidden)`.

    `cosine` is in `[0, 2]`, `angular` in `[0, 1]`; both are symmetric, and exactly 0 between equal vectors: they
    are taken from the chord between the unit vectors, as arccos cannot tell small angles apart.
    """
    before = torch.nn.functional.normalize(entering, dim=-1, eps=1e-30)
    after = torch.nn.functional.normalize(leaving, dim=-1, eps=1e-30)
    chord: Tensor = torch.linalg.vector_norm(before - after, dim=-1).double()
    if distance == "cosine":
        return chord.square() / 2
    across: Tensor = torch.linalg.vector_norm(before + after, dim=-1).double()
    return 2 * torch.atan2(chord, across) / math.pi


class _Influence(Observer):
    """Keeps the sum of each block's influence and the number of tokens."""

    def __init__(self, job: ScoreJob) -> None:
        super().__init__(job)
        self.sums = [0.0] * len(job.trace.blocks)
        self.tokens = [0] * len(job.trace.blocks)

    def see(self, info: BlockTrace, entering: Tensor, leaving: Tensor) -> None:
        options = self.job.options.block_influence
        first = -1 if options.tokens == "last" else 0
        found = influence(entering[:, first:], leaving[:, first:], distance=options.distance)
        self.sums[info.index] += float(found.sum())
        self.tokens[info.index] += found.numel()

    def finish(self) -> Measured:
        found = tuple(total / count for total, count in zip(self.sums, self.tokens, strict=True))
        importance = [max(value, FLOOR) for value in found]
        return Measured(layers_from_blocks(self.job, importance), (Series(name="influence", values=found),))


def observer(job: ScoreJob) -> Observer:
    """Score every linear by the influence of its block, measured on the full-precision model."""
    return _Influence(job)
