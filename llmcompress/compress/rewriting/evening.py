"""Even ranges for what a linear reads from an earlier one (v -> o, up -> down): one static scale then fits all columns.

The rows of the source are divided, and the columns of the target multiplied, by a factor of their own: `peak^power`,
and more for the columns that would still stand out, so that none is wider than `room` times the median. A factor is
negative where a column's largest value is, so that all reach further up than down and a zero-point saves range. Equal
ranges (power 1) spread out the target's columns, which keep one scale per row; and a column whose largest value was
seen once has a larger one in other text. So power, room, and how far the range is shrunk, are chosen by the squared
error on tokens that the ranges were not taken from, plus that of rounding the weight.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from llmcompress.compress.rewriting.clipping import ActivationQuantizer, range_quantizer
from llmcompress.compress.rewriting.sites import Link

POWERS = (0.0, 0.25, 0.5, 0.75)
ROOMS = (1.0, 1.25, 1.5, 2.0, 3.0, math.inf)
SHRINKS = (0.7, 0.8, 0.9, 1.0)
FOLDS = 4
LOOKED_AT = 4096  # tokens that errors are counted on; ranges are those of all


class Shape(NamedTuple):
    """How columns are evened out: see above."""

    power: float
    room: float
    shrink: float


@dataclass(frozen=True)
class Evened:
    """What to divide each row of the source by, `(rows,)`, and the tensor-wise quantizer of the target's input then."""

    factor: Tensor
    quantizer: ActivationQuantizer


@dataclass(frozen=True)
class Reader:
    """The linear at the end of a link.

    link      from its source
    rows      of the source
    weight    (outputs, columns), in float64
    rounding  a weight -> what of it a reader of the file would see
    """

    link: Link
    rows: int
    weight: Tensor
    rounding: Callable[[Tensor], Tensor]

    def factor(self, ends: Tensor, power: float, room: float) -> Tensor:
        """What each row of the source is divided by `(rows,)`; 1 for rows that carry nothing.

        ends  (2, columns)  least and largest of what was seen, 0 among them
        """
        down, up = (self.link.reduce(end, self.rows) for end in (-ends[0], ends[1]))
        peak = torch.maximum(down, up)
        alive = peak > 0
        if not bool(alive.any()):
            return torch.ones_like(peak)
        factor = (peak / peak[alive].mean()).pow(power)
        factor = torch.maximum(factor, peak / ((peak / factor)[alive].median() * room))
        return torch.where(alive, torch.where(down > up, -factor, factor), torch.ones_like(peak))


def by_rows(weight: Tensor) -> Tensor:
    """A weight in 8 bits with one symmetric scale per row: what integer hardware multiplies by static inputs."""
    scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    return torch.round(weight / scale) * scale


def even_out(inputs: Tensor, reader: Reader, bits: int, *, unseen: Tensor | None = None) -> Evened:
    """The factors of least expected error.

    inputs  (tokens, columns of the reader), first tokens among them: their large values keep to few columns
    unseen  (2, columns)  least and largest values that ranges are to hold besides
    """
    errors = expected_errors(inputs, reader, bits, unseen=unseen)
    best = min(errors, key=errors.__getitem__)
    ends = _ends(inputs, unseen)
    factor = reader.factor(ends, best.power, best.room)
    return Evened(factor, _fit(ends, reader.link.gather(factor, 1.0), shrink=best.shrink, bits=bits))


def expected_errors(inputs: Tensor, reader: Reader, bits: int, *, unseen: Tensor | None = None) -> dict[Shape, float]:
    """Of each shape the mean squared error in the reader's output, errors of columns taken as independent.

    Every fold of the tokens is rounded with the factors and the range of the others. The mean over folds is geometric:
    a peak that one fold alone has, which all factors miss alike when it is left out, must not drown how they differ.
    """
    folds = inputs.chunk(FOLDS)
    known = [_ends(torch.cat(_others(folds, place)), unseen) for place in range(len(folds))]
    step = (len(inputs) // LOOKED_AT) | 1  # odd, or it would keep step with the beginnings of sequences
    held = [fold[::step].double() for fold in folds]
    gains = reader.weight.square().sum(0)
    everything, energy = _ends(inputs, unseen), inputs.double().square().mean(0)
    found: dict[Shape, float] = {}
    for power, room in product(POWERS, ROOMS):
        of_weight = _weight_error(reader, reader.factor(everything, power, room), energy)
        logs = dict.fromkeys(SHRINKS, 0.0)
        for ends, tokens in zip(known, held, strict=True):
            columns = reader.link.gather(reader.factor(ends, power, room), 1.0)
            even, weights = tokens / columns, columns.square() * gains
            for shrink in SHRINKS:
                change = _fit(ends, columns, shrink=shrink, bits=bits)(even) - even
                error = float((change.square() @ weights).mean()) + of_weight
                logs[shrink] += math.log(error) if error > 0 else -math.inf
        found |= {Shape(power, room, shrink): math.exp(total / len(folds)) for shrink, total in logs.items()}
    return found


def _others(folds: tuple[Tensor, ...], place: int) -> tuple[Tensor, ...]:
    """All folds but one; the only one where there is no other."""
    return folds if len(folds) == 1 else folds[:place] + folds[place + 1 :]


def _ends(inputs: Tensor, unseen: Tensor | None) -> Tensor:
    """Least and largest value of every column `(2, columns)`, 0 among them."""
    ends = torch.stack([inputs.amin(0), inputs.amax(0)]).double()
    if unseen is not None:
        ends = torch.stack([torch.minimum(ends[0], unseen[0]), torch.maximum(ends[1], unseen[1])])
    return torch.stack([ends[0].clamp_max(0), ends[1].clamp_min(0)])


def _weight_error(reader: Reader, factor: Tensor, energy: Tensor) -> float:
    columns = reader.link.gather(factor, 1.0)
    change = reader.rounding(reader.weight * columns) / columns - reader.weight
    return float((change.square() @ energy).sum())


def _fit(ends: Tensor, columns: Tensor, *, shrink: float, bits: int) -> ActivationQuantizer:
    """The tensor-wise quantizer of columns with these ends, once they are divided."""
    divided = ends / columns
    return range_quantizer(divided.min() * shrink, divided.max() * shrink, bits)
