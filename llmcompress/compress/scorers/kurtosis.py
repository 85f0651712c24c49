"""Excess kurtosis of what each linear reads (arXiv 2506.19697): outlier channels, which coarse grids serve badly.

Per token `E[x^4] / std(x)^4 - 3` over channels, negative values counted as 0, mean over tokens; about 0 for
Gaussian, 3 for Laplace, `d - 3` where one of `d` channels holds everything. The importance given is `3 +` that
mean, so that a Gaussian input counts 3 and not nothing. Option `kurtosis.of`: `inputs`, or `weights`: the
same figure of each row of the weight along its inputs, where a group of weights shares one scale.
The series `kurtosis hidden` is of the hidden states that enter each block.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from llmcompress.compress.observe import watching_inputs, weight_of
from llmcompress.compress.scoring import Measured, Observer, ScoreJob, layers_from_importance
from llmcompress.types import BlockTrace, LinearInfo, Series, Unit

UNIT: Unit = "unitless"
NEEDS_DATA = True
PIECE = 1 << 20  # numbers squared at a time, which bounds the memory taken beside the input


def excess_kurtosis(x: Tensor) -> Tensor:
    """`E[x^4] / std(x)^4 - 3` over the last axis, as the paper's code has it: fourth moment about 0, std unbiased.

    x        (..., channels)    at least two channels; computed in x's own precision
    returns  (...)              0 where all channels are equal
    """
    channels = x.shape[-1]
    squares = x * x
    total = squares.sum(-1)
    spread = (total - x.sum(-1).square() / channels) / (channels - 1)
    # squares are scaled by their sum before they are squared, so that no size of x leaves the range of floats
    fourth = squares.mul_(total.reciprocal().unsqueeze(-1)).square_().sum(-1) / channels
    flat = spread <= total * (16 * torch.finfo(x.dtype).eps / channels)
    return torch.where(flat, 0.0, fourth * (total / spread).square() - 3)


def textbook_kurtosis(x: Tensor) -> Tensor:
    """`E[(x - mean)^4] / E[(x - mean)^2]^2 - 3` over the last axis: what statistics calls excess kurtosis.

    x        (..., channels)
    returns  (...)              nan where all channels are equal
    """
    squares = (x - x.mean(-1, keepdim=True)).square()
    return squares.square().mean(-1) / squares.mean(-1).square() - 3


def outlier_sum(rows: Tensor) -> Tensor:
    """Sum over rows `(rows, channels)` of the excess kurtosis, negative values as 0; a scalar on the same device."""
    step = max(PIECE // rows.shape[-1], 1)
    parts = (rows[start : start + step] for start in range(0, len(rows), step))
    return torch.stack([excess_kurtosis(part.float()).relu_().sum() for part in parts]).sum()


class _Mean:
    """A running mean over rows that waits for no device until it is asked."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._rows = 0

    def add(self, rows: Tensor) -> None:
        if len(rows):
            self._sums.append(outlier_sum(rows))
            self._rows += len(rows)

    def value(self) -> float:
        return sum(torch.stack(self._sums).tolist()) / self._rows if self._rows else 0.0


class _Kurtosis(Observer):
    """Keeps the mean of each shared input (or of each weight) and of the hidden states entering each block."""

    def __init__(self, job: ScoreJob) -> None:
        super().__init__(job)
        self.of_weights = job.options.kurtosis.of == "weights"
        self.found: dict[str, float] = {}
        self.hidden: list[float] = []

    def open(self, block: nn.Module, info: BlockTrace) -> AbstractContextManager[object]:
        self.entering = _Mean()
        self.groups = {linear.shared_input: _Mean() for linear in info.linears}
        if self.of_weights:
            return nullcontext()
        return watching_inputs(block, info, lambda group, inputs: self.groups[group].add(inputs))

    def see(self, info: BlockTrace, entering: Tensor, leaving: Tensor) -> None:
        self.entering.add(entering.flatten(0, -2))

    def close(self, block: nn.Module, info: BlockTrace) -> None:
        self.hidden.append(self.entering.value())
        shared = {group: mean.value() for group, mean in self.groups.items()}
        for linear in info.linears:
            self.found[linear.name] = (
                self._of_weight(block, info, linear) if self.of_weights else shared[linear.shared_input]
            )

    @staticmethod
    def _of_weight(block: nn.Module, info: BlockTrace, linear: LinearInfo) -> float:
        mean = _Mean()
        mean.add(weight_of(block, info, linear))
        return mean.value()

    def finish(self) -> Measured:
        layers = layers_from_importance(self.job, lambda linear: 3.0 + self.found[linear.name])
        return Measured(layers, (Series(name="kurtosis hidden", values=tuple(self.hidden)),))


def observer(job: ScoreJob) -> Observer:
    """Score every linear by the kurtosis of its input, measured on the full-precision model."""
    return _Kurtosis(job)
