"""Both directions of the integer program, ties, and the convex hull, against brute force."""

import itertools
import math
import random
import time
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llmcompress.compress.allocate import integer
from llmcompress.compress.allocate.integer import (
    Choices,
    InfeasibleError,
    Tie,
    cheapest,
    frontier,
    solve,
    total,
)
from llmcompress.errors import InputError

CASES = settings(max_examples=80, deadline=None)
SHAPES_70B = ((8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192), (28672, 8192), (28672, 8192), (8192, 28672))


@st.composite
def instances(draw: st.DrawFn, lowest: float = 0.0) -> list[Choices]:
    """Up to five units with one to four candidates each, in no order, dominated ones included."""
    units = []
    for _ in range(draw(st.integers(1, 5))):
        count = draw(st.integers(1, 4))
        costs = draw(st.lists(st.integers(0, 60), min_size=count, max_size=count))
        visible = st.floats(lowest, 10, width=32).map(lambda value: value if abs(value) > 1e-6 else 0.0)  # in a sum
        damages = draw(st.lists(visible, min_size=count, max_size=count))
        units.append(Choices(tuple(costs), tuple(damages)))
    return units


def every(units: Sequence[Choices], ties: Sequence[Tie] = ()) -> Iterator[tuple[int, float, tuple[int, ...]]]:
    for chosen in itertools.product(*(range(len(unit.costs)) for unit in units)):
        if all(len({chosen[u] == i for u, i in tie}) <= 1 for tie in ties):
            yield (*total(units, chosen), chosen)


