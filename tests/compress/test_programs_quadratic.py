"""The quadratic program: exact on quadratic games, never worse than ignoring interactions, bounded from below."""

import itertools
from collections.abc import Iterator, Sequence

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcompress.compress.allocate.integer import Choices, InfeasibleError, solve, total
from llmcompress.compress.allocate.quadratic import (
    minimise,
    objective,
    pairwise,
    psd,
    shrink,
)
from llmcompress.errors import InputError

CASES = settings(max_examples=40, deadline=None)
Array = numpy.ndarray


def game(seed: int, *, kind: str = "psd") -> tuple[list[Choices], Array]:
    """Three to five units with one to four candidates, and a matrix over all candidates."""
    source = numpy.random.default_rng(seed)
    sizes = source.integers(1, 5, size=source.integers(3, 6))
    units = [
        Choices(tuple(int(c) for c in source.integers(1, 40, k)), tuple(float(d) for d in source.normal(size=k)))
        for k in sizes
    ]
    count = int(sizes.sum())
    if kind == "indefinite":
        matrix = source.normal(size=(count, count))
        return units, (matrix + matrix.T) / 2
    vectors = source.normal(size=(count, 3 if kind == "low rank" else count + 2))
    return units, vectors @ vectors.T


def every(units: Sequence[Choices]) -> Iterator[tuple[int, ...]]:
    return itertools.product(*(range(len(unit.costs)) for unit in units))


def slow(units: Sequence[Choices], matrix: Array, chosen: Sequence[int]) -> float:
    starts = numpy.cumsum([0, *(len(unit.costs) for unit in units)])
    point = numpy.zeros(starts[-1])
    for start, option in zip(starts, chosen, strict=False):
        point[start + option] = 1
    return total(units, chosen)[1] + float(point @ matrix @ point) / 2


@given(st.integers(0, 10**6), st.sampled_from(["psd", "low rank", "indefinite"]), st.floats(0, 1), st.floats(0, 0.6))
@CASES
def test_against_brute_force(seed: int, kind: str, share: float, filled: float) -> None:
    units, matrix = game(seed, kind=kind)
    low, high = (sum(f(unit.costs) for unit in units) for f in (min, max))
    budget = int(low + share * (high - low))
    minimum = int(filled * budget)
    fitting = [c for c in every(units) if minimum <= total(units, c)[0] <= budget]
    if not fitting:
        with pytest.raises(InfeasibleError):
            minimise(units, matrix, budget, minimum=minimum)
        return
    best = min(slow(units, matrix, chosen) for chosen in fitting)
    found = minimise(units, matrix, budget, minimum=minimum)
    assert minimum <= found.cost <= budget
    assert found.cost == total(units, found.chosen)[0]
    assert found.objective == pytest.approx(slow(units, matrix, found.chosen), abs=1e-9)
    assert found.bound <= best + 1e-9
    assert best - 1e-9 <= found.objective <= found.separable + 1e-12
    diagonal = [Choices(u.costs, tuple(p)) for u, p in zip(units, alone(units, matrix), strict=True)]
    assert found.separable == pytest.approx(slow(units, matrix, solve(diagonal, budget, minimum=minimum).chosen))


def alone(units: Sequence[Choices], matrix: Array) -> list[list[float]]:
    halves = iter(numpy.diag(matrix) / 2)
    return [[damage + float(next(halves)) for damage in unit.damages] for unit in units]


def test_small_programs_are_nearly_always_solved() -> None:
    solved = 0
    for seed in range(20):
        units, matrix = game(seed)
        low, high = (sum(f(unit.costs) for unit in units) for f in (min, max))
        budget = (low + high) // 2
        best = min(slow(units, matrix, c) for c in every(units) if total(units, c)[0] <= budget)
        solved += minimise(units, matrix, budget).objective <= best + 1e-9
    assert solved >= 19


@pytest.mark.parametrize("seed", range(5))
def test_a_quadratic_game_is_exact_for_all_assignments(seed: int) -> None:
    """CLADO's matrix from measured singles and pairs gives back a quadratic loss, whatever is chosen."""
    source = numpy.random.default_rng(seed)
    moves, curvature = source.normal(size=(9, 12)), source.normal(size=(12, 12))
    curvature = curvature @ curvature.T

    def loss(chosen: Sequence[int]) -> float:
        shift = moves[list(chosen)].sum(0)
        return float(shift @ curvature @ shift) / 2

    singles = numpy.array([loss([i]) for i in range(9)])
    pairs = numpy.full((9, 9), numpy.nan)
    for i, j in itertools.combinations(range(9), 2):
        if i // 3 != j // 3:
            pairs[i, j] = loss([i, j])  # one triangle only, nothing within a unit
    units = [Choices((1, 2, 3), (0.0, 0.0, 0.0))] * 3
    matrix = pairwise(singles, pairs)
    for chosen in every(units):
        flat = [3 * unit + option for unit, option in enumerate(chosen)]
        assert objective(units, matrix, chosen) == pytest.approx(loss(flat), rel=1e-12)
    both = numpy.fmax(pairs, pairs.T)
    assert numpy.allclose(pairwise(singles, both), matrix)


