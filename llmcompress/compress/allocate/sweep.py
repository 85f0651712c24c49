"""Exact dynamic programming for one-option-per-unit programs with one limit, pruned by a Lagrangian bound."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

Array = NDArray[numpy.float64]

MOST_STATES = 400_000  # of one unit
MOST_MEMORY = 30_000_000  # states of all units together
MOST_ANSWERS = 64
SAFETY = 1e-12  # relative, for sums that were rounded


def sweep(
    values: Sequence[Array], resources: Sequence[Array], cap: float, *, floor: float = -numpy.inf
) -> list[tuple[float, tuple[int, ...]]]:
    """The best choices, best first, of `min sum values` with `floor <= sum resources <= cap`.

    values, resources   one array of options per unit
    returns             `(value, option of each unit)`; only the first is the optimum, the others are there in
                        case that rounding of sums let the first pass the cap by a hair

    Empty when the program is too large for this method, or when no starting solution keeps the floor.
    States are Pareto optimal pairs (resource, value), as in the knapsack recursion; those that cannot lead below
    the best known value are dropped by the Lagrangian bound, and so are options of single units before that.
    """
    value, resource = padded(values, numpy.inf), padded(resources, 0.0)
    _, price = multiplier(value, resource, cap)
    start = _fill(value, resource, cap, (value + price * resource).argmin(1))
    rows = numpy.arange(len(value))
    used = float(resource[rows, start].sum())
    if not floor <= used <= cap:
        return []
    priced = value + price * resource
    reduced = priced - priced.min(1, keepdims=True)
    upper, lower = float(value[rows, start].sum()), float(priced.min(1).sum() - price * cap)
    scale = float(numpy.abs(value[rows, start]).sum()) + abs(price * cap)
    gap = max(upper - lower, 0.0) + SAFETY * scale
    if price == 0.0 and floor == -numpy.inf:
        return [(upper, tuple(int(i) for i in start))]
    whole = bool((resource == numpy.rint(resource)).all())  # then sums are exact
    bound = _Bound(price, gap, cap + (0.0 if whole else SAFETY * float(numpy.abs(resource).max(1).sum())), floor)
    return _recurse(value, resource, reduced, bound)


def multiplier(value: Array, resource: Array, cap: float) -> tuple[float, float]:
    """Neighbouring prices, >= 0, per resource: at the second the best options together keep the cap, at the first not.

    value, resource (units, options); padding has an infinite value. Both are 0 where the cap does not bind. The
    second is infinite nowhere, but keeps the cap only where some choice does.
    """
    rows = numpy.arange(len(value))

    def used(price: float) -> float:
        return float(resource[rows, (value + price * resource).argmin(1)].sum())

    finite = numpy.where(numpy.isfinite(value), value, 0.0)
    spread = float((numpy.ptp(finite, axis=1)).max(initial=0.0))
    low, high = 0.0, (spread or 1.0) / max(float(numpy.abs(resource).max(initial=0.0)), 1e-300)
    if used(0.0) <= cap:
        return 0.0, 0.0
    for _ in range(200):
        if used(high) <= cap:
            break
        low, high = high, high * 4
    for _ in range(80):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if used(middle) > cap else (low, middle)
    return low, high


def padded(parts: Sequence[Array], filling: float) -> Array:
    """Rows of different lengths as one (units, options) array."""
    table = numpy.full((len(parts), max(map(len, parts), default=0)), filling)
    for row, part in zip(table, parts, strict=True):
        row[: len(part)] = part
    return table


def _fill(value: Array, resource: Array, cap: float, start: NDArray[numpy.intp]) -> NDArray[numpy.intp]:
    """Spend what is left by the best single change, again and again."""
    rows, chosen = numpy.arange(len(value)), start.copy()
    while True:
        left = cap - float(resource[rows, chosen].sum())
        gain = value[rows, chosen][:, None] - value
        gain[resource - resource[rows, chosen][:, None] > left] = -numpy.inf
        unit, option = numpy.unravel_index(int(gain.argmax()), gain.shape) if gain.size else (0, 0)
        if not gain.size or gain[unit, option] <= 0:
            return chosen
        chosen[unit] = option


@dataclass(frozen=True)
class _Bound:
    """What a state must keep to lead to a solution at least as good as the best known one."""

    price: float
    gap: float
    cap: float
    floor: float

    def alive(self, resource: Array, reduced: Array, least: float, most: float) -> NDArray[numpy.bool_]:
        """`least`, `most`: what the units that are still to come can use."""
        waste = self.price * numpy.maximum(self.cap - resource - most, 0.0)
        return (resource + least <= self.cap) & (resource + most >= self.floor) & (reduced + waste <= self.gap)


def _recurse(value: Array, resource: Array, reduced: Array, bound: _Bound) -> list[tuple[float, tuple[int, ...]]]:
    keep = reduced <= bound.gap
    large, small = numpy.where(keep, resource, -numpy.inf).max(1), numpy.where(keep, resource, numpy.inf).min(1)
    order = numpy.lexsort((numpy.arange(len(value)), -(large - small)))
    least, most = float(small.sum()), float(large.sum())
    used, worth, regret = numpy.zeros(1), numpy.zeros(1), numpy.zeros(1)
    history, states = [], 0
    for unit in order:
        least, most = least - small[unit], most - large[unit]
        options = numpy.flatnonzero(keep[unit])
        next_used = (used[:, None] + resource[unit, options]).ravel()
        next_worth = (worth[:, None] + value[unit, options]).ravel()
        next_regret = (regret[:, None] + reduced[unit, options]).ravel()
        alive = numpy.flatnonzero(bound.alive(next_used, next_regret, least, most))
        alive = alive[numpy.lexsort((next_worth[alive], next_used[alive]))]
        alive = alive[_undominated(next_used[alive], next_worth[alive], floor=bound.floor)]
        states += len(alive)
        if len(alive) > MOST_STATES or states > MOST_MEMORY or not len(alive):
            return []
        used, worth, regret = next_used[alive], next_worth[alive], next_regret[alive]
        history.append(((alive // len(options)).astype(numpy.int32), options[alive % len(options)].astype(numpy.int16)))
    found = []
    for state in numpy.argsort(worth, kind="stable")[:MOST_ANSWERS]:
        chosen, place = [0] * len(value), int(state)
        for unit, (parents, picks) in zip(order[::-1], history[::-1], strict=True):
            chosen[unit], place = int(picks[place]), int(parents[place])
        found.append((float(worth[state]), tuple(chosen)))
    return found


def _undominated(used: Array, worth: Array, *, floor: float) -> NDArray[numpy.bool_]:
    """States, sorted by resource then value, that no other beats; with a floor only equal resources compare."""
    first = numpy.ones(len(used), dtype=numpy.bool_)
    if floor > -numpy.inf:
        first[1:] = used[1:] > used[:-1]
    else:
        first[1:] = worth[1:] < numpy.minimum.accumulate(worth)[:-1]
    return first
