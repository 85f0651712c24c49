"""The statistics of the gate against slow, obvious oracles."""

import itertools
import math

import numpy
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from llmcompress.eval.statistics import bootstrap_reach
from llmcompress.gate.rules import (
    Levels,
    holm,
    kl_rule,
    mcnemar,
    mean_rule,
    paired_rule,
    ratio_rule,
    tango_score,
    units_needed,
)

LEVELS = Levels(0.05, 0.05)
COUNTS = st.integers(1, 400).flatmap(
    lambda n: st.integers(0, n).flatmap(lambda a: st.tuples(st.integers(0, n - a), st.just(a), st.just(n)))
)


def likelihood_score(gained: int, lost: int, count: int, difference: float) -> float:
    """The score with the variance at the most likely truth, which is searched for, not solved for."""
    low, high = max(0.0, -difference), (1 - difference) / 2

    def unlikely(share: float) -> float:
        cells = ((gained, share + difference), (lost, share), (count - gained - lost, 1 - 2 * share - difference))
        return -sum(k * math.log(p) if p > 0 else -math.inf for k, p in cells if k)

    share = optimize.minimize_scalar(unlikely, bounds=(low, high), method="bounded", options={"xatol": 1e-13}).x
    variance = 2 * share + difference * (1 - difference)
    return (gained - lost - count * difference) / math.sqrt(count * variance)


@settings(max_examples=60, deadline=None)
@given(COUNTS, st.integers(-900, 900).map(lambda thousandths: thousandths / 1000))
def test_tango_score_is_that_of_the_constrained_maximum_likelihood(counts: tuple[int, int, int], truth: float) -> None:
    assert tango_score(*counts, truth) == pytest.approx(likelihood_score(*counts, truth), rel=2e-5, abs=2e-5)


@settings(max_examples=60, deadline=None)
@given(COUNTS, st.floats(0.005, 0.3), st.sampled_from([0.01, 0.05, 0.2]))
def test_tango_bounds_invert_the_score(counts: tuple[int, int, int], limit: float, alpha: float) -> None:
    found = paired_rule(*counts, limit, Levels(alpha, alpha))
    reach = stats.norm.isf(alpha)
    assert found.low <= found.estimate + 1e-9
    assert found.high >= found.estimate - 1e-9
    for bound, score in ((found.low, -reach), (found.high, reach)):
        if abs(bound) < 0.999:
            assert tango_score(*counts, -bound) == pytest.approx(score, abs=1e-6)
    assert (found.high <= limit) == (tango_score(*counts, -limit) >= reach)
    assert (found.p_above <= alpha) == (found.low > limit)


def test_tango_of_a_published_kind_of_table_by_scanning() -> None:
    """1 gained, 5 lost of 68: every difference whose score is below the reach belongs to the interval."""
    grid = numpy.linspace(-0.4, 0.4, 8_001)
    inside = [-d for d in grid if abs(likelihood_score_closed(1, 5, 68, d)) <= 1.959964]
    found = paired_rule(1, 5, 68, 0.02, Levels(0.025, 0.025))
    assert (found.low, found.high) == pytest.approx((min(inside), max(inside)), abs=2e-4)


def likelihood_score_closed(gained: int, lost: int, count: int, difference: float) -> float:
    """The same by the roots of the likelihood equation."""
    roots = numpy.roots([2 * count, -gained - lost + (2 * count - gained + lost) * difference,
                         -lost * difference * (1 - difference)])  # fmt: skip
    share = max(roots.real)
    return (gained - lost - count * difference) / math.sqrt(count * (2 * share + difference * (1 - difference)))


@pytest.mark.parametrize("count", [1, 132, 133, 5000])
def test_no_flips_pass_from_133_documents_on_at_two_points(count: int) -> None:
    found = paired_rule(0, 0, count, 0.02, LEVELS)
    assert (found.high <= 0.02) == (count >= 133)
    assert found.needed == 133


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.sampled_from([0.01, 0.05, 0.2]))
def test_holm_is_the_closure_of_bonferroni(values: list[float], alpha: float) -> None:
    """A hypothesis falls when every set of hypotheses that contains it is rejected by Bonferroni."""
    places = range(len(values))
    sets = [s for size in range(1, len(values) + 1) for s in itertools.combinations(places, size)]
    rejected = {s: min(values[i] for i in s) <= alpha / len(s) for s in sets}
    assert holm(values, alpha) == tuple(all(rejected[s] for s in sets if place in s) for place in places)


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (0, 5), (7, 7), (3, 11), (40, 90), (400, 520)])
def test_mcnemar_is_the_binomial_test(gained: int, lost: int) -> None:
    expected = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    assert mcnemar(gained, lost) == pytest.approx(expected)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 60), st.floats(-0.1, 0.1), st.integers(0, 10_000))
