"""Measured exchange: after a program has solved, let the model itself say which moves still pay.

Each round measures every single step of a unit to its next narrower and next wider format around the plan as it
stands, on one part of the text. The most promising exchanges (some up, some down, within the budget), and the
exact solution of the program over these steps, are then measured on another part, and the best of them is
taken when its gain is more than its standard error. Damages are differences on common tokens.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor

from llmcompress.compress.allocate.integer import Choices, InfeasibleError, solve
from llmcompress.compress.measuring import Changes, MeasureJob, Text
from llmcompress.compress.statistics import mean, standard_error
from llmcompress.compress.swaps import measure_swaps
from llmcompress.types import Exchange, LinearInfo, LinearSpec, Move

LEAST_GAIN = 1.0  # standard errors a gain must reach on the second part of the text


@dataclass(frozen=True)
class ExchangeUnit:
    """A unit, the formats of its linears from narrow to wide, and their storage bits."""

    name: str
    linears: tuple[LinearInfo, ...]
    options: tuple[tuple[LinearSpec, ...], ...]  # by width, then linear
    costs: tuple[int, ...]

    def changes(self, place: int) -> dict[str, LinearSpec]:
        """The formats at one width."""
        return {x.name: spec for x, spec in zip(self.linears, self.options[place], strict=True)}

    def bits(self, place: int) -> int:
        """Width of an option."""
        return self.options[place][0].bits


@dataclass(frozen=True)
class Limits:
    """Storage bits a plan may take, at least and at most."""

    minimum: int
    maximum: int


Steps = tuple[tuple[int, int], ...]  # unit, new place
Gains = Mapping[tuple[int, int], float]


def exchange_units(
    units: Mapping[str, tuple[LinearInfo, ...]], candidates: Mapping[str, Sequence[LinearSpec]]
) -> tuple[ExchangeUnit, ...]:
    """The units with the formats all their linears could get."""
    found = []
    for name, members in units.items():
        widths = sorted(set.intersection(*({s.bits for s in candidates[x.name]} for x in members)))
        options = tuple(
            tuple(next(s for s in candidates[x.name] if s.bits == bits) for x in members) for bits in widths
        )
        costs = tuple(
            sum(spec.storage_bits(x.rows, x.columns) for x, spec in zip(members, option, strict=True))
            for option in options
        )
        found.append(ExchangeUnit(name, members, options, costs))
    return tuple(found)


class Exchanger:
    """Improves an assignment by measured exchange."""

    def __init__(
        self, job: MeasureJob, units: Sequence[ExchangeUnit], limits: Limits, *, memory_bytes: int, proposals: int
    ) -> None:
        self.job, self.units, self.limits = job, tuple(units), limits
        self.memory_bytes, self.proposals = memory_bytes, proposals

    def changes(self, places: Sequence[int]) -> dict[str, LinearSpec]:
        """The formats of a whole assignment."""
        found: dict[str, LinearSpec] = {}
        for unit, place in zip(self.units, places, strict=True):
            found |= unit.changes(place)
        return found

    def cost(self, places: Sequence[int]) -> int:
        """Storage bits of an assignment."""
        return sum(unit.costs[place] for unit, place in zip(self.units, places, strict=True))

    def _differences(self, places: Sequence[int], steps: Sequence[Steps], text: Text) -> Tensor:
        """Change of KL per sequence, `(steps, sequences)`."""
        variants: list[Changes] = []
        for step in steps:
            changes: dict[str, LinearSpec] = {}
            for unit, place in step:
                changes |= self.units[unit].changes(place)
            variants.append(changes)
        klds = measure_swaps(self.job, self.changes(places), variants, text=text, memory_bytes=self.memory_bytes)
        return klds[1:] - klds[0]

    def round(self, places: tuple[int, ...], first: Text, second: Text) -> tuple[tuple[int, ...], Exchange | None]:
        """One round; the assignment after it, and what was exchanged, None where nothing paid."""
        singles: list[Steps] = [
            ((unit, place + step),)
            for unit, place in enumerate(places)
            for step in (-1, 1)
            if 0 <= place + step < len(self.units[unit].options)
        ]
        if not singles:
            return places, None
        gains = {
            single[0]: shrunk(row.tolist())
            for single, row in zip(singles, self._differences(places, singles, first), strict=True)
        }
        crew = self.job.skeleton.crew
        steps = [tuple(map(tuple, step)) for step in crew.first(lambda: self._proposed(places, gains))]
        if not steps:
            return places, None
        measured = [(mean(row), standard_error(row)) for row in self._differences(places, steps, second).tolist()]
        best = min(range(len(steps)), key=lambda place: measured[place][0])
        change, error = measured[best]
        if change + LEAST_GAIN * error >= 0:
            return places, None
        after = list(places)
        for unit, place in steps[best]:
            after[unit] = place
        moves = tuple(
            Move(unit=self.units[unit].name, before=self.units[unit].bits(places[unit]),
                 after=self.units[unit].bits(place))
            for unit, place in steps[best]
        )  # fmt: skip
        return tuple(after), Exchange(moves=moves, change=change, standard_error=error)

    def _proposed(self, places: tuple[int, ...], gains: Gains) -> list[Steps]:
        """The exact solution over single steps, and the best small exchanges, by what the steps promise."""
        cost = self.cost(places)
        extra = {
            step: self.units[step[0]].costs[step[1]] - self.units[step[0]].costs[places[step[0]]] for step in gains
        }
        best = sorted(gains, key=lambda step: gains[step])
        ups, downs = [s for s in best if extra[s] > 0], [s for s in best if extra[s] < 0]
        found: dict[Steps, float] = {}
        for size_up, size_down in ((1, 1), (1, 0), (0, 1), (1, 2), (2, 1)):
            for up in itertools.combinations(ups[:24], size_up):
                for down in itertools.combinations(downs[:24], size_down):
                    steps = tuple(sorted((*up, *down)))
                    total = cost + sum(extra[s] for s in steps)
                    promise = sum(gains[s] for s in steps)
                    distinct = len({unit for unit, _ in steps}) == len(steps)
                    if distinct and promise < 0 and self.limits.minimum <= total <= self.limits.maximum:
                        found[steps] = promise
        ranked = sorted(found, key=lambda steps: (found[steps], steps))[: self.proposals]
        solved = self._solved(places, gains)
        return [solved, *(s for s in ranked if s != solved)] if solved else ranked

    def _solved(self, places: tuple[int, ...], gains: Gains) -> Steps:
        """Every unit stays or takes one step: the program's own answer."""
        units, options = [], []
        for number, (unit, place) in enumerate(zip(self.units, places, strict=True)):
            around = [place, *(p for p in (place - 1, place + 1) if (number, p) in gains)]
            values = [gains.get((number, p), 0.0) for p in around]
            least = min(values)
            units.append(Choices(tuple(unit.costs[p] for p in around), tuple(v - least for v in values)))
            options.append(around)
        try:
            solution = solve(units, self.limits.maximum, minimum=self.limits.minimum)
        except InfeasibleError:
            return ()
        return tuple((n, options[n][chosen]) for n, chosen in enumerate(solution.chosen) if chosen)


def shrunk(values: Sequence[float]) -> float:
    """A mean over sequences, pulled towards zero by as much as it is noise: `m^3 / (m^2 + s^2)`."""
    middle, error = mean(values), standard_error(values)
    if not numpy.isfinite(error) or middle == 0:
        return 0.0
    return middle**3 / (middle**2 + error**2)


def halves(tokens: Tensor, batch_size: int, calibration: list[Tensor]) -> tuple[Text, Text]:
    """Two texts to judge by, rows taken in turn, with the same calibration text."""
    return tuple(Text(calibration, list(torch.split(tokens[part::2], batch_size))) for part in (0, 1))  # type: ignore[return-value]
