"""High-impact ratios: exact storage, both uniform ends, the separable optimum, and damage that falls with budget."""

import itertools
import math

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcompress.compress.allocate.integer import InfeasibleError
from llmcompress.compress.allocate.ratio import (
    RATIOS,
    Columns,
    column_bits,
    column_scores,
    element_bits,
    high_impact_ratios,
    mask_entropy,
    obq_column_scores,
    relax_ratios,
)
from llmcompress.errors import InputError

WIDTHS = (2, 4)
CASES = settings(max_examples=15, deadline=None)
Array = numpy.ndarray


def linears(seed: int, count: int = 3) -> list[Columns]:
    source = numpy.random.default_rng(seed)
    found = []
    for _ in range(count):
        columns, rows = 64 * int(source.integers(1, 4)), int(source.integers(4, 20))
        low = source.lognormal(0, 2, columns)
        high = low * source.uniform(0, 0.2, columns) if source.random() < 0.5 else None
        found.append(Columns(rows, low, high, int(source.integers(0, 500)), float(source.uniform(0.5, 2))))
    return found


def coupling(seed: int, count: int, strength: float = 0.3) -> Array:
    source = numpy.random.default_rng(seed)
    vectors = source.normal(size=(count, 4))
    vectors /= numpy.linalg.norm(vectors, axis=1, keepdims=True)
    return 2 * strength * vectors @ vectors.T


def slow(linear: Columns, ratio: float) -> tuple[int, float]:
    """Bits and damage of one linear, column by column."""
    high = numpy.zeros(len(linear.low_scores)) if linear.high_scores is None else linear.high_scores
    wide = set(sorted(range(len(high)), key=lambda j: high[j] - linear.low_scores[j])[: int(ratio * len(high))])
    bits = sum(linear.rows * WIDTHS[j in wide] for j in range(len(high)))
    bits += linear.metadata_bits + (len(high) if 0 < len(wide) < len(high) else 0)
    return bits, sum(float(high[j] if j in wide else linear.low_scores[j]) for j in range(len(high)))


def brute(parts: list[Columns], cross: Array, budget: int) -> float:
    tables = [[slow(linear, ratio) for ratio in RATIOS] for linear in parts]
    best = math.inf
    for chosen in itertools.product(*tables):
        if sum(bits for bits, _ in chosen) <= budget:
            damage = sum(linear.weight * d for linear, (_, d) in zip(parts, chosen, strict=True))
            for a, b in itertools.combinations(range(len(parts)), 2):
                damage += cross[a, b] * math.sqrt(chosen[a][1] * chosen[b][1])
            best = min(best, damage)
    return best


def ends(parts: list[Columns]) -> tuple[int, int]:
    return tuple(sum(slow(linear, ratio)[0] for linear in parts) for ratio in (0, 1))  # type: ignore[return-value]


def test_storage_is_what_it_says() -> None:
    sizes = {"low_bits": 2, "high_bits": 4, "metadata_bits": 7}
    assert column_bits(10, 64, 0, **sizes) == 10 * 64 * 2 + 7
    assert column_bits(10, 64, 64, **sizes) == 10 * 64 * 4 + 7
    assert column_bits(10, 64, 16, **sizes) == 10 * (48 * 2 + 16 * 4) + 7 + 64
    assert mask_entropy(0.05) == pytest.approx(0.2864, abs=1e-4)
    assert mask_entropy(0.0) == mask_entropy(1.0) == 0
    assert mask_entropy(0.5) == 1
    assert element_bits(640, 0.5, **sizes) == 640 * 4 + 7
    assert element_bits(640, 0.0, **sizes) == column_bits(10, 64, 0, **sizes)
    assert element_bits(640, 1.0, **sizes) == column_bits(10, 64, 64, **sizes)


@pytest.mark.parametrize("ratio", RATIOS[1:-1])
def test_single_weights_cost_more_than_columns(ratio: float) -> None:
    sizes = {"low_bits": 2, "high_bits": 4}
    assert element_bits(128 * 128, ratio, **sizes) > column_bits(128, 128, int(128 * ratio), **sizes)


def test_column_scores_are_the_proxy_loss_of_uncorrelated_inputs() -> None:
    source = numpy.random.default_rng(0)
    error, diagonal = source.normal(size=(5, 8)), source.uniform(0.1, 3, 8)
    scores = column_scores((error**2).sum(0), diagonal)
    assert scores.sum() == pytest.approx(numpy.trace(error @ numpy.diag(diagonal) @ error.T))
    obq = obq_column_scores((error**2).sum(0), 1 / diagonal)
    assert numpy.allclose(2 * obq, scores)


