"""The exact multiple-choice integer program: one candidate per unit, least damage within a budget.

    minimise sum_u damage[u][x_u]   subject to   minimum <= sum_u cost[u][x_u] <= budget

Costs are true storage bits (integers), so feasibility is decided in exact arithmetic, whatever
tolerance the solver works with.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from llmcompress.errors import CompressError

RELATIVE_GAP = 1e-9
TIME_LIMIT_SECONDS = 20.0


class InfeasibleError(CompressError):
    """No choice of candidates meets the budget; `smallest` and `largest` are the totals that can be had."""

    def __init__(self, smallest: int, largest: int) -> None:
        super().__init__("no allocation meets the budget")
        self.smallest = smallest
        self.largest = largest


@dataclass(frozen=True)
class Choices:
    """What one unit could get: `costs[i]` storage bits for `damages[i]`."""

    costs: tuple[int, ...]
    damages: tuple[float, ...]


@dataclass(frozen=True)
class Solution:
    """Index of the candidate each unit gets, with the proven lower bound of the objective."""

    chosen: tuple[int, ...]
    cost: int
    damage: float
    bound: float
    optimal: bool


def total(units: Sequence[Choices], chosen: Sequence[int]) -> tuple[int, float]:
    """Exact cost, and damage, of a choice."""
    cost = sum(unit.costs[i] for unit, i in zip(units, chosen, strict=True))
    return cost, math.fsum(unit.damages[i] for unit, i in zip(units, chosen, strict=True))


def solve(
    units: Sequence[Choices], budget: int, *, minimum: int = 0, time_limit: float = TIME_LIMIT_SECONDS
) -> Solution:
    """Solve with HiGHS. Raises InfeasibleError when nothing fits between `minimum` and `budget`."""
    smallest = sum(min(unit.costs) for unit in units)
    largest = sum(max(unit.costs) for unit in units)
    if smallest > budget or largest < minimum:
        raise InfeasibleError(smallest, largest)
    allowed = budget
    while True:  # a solver's tolerance may let the total pass the budget by a hair: then ask for that hair back
        found = _milp(units, allowed, minimum, time_limit)
        if found is None:
            raise InfeasibleError(smallest, largest)
        chosen, bound, optimal = found
        cost, damage = total(units, chosen)
        if minimum <= cost <= budget:
            return Solution(chosen, cost, damage, min(bound, damage), optimal)
        if cost < minimum:
            raise InfeasibleError(smallest, largest)
        allowed -= cost - budget


def _milp(
    units: Sequence[Choices], budget: int, minimum: int, time_limit: float
) -> tuple[tuple[int, ...], float, bool] | None:
    sizes = [len(unit.costs) for unit in units]
    starts = numpy.concatenate([[0], numpy.cumsum(sizes)])
    costs = numpy.array([c for unit in units for c in unit.costs], dtype=numpy.float64)
    damages = numpy.array([d for unit in units for d in unit.damages], dtype=numpy.float64)
    worst = float(damages.max()) or 1.0
    rows = numpy.repeat(numpy.arange(len(units)), sizes)
    one_each = csr_array((numpy.ones(len(costs)), (rows, numpy.arange(len(costs)))))
    scale = float(max(budget, 1)) / 1e4
    answer = milp(
        damages * (1e6 / worst),
        integrality=numpy.ones(len(costs), dtype=numpy.int64),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(csr_array(costs[None, :] / scale), minimum / scale, budget / scale),
        ],
        options={"mip_rel_gap": RELATIVE_GAP, "time_limit": time_limit},
    )
    if answer.x is None:
        return None
    chosen = tuple(int(numpy.argmax(answer.x[start:stop])) for start, stop in pairwise(starts))
    bound = answer.mip_dual_bound if answer.mip_dual_bound is not None else 0.0
    return chosen, float(bound) * worst / 1e6, answer.status == 0
