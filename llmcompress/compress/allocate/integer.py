"""The exact multiple-choice integer program: one candidate per unit, in both directions.

    solve      minimise sum_u damage[u][x_u]   subject to   minimum <= sum_u cost[u][x_u] <= budget
    cheapest   minimise sum_u cost[u][x_u]     subject to   sum_u damage[u][x_u] <= damage_limit

Costs are true storage bits (integers) and damages are added up without rounding, so feasibility is decided
exactly, whatever tolerance a solver works with. `frontier` is the lower convex hull of all (cost, damage) pairs.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from llmcompress.compress.allocate.sweep import sweep
from llmcompress.errors import CompressError, InputError

RELATIVE_GAP = 1e-9
TIME_LIMIT_SECONDS = 20.0
MOST_REFUSALS = 8  # answers that only a solver's tolerance allows and that are forbidden one by one
LARGEST_COST = 2**53  # costs are exact as float64 up to here

Tie = Sequence[tuple[int, int]]
Array = NDArray[numpy.float64]


class InfeasibleError(CompressError):
    """No choice of candidates meets the limit; `smallest` and `largest` are the totals that can be had."""

    def __init__(self, smallest: float, largest: float) -> None:
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


@dataclass(frozen=True)
class Point:
    """A vertex of the lower convex hull: the least `damage` that `cost` bits can buy."""

    cost: int
    damage: float
    chosen: tuple[int, ...]


def total(units: Sequence[Choices], chosen: Sequence[int]) -> tuple[int, float]:
    """Exact cost, and damage, of a choice."""
    cost = sum(unit.costs[i] for unit, i in zip(units, chosen, strict=True))
    return cost, math.fsum(unit.damages[i] for unit, i in zip(units, chosen, strict=True))


def reachable(units: Sequence[Choices], smallest: int, window: tuple[int, int]) -> bool:
    """False where no total can lie in a window: all totals differ from the smallest by a common divisor's multiples.

    Costs of equal layers have large common divisors, and a solver may take long to prove the same.
    """
    step = math.gcd(*(cost - unit.costs[0] for unit in units for cost in unit.costs))
    low, high = window
    if step == 0:
        return low <= smallest <= high
    return smallest + (high - smallest) // step * step >= low


def solve(
    units: Sequence[Choices],
    budget: int,
    *,
    minimum: int = 0,
    time_limit: float = TIME_LIMIT_SECONDS,
    ties: Sequence[Tie] = (),
) -> Solution:
    """Least damage for at most `budget` bits.

    ties     each a group of `(unit, candidate)` that are chosen together or not at all: the 0-bit candidates
             of a dropped block, the same format of tied weights or of a block's experts

    Raises InfeasibleError with the totals that can be had when nothing fits between `minimum` and `budget`.
    """
    _check(units)
    smallest, largest = (total(units, _extreme(_costs(units), ties, sign))[0] for sign in (1, -1))
    if smallest > budget or largest < minimum or not reachable(units, smallest, (minimum, budget)):
        raise InfeasibleError(smallest, largest)
    floor = float(minimum) if minimum > smallest else -math.inf
    program = _Program(_damages(units), _costs(units), float(budget), floor, tuple(ties))
    found = program.best(lambda chosen: minimum <= total(units, chosen)[0] <= budget, time_limit)
    if found is None:
        raise InfeasibleError(smallest, largest)
    chosen, bound, optimal = found
    cost, damage = total(units, chosen)
    return Solution(chosen, cost, damage, min(bound, damage), optimal)


def cheapest(
    units: Sequence[Choices],
    damage_limit: float,
    *,
    time_limit: float = TIME_LIMIT_SECONDS,
    ties: Sequence[Tie] = (),
) -> Solution:
    """Fewest bits for a damage of at most `damage_limit`; `bound` is a lower bound of the cost.

    The limit is checked on the correctly rounded sum. `ties` as in `solve`. Raises InfeasibleError with the
    smallest and the largest damage that can be had when the limit lies below all of them.
    """
    _check(units)
    if math.isnan(damage_limit):
        raise InputError("the damage limit is not a number", "give a limit in the unit of the scores")
    least, most = (_extreme(_damages(units), ties, sign) for sign in (1, -1))
    smallest, largest = total(units, least)[1], total(units, most)[1]
    if smallest > damage_limit:
        raise InfeasibleError(smallest, largest)
    program = _Program(_costs(units), _damages(units), min(damage_limit, largest), -math.inf, tuple(ties))
    found = program.best(lambda chosen: total(units, chosen)[1] <= damage_limit, time_limit)
    chosen, bound, optimal = found if found is not None else (least, -math.inf, False)
    cost, damage = total(units, chosen)
    floor = sum(min(unit.costs) for unit in units)
    return Solution(chosen, cost, damage, min(max(bound, floor), cost), optimal or cost == floor)


def frontier(units: Sequence[Choices]) -> tuple[Point, ...]:
    """Every vertex of the lower convex hull of (cost, damage), from the cheapest choice to the least damage.

    Neighbouring points differ in one unit, costs rise strictly and damages fall strictly. Each point is optimal
    for its own cost, and between points the straight line bounds the integer optimum from below.
    """
    _check(units)
    hulls = [_hull(unit) for unit in units]
    steps = []
    for u, (unit, hull) in enumerate(zip(units, hulls, strict=True)):
        for place, (a, b) in enumerate(pairwise(hull)):
            slope = (unit.damages[b] - unit.damages[a]) / (unit.costs[b] - unit.costs[a])
            steps.append((slope, u, place, b))
    chosen = [hull[0] for hull in hulls]
    cost, damages = total(units, chosen)[0], [unit.damages[i] for unit, i in zip(units, chosen, strict=True)]
    points = [Point(cost, math.fsum(damages), tuple(chosen))]
    for _, u, _, option in sorted(steps):
        cost += units[u].costs[option] - units[u].costs[chosen[u]]
        chosen[u], damages[u] = option, units[u].damages[option]
        points.append(Point(cost, math.fsum(damages), tuple(chosen)))
    return tuple(points)


def _hull(unit: Choices) -> list[int]:
    """Candidates on the lower convex hull of one unit, by cost; slopes rise strictly towards zero."""
    order = sorted(range(len(unit.costs)), key=lambda i: (unit.costs[i], unit.damages[i]))
    hull: list[int] = []

    def slope(a: int, b: int) -> float:
        return (unit.damages[b] - unit.damages[a]) / (unit.costs[b] - unit.costs[a])

    for i in order:
        if hull and unit.damages[i] >= unit.damages[hull[-1]]:
            continue
        while len(hull) > 1 and slope(hull[-2], hull[-1]) >= slope(hull[-1], i):
            hull.pop()
        hull.append(i)
    return hull


def _check(units: Sequence[Choices]) -> None:
    """Refuse what has no answer. Raises InputError."""
    for place, unit in enumerate(units):
        if not unit.costs or len(unit.costs) != len(unit.damages):
            raise InputError(f"unit {place} has {len(unit.costs)} costs and {len(unit.damages)} damages", "pair them")
        if not all(map(math.isfinite, unit.damages)):
            raise InputError(f"unit {place} has a damage that is not finite", "leave that candidate out")
    if sum(max(map(abs, unit.costs)) for unit in units) >= LARGEST_COST:
        raise InputError("costs add up to 2**53 or more", "count them in larger units")


def _costs(units: Sequence[Choices]) -> list[Array]:
    return [numpy.array(unit.costs, dtype=numpy.float64) for unit in units]


def _damages(units: Sequence[Choices]) -> list[Array]:
    return [numpy.array(unit.damages, dtype=numpy.float64) for unit in units]


def _extreme(totals: list[Array], ties: Sequence[Tie], sign: int) -> tuple[int, ...]:
    """The choice of the smallest total, or of the largest where `sign` is -1. Raises InputError on ties at odds."""
    values = [sign * part for part in totals]
    if not ties:
        return tuple(int(numpy.argmin(value)) for value in values)
    program = _Program(values, [numpy.zeros(len(value)) for value in values], 0.0, -math.inf, tuple(ties))
    found = program.best(lambda _: True, TIME_LIMIT_SECONDS)
    if found is None:
        raise InputError("no choice of candidates keeps all ties", "check which candidates are tied together")
    return found[0]


Found = tuple[tuple[int, ...], float, bool]  # chosen, bound of the objective, proven optimal


@dataclass(frozen=True)
class _Program:
    """Minimise the sum of `values` with the sum of `resources` in [floor, cap], one option per unit."""

    values: list[Array]
    resources: list[Array]
    cap: float
    floor: float
    ties: tuple[Tie, ...]

    def best(self, accept: Callable[[tuple[int, ...]], bool], time_limit: float) -> Found | None:
        """The best choice that `accept` takes, or None where there is none."""
        if not self.ties:
            swept = sweep(self.values, self.resources, self.cap, floor=self.floor)
            for value, chosen in swept:
                if accept(chosen):
                    return chosen, value, True
        return self._search(accept, time.monotonic() + time_limit)

    def _search(self, accept: Callable[[tuple[int, ...]], bool], deadline: float) -> Found | None:
        """HiGHS, until an answer holds in exact arithmetic. Answers that do not are forbidden, then the cap lowered."""
        refused: list[tuple[int, ...]] = []
        program, bound, hair = self, -math.inf, 1e-12
        while True:
            left = max(deadline - time.monotonic(), 0.1)
            found = program._focus(refused[:MOST_REFUSALS], left)
            if found is None:
                return None
            chosen, lower, optimal = found
            bound = lower if not refused else bound
            if accept(chosen):
                return chosen, bound, optimal and len(refused) <= MOST_REFUSALS
            refused.append(chosen)
            if len(refused) > MOST_REFUSALS:
                program = replace(program, cap=program.cap - hair * max(abs(self.cap), 1e-300))
                hair *= 10

    def _focus(self, refused: list[tuple[int, ...]], time_limit: float) -> Found | None:
        """Solve again without the options that alone exceed the first answer, where they hid the scale of the rest."""
        found = self._highs([numpy.full(len(value), True) for value in self.values], refused, time_limit)
        if found is None:
            return None
        above = [value - value.min() for value in self.values]
        reach = sum(float(over[i]) for over, i in zip(above, found[0], strict=True))
        if 0 < reach < 1e-3 * max(float(over.max()) for over in above):
            again = self._highs([over <= reach * (1 + 1e-9) for over in above], refused, time_limit)
            return again if again is not None else found
        return found

    def _highs(
        self, keep: list[NDArray[numpy.bool_]], refused: list[tuple[int, ...]], time_limit: float
    ) -> Found | None:
        sizes = [len(value) for value in self.values]
        starts = numpy.concatenate([[0], numpy.cumsum(sizes)]).astype(numpy.int64)
        value = numpy.concatenate([value - value.min() for value in self.values])
        resource = numpy.concatenate([resource - resource.min() for resource in self.resources])
        offset = sum(float(value.min()) for value in self.values)
        used = sum(float(resource.min()) for resource in self.resources)
        slack = max(self.cap - used, 0.0)
        allowed = numpy.concatenate(keep) & (resource <= slack * (1 + 1e-9))
        unit = (slack or 1.0) / 1e4
        worst = float(value[allowed].max(initial=0.0)) or 1.0
        one_each = csr_array((numpy.ones(len(value)), (numpy.repeat(numpy.arange(len(sizes)), sizes),
                                                       numpy.arange(len(value)))))  # fmt: skip
        rows = [LinearConstraint(one_each, 1, 1)]
        low = max(self.floor - used, 0.0) / unit
        rows.append(LinearConstraint(csr_array(resource[None, :] * allowed / unit), low, slack / unit))
        for left, right in ((t[0], other) for t in self.ties for other in t[1:]):
            row = numpy.zeros(len(value))
            row[starts[left[0]] + left[1]] += 1
            row[starts[right[0]] + right[1]] -= 1
            rows.append(LinearConstraint(csr_array(row[None, :]), 0, 0))
        for choice in refused:
            row = numpy.zeros(len(value))
            row[starts[:-1] + numpy.array(choice)] = 1
            rows.append(LinearConstraint(csr_array(row[None, :]), 0, len(choice) - 1))
        answer = milp(
            numpy.where(allowed, value, 0.0) * (1e6 / worst),
            integrality=numpy.ones(len(value), dtype=numpy.int64),
            bounds=Bounds(0, allowed.astype(numpy.float64)),
            constraints=rows,
            options={"mip_rel_gap": RELATIVE_GAP, "time_limit": time_limit},
        )
        if answer.x is None:
            return None
        chosen = tuple(int(answer.x[a:b].argmax()) for a, b in pairwise(starts))
        bound = answer.mip_dual_bound if answer.mip_dual_bound is not None else 0.0
        return chosen, offset + float(bound) * worst / 1e6, answer.status == 0
