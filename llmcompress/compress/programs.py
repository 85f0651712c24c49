"""The programs that spend a budget, as `spend` takes them: from its units to one choice for each."""

import math
from collections.abc import Mapping, Sequence

import numpy
from numpy.typing import NDArray

from llmcompress.compress.allocate.integer import InfeasibleError, Solution, total
from llmcompress.compress.allocate.order import two_widths
from llmcompress.compress.allocate.quadratic import minimise, psd, shrink
from llmcompress.compress.allocate.spend import Program, SpendUnit
from llmcompress.errors import InputError
from llmcompress.types import ModelTrace, Scores

Matrix = NDArray[numpy.float64]


def block_importance(trace: ModelTrace, scores: Scores) -> tuple[float, ...]:
    """Mean importance of each block's linears. Raises InputError for scores that are damages, not importances."""
    found = {layer.linear: layer.importance for layer in scores.layers}
    values = []
    for info in trace.blocks:
        known = [v for x in info.linears if (v := found.get(x.name)) is not None]
        if info.linears and not known:
            raise InputError(
                f"{scores.scorer} gives damages, not an importance to order blocks by",
                "use --set scorer=lim or --set scorer=zd with --set plan.program=order",
            )
        values.append(math.fsum(known) / len(known) if known else 0.0)
    return tuple(values)


def block_order(trace: ModelTrace, scores: Scores) -> Program:
    """The two-width mix of arXiv 2406.17415: the most important blocks get the wider of two formats.

    Units with one format, pinned ones and the head, keep it. Raises InputError where a unit has more than two.
    """
    importance = block_importance(trace, scores)
    block_of: dict[str, int] = {}
    for info in trace.blocks:
        for x in info.linears:
            if block_of.setdefault(x.unit, info.index) != info.index:
                raise InputError(
                    "the order program goes by blocks, and the experts of all blocks share a format",
                    "use --set plan.experts=block",
                )

    def program(units: Sequence[SpendUnit], budget: int, minimum: int) -> Solution:
        blocks, costs, places = [], [], []
        for place, unit in enumerate(units):
            if len(unit.choices.costs) > 2:
                raise InputError(
                    "the order program mixes two widths, and more are allowed", "use --set plan.bits=[3,4]"
                )
            if len(unit.choices.costs) == 2:
                blocks.append(block_of[unit.linears[0].unit])
                costs.append((min(unit.choices.costs), max(unit.choices.costs)))
                places.append(place)
        fixed = sum(unit.choices.costs[0] for unit in units if len(unit.choices.costs) == 1)
        wide = two_widths(importance, blocks, costs, budget - fixed)
        chosen = [0] * len(units)
        for place, high, pair in zip(places, wide, costs, strict=True):
            chosen[place] = units[place].choices.costs.index(pair[high])
        cost, damage = total([unit.choices for unit in units], chosen)
        if cost < minimum:
            raise InfeasibleError(fixed + sum(low for low, _ in costs), fixed + sum(high for _, high in costs))
        return Solution(tuple(chosen), cost, damage, damage, False)

    return program


def interactions(gram: Matrix, damages: Sequence[float]) -> Matrix:
    """A quadratic program's matrix: the damages on its diagonal, cross terms with the correlations of `gram`.

    Gram and damages measure the same thing in different ways; the damages are the better known. Positive
    semidefinite, cross terms shrunk by half: noise in them would be exploited otherwise.
    """
    size = numpy.sqrt(numpy.maximum(gram.diagonal(), 1e-300))
    scale = numpy.sqrt(2 * numpy.maximum(numpy.asarray(damages, dtype=numpy.float64), 0.0)) / size
    return psd(shrink(gram * scale[:, None] * scale[None, :]))


def quadratic(places: Mapping[tuple[str, int], int], gram: Matrix) -> Program:
    """The quadratic program with measured interactions; `places[unit, bits]` is a row of `gram`.

    Widths that were not measured count no interactions.
    """

    def program(units: Sequence[SpendUnit], budget: int, minimum: int) -> Solution:
        rows, damages = [], []
        for unit in units:
            rows += [places.get((unit.linears[0].unit, spec.bits), -1) for spec in unit.specs]
            damages += list(unit.choices.damages)
        known = numpy.array(rows)
        matrix = gram[numpy.ix_(known, known)].copy()
        matrix[known < 0] = 0.0
        matrix[:, known < 0] = 0.0
        choices = [unit.choices for unit in units]
        interacting = interactions(matrix, damages)
        numpy.fill_diagonal(interacting, 0.0)
        found = minimise(choices, interacting, budget, minimum=minimum)
        return Solution(found.chosen, found.cost, found.objective, found.bound, found.gap <= 1e-9)

    return program
