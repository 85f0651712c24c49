"""Intervals that keep their promise."""

import numpy
import pytest
from scipy import stats

from llmcompress.eval.statistics import bootstrap_t, cluster_t, design_effect, kl_interval

VALUES = numpy.array([0.1, 0.12, 0.08, 0.2, 0.11, 0.09, 0.15, 0.1])


def test_cluster_t_is_the_textbook_interval() -> None:
    expected = stats.ttest_1samp(VALUES, 0).confidence_interval(0.95)
    assert cluster_t(VALUES) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize("interval", [cluster_t, bootstrap_t, kl_interval])
def test_intervals_scale_and_contain_the_mean(interval: object) -> None:
    low, high = interval(VALUES)  # type: ignore[operator]
    assert low < VALUES.mean() < high
    assert interval(VALUES * 1e-3) == pytest.approx((low * 1e-3, high * 1e-3))  # type: ignore[operator]
    assert interval(VALUES[:1]) is None  # type: ignore[operator]
    assert interval(numpy.full(5, 0.3)) == pytest.approx((0.3, 0.3))  # type: ignore[operator]


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
