"""ZD, z-score distribution (arXiv 2406.17415): share of a block's weights more than one deviation above the mean.

Data-free. A *smaller* share is taken as more important, so the importance given is its inverse.
Option `zd.sides`: `one` counts `z > 1`, `two` counts `|z| > 1`.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from llmcompress.compress.observe import weight_of
from llmcompress.compress.scoring import Measured, Observer, ScoreJob, layers_from_blocks
from llmcompress.kernels import native_grid
from llmcompress.types import BlockTrace, Series, Unit

UNIT: Unit = "unitless"
NEEDS_DATA = False
PART_WEIGHTS = 1 << 17  # weights that are in float64 at a time


def _parts(weights: Sequence[Tensor]) -> Iterator[Tensor]:
    """The weights in float64, a few whole rows at a time; a transposed view is not copied whole."""
    for weight in weights:
        rows = weight if weight.ndim > 1 else weight[:, None]
        for part in torch.split(rows, max(PART_WEIGHTS // rows.shape[1], 1)):
            yield part.double()


def mean_and_deviation(weights: Sequence[Tensor]) -> tuple[float, float]:
    """Mean and population deviation of all weights together, without ever pooling them.

    Counts, means and sums of squares about the mean of each part are merged pairwise, which, unlike the mean
    of the squares less the square of the mean, loses nothing where the mean is large.
    """
    count, mean, squares = 0, 0.0, 0.0
    for here, centre, spread in _moments(weights):
        apart = centre - mean
        squares += spread + apart * apart * count * here / (count + here)
        mean += apart * here / (count + here)
        count += here
    return mean, (squares / count) ** 0.5


def _moments(weights: Sequence[Tensor]) -> Iterator[tuple[int, float, float]]:
    """Count, mean and sum of squares about it of parts of the weights: whole weights in C, else some rows at a time."""
    for weight in weights:
        rows = native_grid.moments(weight)
        if rows is None:
            for part in _parts([weight]):
                variance, centre = torch.var_mean(part, correction=0)
                yield part.numel(), float(centre), float(variance) * part.numel()
        else:
            centre = rows[:, 0].mean()
            spread = rows[:, 1].sum() + weight.shape[1] * (rows[:, 0] - centre).square().sum()
            yield weight.numel(), float(centre), float(spread)


def z_share(weights: Sequence[Tensor], *, two_sided: bool = False) -> float:
    """Share of the pooled weights with `z > 1` (or `|z| > 1`), mean and deviation over the whole pool.

    `weights` of any shape and at least one in all; they are gone through twice, in parts.
    """
    mean, deviation = mean_and_deviation(weights)
    above = below = 0
    for weight in weights:
        sides = native_grid.beyond(weight, mean, deviation)
        if sides is None:
            for part in _parts([weight]):
                apart = part - mean
                above, below = above + int((apart > deviation).sum()), below + int((apart < -deviation).sum())
        else:
            above, below = above + int(sides[:, 0].sum()), below + int(sides[:, 1].sum())
    return (above + below * two_sided) / sum(weight.numel() for weight in weights)


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
