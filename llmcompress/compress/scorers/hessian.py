"""Proxy loss: squared output error of a linear, `tr(dW H dW^T)` with `H` the mean of `x x^T` over tokens.

Local to the linear: it does not know how much the model's output depends on it.
"""

from contextlib import AbstractContextManager

from torch import Tensor, nn

from llmcompress.compress.grid import proxy_loss
from llmcompress.compress.observe import GroupSums, groups_of, seen_by, watching_inputs, weight_of
from llmcompress.compress.scoring import Measured, Observer, ScoreJob, layer_score, rounding_errors
from llmcompress.types import BlockTrace, LayerScore, LinearSpec, Unit

UNIT: Unit = "proxy loss"
NEEDS_DATA = True


class _ProxyLoss(Observer):
    """Sums `x x^T` while a block runs, then rounds its linears."""

    SHARES = True

    def __init__(self, job: ScoreJob) -> None:
        super().__init__(job)
        self.layers: list[LayerScore] = []

    def open(self, block: nn.Module, info: BlockTrace) -> AbstractContextManager[object]:
        self.sums = GroupSums(self.share)
        return watching_inputs(block, info, self.sums.see)

    def see(self, info: BlockTrace, entering: Tensor, leaving: Tensor) -> None:
        self.sums.close_batch()

    def close(self, block: nn.Module, info: BlockTrace) -> None:
        seen = self.sums.means()
        most = max((mean.tokens for mean in seen.values()), default=0)
        names = [x.name for x in info.linears if x.name in self.job.candidates]
        found: dict[str, list[tuple[LinearSpec, float, None]]] = {name: [] for name in names}
        for number, members in groups_of(info).items():
            weights = {x.name: weight_of(block, info, x).contiguous() for x in members if x.name in found}
            mean = seen.pop(number)
            known = seen_by(mean, members[0])
            share = mean.tokens / max(most, 1)  # of an expert's input: a mean over the tokens routed there
            for name, spec, error in rounding_errors(self.job, weights, known):
                loss = proxy_loss(weights[name], weights[name] + error, mean.hessian) * share
                found[name].append((spec, max(loss, 0.0), None))
        self.layers += [layer_score(name, rows) for name, rows in found.items()]

    def finish(self) -> Measured:
        return Measured(tuple(self.layers))


def observer(job: ScoreJob) -> Observer:
    """Score every linear and candidate on the full-precision model's inputs."""
    return _ProxyLoss(job)
