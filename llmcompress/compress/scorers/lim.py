"""LIM, layer input modification (arXiv 2406.17415): minus the cosine between what enters and leaves a block.

In `[-1, 1]`; larger means the block changes its input more. The importance given is `1 + LIM`, so that
a block that changes nothing counts nothing. Options: `lim_mode` `token` (cosine per token, then mean) or
`flat` (one cosine per sequence, tokens and features flattened); `lim_skip_first` leaves out position 0,
whose huge norm in attention-sink models hides the rest.
"""

import torch
from torch import Tensor

from llmcompress.compress.observe import weight_of
from llmcompress.compress.scoring import ScoreJob, score_from_importance
from llmcompress.types import LayerScore, Unit

UNIT: Unit = "unitless"
NEEDS_DATA = True


def modification(entering: Tensor, leaving: Tensor, *, mode: str = "token", skip_first: bool = True) -> Tensor:
    """LIM of each sequence, float64 `(batch,)`, from hidden states `(batch, tokens, hidden)`."""
    first = 1 if skip_first and entering.shape[1] > 1 else 0
    before, after = entering[:, first:].double(), leaving[:, first:].double()
    if mode == "flat":
        return -torch.cosine_similarity(before.flatten(1), after.flatten(1), dim=-1)
    return -torch.cosine_similarity(before, after, dim=-1).mean(-1)


def score(job: ScoreJob) -> tuple[LayerScore, ...]:
    """Score every linear by the LIM of its block, measured on the full-precision model."""
    stream, tokens = job.stream()
    hidden, calls = stream.start(tokens)
    job.skeleton.free_rest()
    found = []
    for info in job.trace.blocks:
        block = job.skeleton.load_block(info.index)
        values = []
        for place, call in enumerate(calls):
            with torch.no_grad():
                leaving = stream.run_block(info.index, hidden[place], call[info.index])
            values.append(
                modification(hidden[place], leaving, mode=job.options.lim_mode, skip_first=job.options.lim_skip_first)
            )
            hidden[place] = leaving
        importance = 1.0 + float(torch.cat(values).mean())
        for linear in info.linears:
            if linear.name in job.candidates:
                weight = weight_of(block, info, linear)
                found.append(score_from_importance(job, linear, weight, max(importance, 0.0)))
        job.skeleton.free(block)
    return tuple(found)