def test_obq_score_is_the_loss_left_when_the_others_compensate() -> None:
    source = numpy.random.default_rng(1)
    inputs, shift, column = source.normal(size=(40, 6)), 0.3, 2
    hessian = inputs.T @ inputs
    others = [j for j in range(6) if j != column]
    move = numpy.zeros(6)
    move[column] = shift
    move[others] = -numpy.linalg.solve(hessian[numpy.ix_(others, others)], hessian[others, column] * shift)
    score = obq_column_scores(numpy.array([shift**2]), numpy.linalg.inv(hessian)[column, column][None])
    assert score[0] == pytest.approx(move @ hessian @ move / 2)


@given(st.integers(0, 10**6), st.floats(0, 1))
@CASES
def test_without_coupling_it_is_the_separable_optimum(seed: int, share: float) -> None:
    parts = linears(seed)
    low, high = ends(parts)
    budget = int(low + share * (high - low))
    found = high_impact_ratios(parts, None, budget, widths=WIDTHS)
    assert found.cost == sum(slow(linear, r)[0] for linear, r in zip(parts, found.ratios, strict=True)) <= budget
    assert found.damage == pytest.approx(brute(parts, numpy.zeros((3, 3)), budget))
    assert found == high_impact_ratios(parts, 5 * numpy.eye(3), budget, widths=WIDTHS)


@given(st.integers(0, 10**6), st.floats(0, 1))
@CASES
def test_with_coupling_it_is_within_the_budget_and_close_to_brute_force(seed: int, share: float) -> None:
    parts, cross = linears(seed), coupling(seed, 3)
    low, high = ends(parts)
    budget = int(low + share * (high - low))
    best = brute(parts, cross, budget)
    found = high_impact_ratios(parts, cross, budget, widths=WIDTHS)
    assert found.cost == sum(slow(linear, r)[0] for linear, r in zip(parts, found.ratios, strict=True)) <= budget
    assert found.bound <= best * (1 + 1e-9) + 1e-9
    assert best * (1 - 1e-9) <= found.damage <= best * 1.02 + 1e-9


@pytest.mark.parametrize("cross", [None, coupling(0, 3)])
def test_both_ends_are_uniform(cross: Array | None) -> None:
    parts = [Columns(8, numpy.random.default_rng(i).lognormal(size=128)) for i in range(3)]
    low, high = ends(parts)
    assert (low, high) == (3 * 8 * 128 * 2, 3 * 8 * 128 * 4)
    narrow = high_impact_ratios(parts, cross, low, widths=WIDTHS)
    assert (narrow.ratios, narrow.cost) == ((0.0,) * 3, low)
    wide = high_impact_ratios(parts, cross, high, widths=WIDTHS)
    assert (wide.ratios, wide.cost, wide.damage) == ((1.0,) * 3, high, 0.0)
    with pytest.raises(InfeasibleError) as caught:
        high_impact_ratios(parts, cross, low - 1, widths=WIDTHS)
    assert caught.value.smallest == low


@pytest.mark.parametrize("seed", range(2))
def test_damage_never_rises_with_the_budget(seed: int) -> None:
    parts, cross = linears(seed, 6), coupling(seed, 6)
    budgets = numpy.linspace(*ends(parts), 6).astype(int)
    free = [high_impact_ratios(parts, None, int(budget), widths=WIDTHS).damage for budget in budgets]
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(free))
    last, damages = None, []
    for budget in budgets:
        found = high_impact_ratios(parts, cross, int(budget), widths=WIDTHS, start=last)
        last = found.chosen
        damages.append(found.damage)
    assert all(b <= a * (1 + 1e-12) for a, b in itertools.pairwise(damages))
    assert damages[-1] < damages[0]


@pytest.mark.parametrize("seed", range(3))
def test_the_continuous_program_equalises_what_a_bit_buys(seed: int) -> None:
    """Without coupling, the optimum sits where the columns at the edge gain the same damage per bit."""
    source = numpy.random.default_rng(seed)
    parts = [Columns(8, -numpy.sort(-source.lognormal(0, 1, 4096))) for _ in range(4)]
    prices = numpy.full(4, 8 * 4096 * 2.0)
    ratios = relax_ratios(parts, numpy.zeros((4, 4)), prices, budget=float(prices.sum()) * 0.3)
    assert (prices * ratios).sum() <= prices.sum() * 0.3 * (1 + 1e-9)
    reached = sum(linear.curve()[round(r * 4096)] for linear, r in zip(parts, ratios, strict=True))
    pooled = numpy.sort(numpy.concatenate([linear.low_scores for linear in parts]))
    best = pooled[: round(0.7 * len(pooled))].sum()
    uniform = sum(linear.curve()[round(0.3 * 4096)] for linear in parts)
    assert best * 0.999 <= reached <= best + 0.1 * (uniform - best) + 1e-3 * best


def test_negative_scores_are_refused() -> None:
    with pytest.raises(InputError):
        high_impact_ratios([Columns(1, numpy.full(64, -1.0))], None, 10**6, widths=WIDTHS)