@pytest.mark.parametrize("seed", range(10))
def test_without_cross_terms_it_is_the_knapsack_and_proven(seed: int) -> None:
    units, matrix = game(seed)
    unit_of = numpy.repeat(numpy.arange(len(units)), [len(unit.costs) for unit in units])
    matrix = numpy.where(unit_of[:, None] == unit_of[None, :], matrix, 0.0)
    low, high = (sum(f(unit.costs) for unit in units) for f in (min, max))
    budget = (2 * low + high) // 3
    exact = solve([Choices(u.costs, tuple(p)) for u, p in zip(units, alone(units, matrix), strict=True)], budget)
    found = minimise(units, matrix, budget)
    assert found.objective == pytest.approx(exact.damage, abs=1e-12)
    assert found.gap < 1e-8


@given(st.integers(0, 10**6))
@CASES
def test_projection_is_semidefinite_nearest_and_idempotent(seed: int) -> None:
    _, matrix = game(seed, kind="indefinite")
    projected = psd(matrix)
    assert numpy.linalg.eigvalsh(projected)[0] > -1e-10
    assert numpy.allclose(psd(projected), projected, atol=1e-10)
    values = numpy.linalg.eigvalsh(matrix)
    assert numpy.linalg.norm(projected - matrix) == pytest.approx(numpy.sqrt((values[values < 0] ** 2).sum()))


def test_shrinking_keeps_the_diagonal() -> None:
    _, matrix = game(0, kind="indefinite")
    assert numpy.array_equal(shrink(matrix, 0.0), matrix)
    assert numpy.array_equal(shrink(matrix, 1.0), numpy.diag(numpy.diag(matrix)))
    half = shrink(matrix)
    assert numpy.allclose(half - numpy.diag(numpy.diag(half)), (matrix - numpy.diag(numpy.diag(matrix))) / 2)


def test_a_given_start_is_never_made_worse_and_one_over_the_budget_is_passed_over() -> None:
    units, matrix = game(3, kind="indefinite")
    low, high = (sum(f(unit.costs) for unit in units) for f in (min, max))
    budget = (low + high) // 2
    for chosen in every(units):
        found = minimise(units, matrix, budget, starts=[chosen], tries=0)
        assert found.cost <= budget
        if total(units, chosen)[0] <= budget:
            assert found.objective <= objective(units, matrix, chosen) + 1e-9


def test_nothing_that_fits_is_an_error() -> None:
    units, matrix = game(0)
    smallest = sum(min(unit.costs) for unit in units)
    with pytest.raises(InfeasibleError) as caught:
        minimise(units, matrix, smallest - 1)
    assert caught.value.smallest == smallest
    assert minimise(units, matrix, smallest).cost == smallest


@pytest.mark.parametrize("broken", [numpy.zeros((2, 2)), numpy.full((3, 3), numpy.nan)])
def test_a_matrix_of_another_game_is_refused(broken: Array) -> None:
    with pytest.raises(InputError):
        minimise([Choices((1, 2, 3), (3.0, 2.0, 1.0))], broken, 9)


def test_scip_agrees() -> None:
    scip = pytest.importorskip("pyscipopt", reason="pyscipopt is not installed; it is an oracle only")
    for seed in range(3):
        units, matrix = game(seed)
        budget = sum(min(unit.costs) + max(unit.costs) for unit in units) // 2
        vectors = numpy.linalg.cholesky(matrix + 1e-12 * numpy.eye(len(matrix)))
        model = scip.Model()
        model.hideOutput()
        places = [[model.addVar(vtype="B", obj=d) for d in unit.damages] for unit in units]
        flat = [place for row in places for place in row]
        for row in places:
            model.addCons(scip.quicksum(row) == 1)
        costs = [c for unit in units for c in unit.costs]
        model.addCons(scip.quicksum(c * x for c, x in zip(costs, flat, strict=True)) <= budget)
        for column in vectors.T:
            length, square = model.addVar(lb=None), model.addVar(obj=0.5)
            model.addCons(length == scip.quicksum(float(v) * x for v, x in zip(column, flat, strict=True)))
            model.addCons(length * length <= square)
        model.optimize()
        found = minimise(units, matrix, budget)
        assert found.objective == pytest.approx(model.getObjVal(), rel=1e-4)
        assert found.bound <= model.getObjVal() + 1e-4