def model_70b(seed: int, average: float) -> tuple[list[Choices], int]:
    source, units, weights = random.Random(seed), [], 0
    for block in range(80):
        for rows, columns in SHAPES_70B:
            ends = 1 + 4 * math.exp(-block / 14) + 2 * math.exp((block - 79) / 10)
            scale = ends * source.lognormvariate(0, 1.2) * rows * columns / 1e8
            costs = tuple(rows * (-(-columns * b // 32) * 32 + columns // 128 * 16) + 128 for b in (2, 3, 4, 5, 6, 8))
            units.append(Choices(costs, tuple(scale * 4.0**-b for b in (2, 3, 4, 5, 6, 8))))
            weights += rows * columns
    return units, int(average * weights)


@pytest.fixture
def only_highs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer, "sweep", lambda *_, **__: [])


@given(instances(-10), st.integers(0, 300), st.integers(0, 200))
@CASES
def test_solve_equals_brute_force(units: list[Choices], budget: int, minimum: int) -> None:
    fitting = [damage for cost, damage, _ in every(units) if minimum <= cost <= budget]
    if not fitting:
        with pytest.raises(InfeasibleError):
            solve(units, budget, minimum=minimum)
        return
    found = solve(units, budget, minimum=minimum)
    assert minimum <= found.cost <= budget
    assert (found.cost, found.damage) == total(units, found.chosen)
    assert found.damage == pytest.approx(min(fitting), rel=1e-9, abs=1e-9)
    assert found.optimal
    assert found.bound <= found.damage


@given(instances(-10), st.floats(-60, 60))
@CASES
def test_cheapest_equals_brute_force(units: list[Choices], limit: float) -> None:
    fitting = [cost for cost, damage, _ in every(units) if damage <= limit]
    if not fitting:
        with pytest.raises(InfeasibleError) as caught:
            cheapest(units, limit)
        assert caught.value.smallest == min(damage for _, damage, _ in every(units))
        assert cheapest(units, caught.value.smallest).damage == caught.value.smallest
        return
    found = cheapest(units, limit)
    assert found.damage <= limit
    assert found.cost == min(fitting)
    assert found.optimal


@pytest.mark.usefixtures("only_highs")
def test_the_general_solver_agrees_in_both_directions() -> None:
    source = random.Random(5)
    for _ in range(30):
        units = [
            Choices(tuple(source.randrange(100) for _ in range(4)), tuple(source.uniform(-1, 3) for _ in range(4)))
            for _ in range(4)
        ]
        costs = [cost for cost, _, _ in every(units)]
        budget = source.randint(min(costs), max(costs))
        best = min(damage for cost, damage, _ in every(units) if cost <= budget)
        assert solve(units, budget).damage == pytest.approx(best, abs=1e-9)
        assert cheapest(units, best).cost == min(cost for cost, damage, _ in every(units) if damage <= best)


@pytest.mark.usefixtures("only_highs")
def test_one_enormous_damage_does_not_hide_the_others() -> None:
    units = [Choices((0, 2, 3), (1e9, 2e-6 + i * 1e-8, 1e-6)) for i in range(6)]
    best = min(damage for cost, damage, _ in every(units) if cost <= 15)
    assert solve(units, 15).damage == best


@given(instances(), st.integers(0, 200), st.data())
@CASES
def test_ties_equal_brute_force(units: list[Choices], budget: int, data: st.DataObject) -> None:
    pairs = [(u, i) for u, unit in enumerate(units) for i in range(len(unit.costs))]
    ties = [data.draw(st.lists(st.sampled_from(pairs), min_size=1, max_size=3)) for _ in range(2)]
    allowed = list(every(units, ties))
    if not allowed:
        with pytest.raises(InputError):
            solve(units, budget, ties=ties)
        return
    fitting = [(damage, cost) for cost, damage, _ in allowed if cost <= budget]
    if not fitting:
        with pytest.raises(InfeasibleError) as caught:
            solve(units, budget, ties=ties)
        costs = [cost for cost, _, _ in allowed]
        assert (caught.value.smallest, caught.value.largest) == (min(costs), max(costs))
        return
    found = solve(units, budget, ties=ties)
    assert all(len({found.chosen[u] == i for u, i in tie}) == 1 for tie in ties)
    assert found.cost <= budget
    assert found.damage == pytest.approx(min(fitting)[0], rel=1e-8, abs=1e-9)
    back = cheapest(units, found.damage, ties=ties)
    assert back.cost == min(cost for cost, damage, _ in allowed if damage <= found.damage)


def test_a_dropped_block_is_dropped_whole() -> None:
    units = [Choices((0, 10, 20), (1.0, 0.9, 0.0)), Choices((0, 10, 20), (9.0, 0.1, 0.0))]
    assert solve(units, 20).chosen == (0, 2)  # the first alone would go
    assert solve(units, 20, ties=[[(0, 0), (1, 0)]]).chosen == (1, 1)
    assert solve(units, 19, ties=[[(0, 0), (1, 0)]]).chosen == (0, 0)


@given(instances(), st.data())
@CASES
def test_the_directions_agree(units: list[Choices], data: st.DataObject) -> None:
    low, high = (sum(f(unit.costs) for unit in units) for f in (min, max))
    best = solve(units, data.draw(st.integers(low, high)))
    back = cheapest(units, best.damage)
    assert back.cost <= best.cost
    assert back.damage <= best.damage
    again = solve(units, back.cost)
    assert again.damage == pytest.approx(best.damage, rel=1e-9, abs=1e-9)


@given(instances(), st.integers(0, 250))
@CASES
def test_the_frontier_is_optimal_at_its_points_and_bounds_what_lies_between(units: list[Choices], budget: int) -> None:
    points = frontier(units)
    for point in points:
        assert (point.cost, point.damage) == total(units, point.chosen)
        least = min(damage for cost, damage, _ in every(units) if cost <= point.cost)
        assert point.damage == pytest.approx(least, rel=1e-9, abs=1e-9)
    for a, b in itertools.pairwise(points):
        assert sum(x != y for x, y in zip(a.chosen, b.chosen, strict=True)) == 1
        assert a.cost < b.cost
        assert a.damage >= b.damage
    assert points[-1].damage == pytest.approx(min(damage for _, damage, _ in every(units)))
    assume(points[0].cost <= budget)
    assert _line(points, budget) <= solve(units, budget).damage * (1 + 1e-9) + 1e-9


def _line(points: Sequence[integer.Point], budget: int) -> float:
    for a, b in itertools.pairwise(points):
        if a.cost <= budget < b.cost:
            return a.damage + (b.damage - a.damage) * (budget - a.cost) / (b.cost - a.cost)
    return points[-1].damage


@given(instances(), st.integers(0, 200), st.integers(0, 50))
@CASES
def test_more_budget_never_costs_damage_and_a_looser_limit_never_costs_bits(
    units: list[Choices], budget: int, more: int
) -> None:
    assume(sum(min(unit.costs) for unit in units) <= budget)
    tight, loose = solve(units, budget), solve(units, budget + more)
    assert loose.damage <= tight.damage + 1e-9
    assert cheapest(units, tight.damage).cost <= cheapest(units, loose.damage).cost or more == 0


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("average", [2.7, 4.25])
def test_seventy_billion_weights_are_proven_optimal(seed: int, average: float) -> None:
    units, budget = model_70b(seed, average)
    began = time.process_time()
    best = solve(units, budget)
    back = cheapest(units, best.damage)
    assert time.process_time() - began < 10
    assert best.optimal
    assert back.optimal
    assert best.cost <= budget
    assert back.cost <= best.cost
    assert _line(frontier(units), budget) <= best.damage


def test_irregular_costs_are_proven_optimal_too() -> None:
    units, budget = model_70b(2, 3.5)
    source = random.Random(2)
    units = [Choices(tuple(int(c * source.uniform(1, 1.01)) for c in unit.costs), unit.damages) for unit in units]
    best = solve(units, budget)
    assert best.optimal
    assert best.cost <= budget
    assert best.damage - _line(frontier(units), budget) < 1e-4 * best.damage


@pytest.mark.parametrize(
    "units", [[Choices((), ())], [Choices((1,), ())], [Choices((1,), (math.inf,))], [Choices((2**53,), (0.0,))]]
)
def test_nonsense_is_refused(units: list[Choices]) -> None:
    for program in (lambda: solve(units, 9), lambda: cheapest(units, 9.0), lambda: frontier(units)):
        with pytest.raises(InputError):
            program()


def test_a_limit_that_is_no_number_is_refused() -> None:
    with pytest.raises(InputError):
        cheapest([Choices((1,), (0.0,))], math.nan)
    assert cheapest([Choices((1, 0), (0.0, 7.0))], math.inf).chosen == (1,)
