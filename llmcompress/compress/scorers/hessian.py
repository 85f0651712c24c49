"""Proxy loss: squared output error of a linear, `tr(dW H dW^T)` with `H` the mean of `x x^T` over tokens.

Local to the linear: it does not know how much the model's output depends on it.
"""

from contextlib import AbstractContextManager

from torch import nn

from llmcompress.compress.grid import proxy_loss
from llmcompress.compress.observe import InputSums, groups_of, seen_by, summing, watching_inputs, weight_of
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
        self.sums: dict[int, InputSums] = {}
        return watching_inputs(block, info, summing(self.sums))

    def close(self, block: nn.Module, info: BlockTrace) -> None:
        most = max((sums.tokens for sums in self.sums.values()), default=0)
        found: dict[str, list[Candidate]] = {x.name: [] for x in info.linears if x.name in self.job.candidates}
        for number, members in groups_of(info).items():
            weights = {x.name: weight_of(block, info, x).contiguous() for x in members if x.name in found}
            sums = self.sums[number]
            mean, _ = sums.means()
            known = seen_by(mean, members[0])
            share = sums.tokens / max(most, 1)  # of an expert's input: a mean over the tokens routed there
            for name, spec, error in rounding_errors(self.job, weights, known):
                loss = proxy_loss(weights[name], weights[name] + error, mean.hessian) * share
                found[name].append(Candidate(spec=spec, damage=max(loss, 0.0)))
        self.layers += [LayerScore(linear=name, candidates=tuple(rows)) for name, rows in found.items()]

    def finish(self) -> Measured:
        return Measured(tuple(self.layers))


def observer(job: ScoreJob) -> Observer:
    """Score every linear and candidate on the full-precision model's inputs."""
    return _ProxyLoss(job)
