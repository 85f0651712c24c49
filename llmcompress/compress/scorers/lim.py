"""LIM, layer input modification (arXiv 2406.17415): minus the cosine between what enters and leaves a block.

In `[-1, 1]`; larger means the block changes its input more. The importance given is `1 + LIM`, and at least
1e-6, so that a block that changes nothing counts next to nothing. Options: `lim.mode` `token` (cosine per
token, then mean) or `flat` (one cosine per sequence, tokens and features flattened); `lim.skip_first` leaves
out position 0, whose huge norm in attention-sink models hides the rest.
"""

import torch
from torch import Tensor, nn

from llmcompress.compress.scoring import Measured, Observer, ScoreJob, layers_from_blocks
from llmcompress.types import BlockTrace, Series, Unit

UNIT: Unit = "unitless"
NEEDS_DATA = True
FLOOR = 1e-6  # what float32 cannot tell from a cosine of one


def modification(entering: Tensor, leaving: Tensor, *, mode: str = "token", skip_first: bool = True) -> Tensor:
    """LIM of each sequence, float64 `(batch,)`, from hidden states `(batch, tokens, hidden)`.

    One minus a cosine is half the squared chord between the unit vectors. Unlike the cosine itself, the chord
    loses no digits where a block changes little, so that it may stay in the precision of the hidden states:
    copies of them in float64 would cost a quarter of the pass that is watched.
    """
    first = 1 if skip_first and entering.shape[1] > 1 else 0
    units = []
    for hidden in (entering[:, first:], leaving[:, first:]):
        length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
        if mode == "flat":
            length = torch.linalg.vector_norm(length.double(), dim=1, keepdim=True).to(hidden.dtype)
        units.append(hidden / length.clamp_min(1e-30))
    chords: Tensor = torch.linalg.vector_norm(units[0].sub_(units[1]), dim=-1).double().square()
    return (chords.sum(-1) if mode == "flat" else chords.mean(-1)).clamp(0.0, 4.0) / 2 - 1


class _Modification(Observer):
    """Keeps the mean LIM of each block."""

    SHARES = True

    def __init__(self, job: ScoreJob) -> None:
        super().__init__(job)
        self.found: dict[int, list[Tensor]] = {}

    def see(self, info: BlockTrace, entering: Tensor, leaving: Tensor) -> None:
        options = self.job.options.lim
        values = modification(entering, leaving, mode=options.mode, skip_first=options.skip_first)
        self.found.setdefault(info.index, []).append(values)

    def close(self, block: nn.Module, info: BlockTrace) -> None:
        self.found[info.index] = self.share.all(self.found.get(info.index, []))

    def finish(self) -> Measured:
        lim = tuple(float(torch.cat(self.found[index]).mean()) for index in sorted(self.found))
        importance = [max(1.0 + value, FLOOR) for value in lim]
        return Measured(layers_from_blocks(self.job, importance), (Series(name="lim", values=lim),))


def observer(job: ScoreJob) -> Observer:
    """Score every linear by the LIM of its block, measured on the full-precision model."""
    return _Modification(job)
