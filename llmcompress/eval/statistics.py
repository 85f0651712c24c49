"""Intervals over sequences: the unit is the sequence, never the token.

Tokens of one sequence are not independent; the error bar that treats them so covers the truth far
less often than it says.
"""

import math

import numpy
from numpy.typing import NDArray
from scipy import stats

RESAMPLES = 2000
Floats = NDArray[numpy.float64]


def cluster_t(values: Floats, level: float = 0.95) -> tuple[float, float] | None:
    """Student-t interval of the mean of per-sequence values; None for fewer than two."""
    count = len(values)
    if count < 2:
        return None
    mean, error = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(count)
    reach = float(stats.t.ppf(0.5 + level / 2, count - 1)) * error
    return mean - reach, mean + reach


def bootstrap_t(values: Floats, level: float = 0.95, seed: int = 0) -> tuple[float, float] | None:
    """Studentised bootstrap interval of the mean (Efron): the skewed cousin of `cluster_t`."""
    count = len(values)
    if count < 2:
        return None
    mean, spread = float(values.mean()), float(values.std(ddof=1))
    if spread == 0:
        return mean, mean
    draws = values[numpy.random.default_rng(seed).integers(count, size=(RESAMPLES, count))]
    means, spreads = draws.mean(1), draws.std(1, ddof=1)
    kept = spreads > 0
    pivots = (means[kept] - mean) / (spreads[kept] / math.sqrt(count))
    if len(pivots) == 0:
        return mean, mean
    low, high = numpy.quantile(pivots, [0.5 - level / 2, 0.5 + level / 2])
    error = spread / math.sqrt(count)
    return mean - float(high) * error, mean - float(low) * error


def kl_interval(values: Floats, level: float = 0.95, seed: int = 0) -> tuple[float, float] | None:
    """Interval of a mean KL divergence: the log-scale t bounds, the upper one widened to the bootstrap's.

    `m * exp(+-t * s / (sqrt(n) * m))`; never negative, and conservative above, where it matters.
    """
    count = len(values)
    if count < 2:
        return None
    mean, spread = float(values.mean()), float(values.std(ddof=1))
    if mean <= 0:
        return 0.0, 0.0
    reach = float(stats.t.ppf(0.5 + level / 2, count - 1)) * spread / (math.sqrt(count) * mean)
    resampled = bootstrap_t(values, level, seed)
    upper = mean * math.exp(min(reach, 700.0))
    return mean * math.exp(-reach), max(upper, resampled[1] if resampled else upper)


def design_effect(means: Floats, spreads: Floats, positions: Floats) -> float | None:
    """Variance of the mean with sequences as the unit, over what independent tokens would give.

    `means` and `spreads` are each sequence's mean and variance over its `positions`. None when it cannot be told.
    """
    count, tokens = len(means), float(positions.sum())
    if count < 2:
        return None
    between = float(means.var(ddof=1)) / count
    overall = float((means * positions).sum()) / tokens
    pooled = float(((spreads + (means - overall) ** 2) * positions).sum()) / tokens
    return between / (pooled / tokens) if pooled > 0 else None