def test_mean_rule_is_the_t_test(count: int, limit: float, seed: int) -> None:
    values = numpy.random.default_rng(seed).normal(0.01, 0.05, count)
    found = mean_rule(values, limit, LEVELS)
    assert found.p_above == pytest.approx(stats.ttest_1samp(values, limit, alternative="greater").pvalue, abs=1e-9)
    assert (found.p_above <= 0.05) == (found.low >= limit)
    above = stats.ttest_1samp(values, limit, alternative="less").pvalue
    assert (found.high <= limit) == (above <= 0.05)


@settings(max_examples=30, deadline=None)
@given(st.integers(8, 40), st.floats(0.1, 1.0), st.floats(0.5, 2.0), st.integers(0, 10_000))
def test_kl_rule_agrees_with_its_bounds(count: int, spread: float, limit: float, seed: int) -> None:
    values = numpy.random.default_rng(seed).lognormal(0, spread, count)
    found = kl_rule(values, limit, LEVELS)
    error = values.std(ddof=1) / (math.sqrt(count) * values.mean())
    reach = stats.t.isf(0.05, count - 1)
    assert found.low == pytest.approx(values.mean() * math.exp(-reach * error))
    assert found.high >= values.mean() * math.exp(reach * error) * (1 - 1e-12)
    assert (found.p_above <= 0.05) == (found.low >= limit)


@settings(max_examples=40, deadline=None)
@example(8, 8488, 0.125)
@given(st.integers(8, 40), st.integers(0, 10_000), st.floats(0.02, 0.5))
def test_ratio_bounds_are_where_the_tests_turn(count: int, seed: int, limit: float) -> None:
    """A rise belongs to the interval when the mean of `now - (1 + rise) * before` cannot be told from 0."""
    source = numpy.random.default_rng(seed)
    before = source.lognormal(0, 0.4, count)
    now = before * 1.1 * source.lognormal(0, 0.2, count)
    found = ratio_rule(now, before, limit, LEVELS)
    if math.isfinite(found.low):
        assert stats.ttest_1samp(now - (1 + found.low) * before, 0, alternative="greater").pvalue == pytest.approx(0.05)
        assert (found.low >= limit) == (found.p_above <= 0.05)
    strict, excess = 0.05 / (1 + 8 / count), now - (1 + limit) * before
    reach = max(stats.t.isf(strict, count - 1), -bootstrap_reach(excess, 1 - 2 * strict)[0])
    if math.isinf(found.high):  # whether the old mean is above 0 is in doubt
        assert before.mean() / stats.sem(before) <= reach
        return
    assert (found.high <= limit) == (-excess.mean() / stats.sem(excess) >= reach)
    highest = now - (1 + found.high) * before
    assert -highest.mean() / stats.sem(highest) == pytest.approx(reach)


def test_a_ratio_to_next_to_nothing_has_no_bounds() -> None:
    before = numpy.array([1e-9] * 9 + [1.0])
    found = ratio_rule(before[::-1].copy(), before, 0.1, LEVELS)
    assert (found.low, found.high) == (-math.inf, math.inf)


def test_units_needed_are_those_of_the_book() -> None:
    """Coefficient of variation 0.5, an even chance: 20 % under the limit takes 15, 9 % under takes 75 or so."""
    assert units_needed(math.log(1 / 0.8) / 0.5, 0.05, power=0.5) in (15, 16)
    assert units_needed(math.log(1 / 0.91) / 0.5, 0.05, power=0.5) in range(75, 80)
    assert units_needed(0.0, 0.05) is None
    assert units_needed(1e-9, 0.05) is None
    assert units_needed(math.inf, 0.05) == 2


@settings(max_examples=30, deadline=None)
@given(st.floats(0.05, 3.0), st.sampled_from([0.01, 0.05]))
def test_units_needed_is_the_smallest_number_that_does(gap: float, level: float) -> None:
    def enough(count: int) -> bool:
        return bool(stats.t.isf(level, count - 1) + stats.norm.ppf(0.8) <= gap * math.sqrt(count))

    found = units_needed(gap, level)
    assert found is not None
    assert enough(found)
    assert found == 2 or not enough(found - 1)


def test_units_needed_decide_as_often_as_they_say() -> None:
    """Documents for 80 %: 8 % of answers flip, none lost on balance, two points allowed; about 1,240."""
    found = paired_rule(16, 16, 400, 0.02, LEVELS).needed
    assert found is not None
    assert 1200 < found < 1300
    source = numpy.random.default_rng(3)
    draws = source.multinomial(found, [0.04, 0.04, 0.92], size=400)
    passed = sum(paired_rule(int(g), int(b), found, 0.02, LEVELS).high <= 0.02 for g, b, _ in draws)
    assert passed / 400 == pytest.approx(0.8, abs=0.06)


def test_what_does_not_vary_is_certain_and_what_lies_on_the_limit_is_not() -> None:
    same = numpy.full(10, 0.3)
    assert mean_rule(same, 0.4, LEVELS).p_above == 1
    assert mean_rule(same, 0.2, LEVELS).p_above == 0
    assert mean_rule(numpy.array([0.1, 0.3]), 0.2, LEVELS).needed is None
    zero = kl_rule(numpy.zeros(10), 0.05, LEVELS)
    assert (zero.estimate, zero.high, zero.p_above) == (0, 0, 1)
