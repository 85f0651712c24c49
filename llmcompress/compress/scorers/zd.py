"""ZD, z-score distribution (arXiv 2406.17415): share of a block's weights more than one deviation above the mean.

Data-free. A *smaller* share is taken as more important, so the importance given is its inverse.
Option `zd.sides`: `one` counts `z > 1`, `two` counts `|z| > 1`.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from llmcompress.compress.observe import weight_of
from llmcompress.compress.scoring import Measured, Observer, ScoreJob, layers_from_blocks
from llmcompress.types import BlockTrace, Series, Unit

UNIT: Unit = "unitless"
NEEDS_DATA = False


def z_share(weights: list[Tensor], *, two_sided: bool = False) -> float:
    """Share of the pooled weights with `z > 1` (or `|z| > 1`), mean and deviation over the whole pool."""
    pool = torch.cat([weight.flatten() for weight in weights]).double()
    z = (pool - pool.mean()) / pool.std(correction=0).clamp_min(1e-300)
    beyond = z.abs() > 1 if two_sided else z > 1
    return float(beyond.double().mean())


class _ZScores(Observer):
    """Keeps the ZD of each block."""

    def __init__(self, job: ScoreJob) -> None:
        super().__init__(job)
        self.shares: list[float] = []

    def open(self, block: nn.Module, info: BlockTrace) -> AbstractContextManager[object]:
        weights = [weight_of(block, info, linear) for linear in info.linears]
        self.shares.append(z_share(weights, two_sided=self.job.options.zd.sides == "two") if weights else 1.0)
        return nullcontext()

    def finish(self) -> Measured:
        importance = [1.0 / max(share, 1e-6) for share in self.shares]
        return Measured(layers_from_blocks(self.job, importance), (Series(name="zd", values=tuple(self.shares)),))


def observer(job: ScoreJob) -> Observer:
    """Score every linear by the ZD of its block."""
    return _ZScores(job)
