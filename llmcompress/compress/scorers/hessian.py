"""Proxy loss: squared output error of a linear, `tr(dW H dW^T)` with `H` the mean of `x x^T` over tokens.

Local to the linear: it does not know how much the model's output depends on it.
"""

from functools import partial

from llmcompress.compress.grid import proxy_loss
from llmcompress.compress.observe import collect_hessians, weight_of
from llmcompress.compress.scoring import ScoreJob, rounding_errors
from llmcompress.types import Candidate, LayerScore, Unit

UNIT: Unit = "proxy loss"
NEEDS_DATA = True


def score(job: ScoreJob) -> tuple[LayerScore, ...]:
    """Score every linear and candidate on the full-precision model's inputs."""
    stream, tokens = job.stream()
    hidden, calls = stream.start(tokens)
    job.skeleton.free_rest()
    found = []
    for info in job.trace.blocks:
        block = job.skeleton.load_block(info.index)

        runs = [
            partial(stream.run_block, info.index, entering, call[info.index])
            for entering, call in zip(hidden, calls, strict=True)
        ]
        hessians, hidden = collect_hessians(block, info, runs)
        for linear in info.linears:
            if linear.name not in job.candidates:
                continue
            weight = weight_of(block, info, linear)
            candidates = []
            hessian = hessians[linear.shared_input]
            for spec, error in rounding_errors(job, linear, weight.contiguous(), hessian):
                loss = proxy_loss(weight, weight + error, hessian)
                candidates.append(Candidate(spec=spec, damage=max(loss, 0.0)))
            found.append(LayerScore(linear=linear.name, candidates=tuple(candidates)))
        job.skeleton.free(block)
    return tuple(found)
