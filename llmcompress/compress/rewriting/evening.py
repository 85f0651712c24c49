"""Even ranges for what a linear reads from an earlier one (v -> o, up -> down): one static scale then fits all columns.

The rows of the source are divided, and the columns of the target multiplied, by `peak^power`, up to a common factor.
Power 1 gives every column the same range, as RepQuant does behind norms, but spreads out the target's columns, which
keep one scale per row; and a column whose largest value was seen once has a larger one in other text. So the power, and
how far the range is shrunk, are chosen by the squared error on tokens that the ranges were not taken from, plus that of
rounding the weight.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from llmcompress.compress.rewriting.clipping import ActivationQuantizer, range_quantizer
from llmcompress.compress.rewriting.sites import Link

POWERS = (0.0, 0.25, 0.5, 0.625, 0.75, 0.875, 1.0)
SHRINKS = (0.85, 1.0)
FOLDS = 4
LOOKED_AT = 4096  # tokens that errors are counted on; ranges are those of all


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

    def factor(self, low: Tensor, high: Tensor, power: float) -> Tensor:
        """`peak^power` of each row of the source, over its mean `(rows,)`; 1 for rows that carry nothing.

        low, high  (columns,) ends of what was seen
        """
        peak = self.link.reduce(torch.maximum(-low, high), self.rows)
        alive = peak > 0
        if not bool(alive.any()):
            return torch.ones_like(peak)
        return torch.where(alive, (peak / peak[alive].mean()).pow(power), torch.ones_like(peak))


def by_rows(weight: Tensor) -> Tensor:
    """A weight in 8 bits with one symmetric scale per row: what integer hardware multiplies by static inputs."""
    scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    return torch.round(weight / scale) * scale


def even_out(inputs: Tensor, reader: Reader, bits: int) -> Evened:
    """The factors of least expected error.

    inputs  (tokens, columns of the reader), first tokens among them: their large values keep to few columns
    """
    low, high = inputs.amin(0).double(), inputs.amax(0).double()
    power, shrink = min(product(POWERS, SHRINKS), key=expected_errors(inputs, reader, bits).__getitem__)
    factor = reader.factor(low, high, power)
    return Evened(factor, _fit(low, high, reader.link.gather(factor, 1.0), shrink=shrink, bits=bits))


def expected_errors(inputs: Tensor, reader: Reader, bits: int) -> dict[tuple[float, float], float]:
    """Of each power and shrink the mean squared error in the reader's output, errors of columns taken as independent.

    Every fold of the tokens is rounded with the factors and the range of the others.
    """
    folds = inputs.chunk(FOLDS)
    lows = torch.stack([fold.amin(0) for fold in folds]).double()
    highs = torch.stack([fold.amax(0) for fold in folds]).double()
    step = (len(inputs) // LOOKED_AT) | 1  # odd, or it would keep step with the beginnings of sequences
    held = [fold[::step].double() for fold in folds]
    gains = reader.weight.square().sum(0)
    found: dict[tuple[float, float], float] = {}
    for power in POWERS:
        of_weight = _weight_error(inputs, reader, reader.factor(lows.amin(0), highs.amax(0), power))
        errors = dict.fromkeys(SHRINKS, 0.0)
        for place, tokens in enumerate(held):
            low, high = _others(lows, place).amin(0), _others(highs, place).amax(0)
            columns = reader.link.gather(reader.factor(low, high, power), 1.0)
            for shrink in SHRINKS:
                quantizer = _fit(low, high, columns, shrink=shrink, bits=bits)
                change = quantizer(tokens / columns) * columns - tokens
                errors[shrink] += float((change.square() @ gains).sum())
        seen = sum(map(len, held))
        found |= {(power, shrink): error / seen + of_weight for shrink, error in errors.items()}
    return found


def _others(folds: Tensor, place: int) -> Tensor:
    """All folds but one; the only one where there is no other."""
    return folds if len(folds) == 1 else torch.cat([folds[:place], folds[place + 1 :]])


def _weight_error(inputs: Tensor, reader: Reader, factor: Tensor) -> float:
    columns = reader.link.gather(factor, 1.0)
    change = reader.rounding(reader.weight * columns) / columns - reader.weight
    return float((change.square() @ inputs.double().square().mean(0)).sum())


def _fit(low: Tensor, high: Tensor, columns: Tensor, *, shrink: float, bits: int) -> ActivationQuantizer:
    """The tensor-wise quantizer of columns with these ends, once they are divided."""
    return range_quantizer((low / columns).min() * shrink, (high / columns).max() * shrink, bits)
