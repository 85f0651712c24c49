"""ZD, z-score distribution (arXiv 2406.17415): share of a block's weights more than one deviation above the mean.

Data-free. A *smaller* share is taken as more important, so the importance given is its inverse.
Option `zd_sides`: `one` counts `z > 1`, `two` counts `|z| > 1`.
"""

import torch
from torch import Tensor

from llmcompress.compress.observe import weight_of
from llmcompress.compress.scoring import ScoreJob, score_from_importance
from llmcompress.types import LayerScore, Unit

UNIT: Unit = "unitless"
NEEDS_DATA = False


def z_share(weights: list[Tensor], *, two_sided: bool = False) -> float:
    """Share of the pooled weights with `z > 1` (or `|z| > 1`), mean and deviation over the whole pool."""
    pool = torch.cat([weight.flatten() for weight in weights]).double()
    z = (pool - pool.mean()) / pool.std(correction=0).clamp_min(1e-300)
    beyond = z.abs() > 1 if two_sided else z > 1
    return float(beyond.double().mean())


def score(job: ScoreJob) -> tuple[LayerScore, ...]:
    """Score every linear by the ZD of its block."""
    found = []
    for info in job.trace.blocks:
        block = job.skeleton.load_block(info.index)
        weights = {linear.name: weight_of(block, info, linear) for linear in info.linears}
        if weights:
            share = z_share(list(weights.values()), two_sided=job.options.zd_sides == "two")
            importance = 1.0 / max(share, 1e-6)
            for linear in info.linears:
                if linear.name in job.candidates:
                    found.append(score_from_importance(job, linear, weights[linear.name], importance))
        job.skeleton.free(block)
    return tuple(found)
