"""Proxy loss: squared output error of a linear, `tr(dW H dW^T)` with `H` the mean of `x x^T` over tokens.

Local to the linear: it does not know how much the model's output depends on it.
"""

from contextlib import AbstractContextManager

from torch import nn

from llmcompress.compress.grid import proxy_loss
from llmcompress.compress.observe import HessianSums, watching_inputs, weight_of
from llmcompress.compress.scoring import Measured, Observer, ScoreJob, rounding_errors
from llmcompress.types import BlockTrace, Candidate, LayerScore, Unit

UNIT: Unit = "proxy loss"
NEEDS_DATA = True


class _ProxyLoss(Observer):
    """Sums `x x^T` while a block runs, then rounds its linears."""

    def __init__(self, job: ScoreJob) -> None:
        super().__init__(job)
        self.layers: list[LayerScore] = []

    def open(self, block: nn.Module, info: BlockTrace) -> AbstractContextManager[object]:
        self.sums = HessianSums()
        return watching_inputs(block, info, self.sums.add)

    def close(self, block: nn.Module, info: BlockTrace) -> None:
        hessians = self.sums.means()
        for linear in info.linears:
            if linear.name not in self.job.candidates:
                continue
            weight, hessian = weight_of(block, info, linear).contiguous(), hessians[linear.shared_input]
            candidates = tuple(
                Candidate(spec=spec, damage=max(proxy_loss(weight, weight + error, hessian), 0.0))
                for spec, error in rounding_errors(self.job, linear, weight, hessian)
            )
            self.layers.append(LayerScore(linear=linear.name, candidates=candidates))

    def finish(self) -> Measured:
        return Measured(tuple(self.layers))


def observer(job: ScoreJob) -> Observer:
    """Score every linear and candidate on the full-precision model's inputs."""
    return _ProxyLoss(job)
