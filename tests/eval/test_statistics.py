"""Intervals that keep their promise."""

import math

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from llmcompress.eval.statistics import (
    bootstrap_t,
    cluster_t,
    design_effect,
    kl_interval,
    log_t,
    student_coverage,
    student_quantile,
)

VALUES = numpy.array([0.1, 0.12, 0.08, 0.2, 0.11, 0.09, 0.15, 0.1])


@given(st.integers(1, 20_000), st.floats(0.01, 0.9999), st.floats(0, 50))
def test_student_is_that_of_scipy(freedom: int, level: float, reach: float) -> None:
    assert student_quantile(level, freedom) == pytest.approx(stats.t.isf((1 - level) / 2, freedom), rel=1e-8)
    assert student_coverage(reach, freedom) == pytest.approx(1 - 2 * stats.t.sf(reach, freedom), abs=1e-10)
    assert student_coverage(-reach, freedom) == student_coverage(reach, freedom)


def test_cluster_t_is_the_textbook_interval() -> None:
    expected = stats.ttest_1samp(VALUES, 0).confidence_interval(0.95)
    assert cluster_t(VALUES) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("interval", [cluster_t, bootstrap_t, log_t, kl_interval])
def test_intervals_scale_and_contain_the_mean(interval: object) -> None:
    low, high = interval(VALUES)  # type: ignore[operator]
    assert low < VALUES.mean() < high
    assert interval(VALUES * 1e-3) == pytest.approx((low * 1e-3, high * 1e-3))  # type: ignore[operator]
    assert interval(VALUES[:1]) is None  # type: ignore[operator]
    assert interval(numpy.full(5, 0.3)) == pytest.approx((0.3, 0.3))  # type: ignore[operator]


def test_log_t_by_hand() -> None:
    """n = 4, mean 0.25, s = 0.1: the 97.5 % point of t with 3 degrees of freedom is 3.18245."""
    values = 0.25 + 0.1 * math.sqrt(3) / 2 * numpy.array([-1.0, -1.0, 1.0, 1.0])
    factor = math.exp(3.182446305 * 0.1 / (2 * 0.25))
    assert log_t(values) == pytest.approx((0.25 / factor, 0.25 * factor), rel=1e-8)
    one_sided = log_t(values, 0.9) or (0.0, 0.0)
    assert one_sided[1] == pytest.approx(0.25 * math.exp(2.353363435 * 0.1 / (2 * 0.25)), rel=1e-8)


def test_bootstrap_t_is_seeded_and_equals_a_loop() -> None:
    source, pivots = numpy.random.default_rng(7), []
    picks = source.integers(len(VALUES), size=(300, len(VALUES)))
    for row in picks:
        draw = VALUES[row]
        pivots.append((draw.mean() - VALUES.mean()) / (draw.std(ddof=1) / math.sqrt(len(VALUES))))
    error = VALUES.std(ddof=1) / math.sqrt(len(VALUES))
    low, high = (VALUES.mean() - numpy.quantile(pivots, q) * error for q in (0.95, 0.05))
    assert bootstrap_t(VALUES, 0.9, 7, resamples=300) == pytest.approx((low, high))


@pytest.mark.parametrize("count", [2, 3])
def test_too_few_to_resample_is_not_certainty(count: int) -> None:
    """Resamples of one repeated value have no spread; leaving them out of two values would leave no width."""
    assert bootstrap_t(VALUES[:count]) is None
    assert kl_interval(VALUES[:count]) == log_t(VALUES[:count])


def test_kl_interval_is_the_wider_of_its_two_parts_above() -> None:
    for values in (VALUES, VALUES + 1.0, numpy.random.default_rng(4).lognormal(0, 1.5, size=40)):
        found, plain, resampled = kl_interval(values), log_t(values), bootstrap_t(values)
        assert found is not None
        assert plain is not None
        assert resampled is not None
        assert found == (plain[0], max(plain[1], resampled[1]))


def test_kl_interval_is_never_negative_and_at_least_as_wide_above() -> None:
    skewed = numpy.array([0.001] * 9 + [0.5])
    low, high = kl_interval(skewed) or (0.0, 0.0)
    assert low > 0
    plain = cluster_t(skewed) or (0.0, 0.0)
    assert plain[0] < 0
    assert high > plain[1]
    assert kl_interval(numpy.zeros(4)) == (0.0, 0.0)


def test_upper_bound_of_skewed_values_covers() -> None:
    """95 % two-sided intervals of a lognormal mean: the upper end is passed in about 2.5 % of samples."""
    source = numpy.random.default_rng(0)
    truth = float(numpy.exp(0.8**2 / 2))
    missed = 0
    for _ in range(200):
        low, high = kl_interval(source.lognormal(0, 0.8, size=32)) or (0.0, 0.0)
        missed += not low <= truth <= high
    assert missed < 20


def test_design_effect_is_one_for_independent_tokens_and_the_length_for_copies() -> None:
    source = numpy.random.default_rng(1)
    tokens = source.normal(size=(400, 50))
    counts = numpy.full(400, 50.0)
    assert design_effect(tokens.mean(1), tokens.var(1), counts) == pytest.approx(1, abs=0.2)
    copies = numpy.repeat(source.normal(size=(400, 1)), 50, 1)
    assert design_effect(copies.mean(1), copies.var(1), counts) == pytest.approx(50, rel=0.01)


def test_design_effect_of_what_cannot_be_told() -> None:
    pair, flat = numpy.array([0.1, 0.2]), numpy.zeros(2)
    assert design_effect(pair[:1], pair[:1], pair[:1]) is None
    assert design_effect(flat, flat, pair) is None
    for bad in (math.inf, math.nan):
        assert design_effect(numpy.array([0.1, bad]), pair, pair) is None
