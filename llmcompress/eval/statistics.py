"""Intervals over sequences: the unit is the sequence, never the token.

Tokens of one sequence are not independent; the error bar that treats them so covers the truth far
less often than it says.
"""

import math
from statistics import NormalDist

import numpy
from numpy.typing import NDArray

RESAMPLES = 2000
FEWEST_RESAMPLED = 4  # below, resamples of one repeated value decide the ends
NEWTON_STEPS = 200
Floats = NDArray[numpy.float64]


def student_coverage(reach: float, freedom: int) -> float:
    """P(|T| <= reach) of Student's t with whole degrees of freedom: a finite sum (Abramowitz & Stegun 26.7.3, 26.7.4).

    Every term is positive, so nothing cancels. scipy says the same, but takes half a second to import.
    """
    angle = math.atan(abs(reach) / math.sqrt(freedom))
    odd = freedom % 2
    steps = numpy.arange(1, max((freedom - odd) // 2, 1), dtype=numpy.float64)
    ratios = (2 * steps - 1 + odd) / (2 * steps + odd) * math.cos(angle) ** 2
    series = 1 + float(numpy.cumprod(ratios).sum())
    if not odd:
        return math.sin(angle) * series
    return 2 / math.pi * (angle + (math.sin(angle) * math.cos(angle) * series if freedom > 1 else 0.0))


def student_quantile(level: float, freedom: int) -> float:
    """The reach with `student_coverage(reach, freedom) == level`, for a level within (0, 1).

    Newton's method from the normal quantile, which is too small. Coverage is concave, so every step falls short of the
    root or meets it.
    """
    halves = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    reach = NormalDist().inv_cdf(0.5 + level / 2)
    for _ in range(NEWTON_STEPS):
        slope = 2 * math.exp(halves - (freedom + 1) / 2 * math.log1p(reach**2 / freedom)) / math.sqrt(freedom * math.pi)
        step = (level - student_coverage(reach, freedom)) / slope
        reach += step
        if abs(step) <= 1e-12 * reach:
            break
    return reach


def cluster_t(values: Floats, level: float = 0.95) -> tuple[float, float] | None:
    """Student-t interval of the mean of per-sequence values; None for fewer than two."""
    count = len(values)
    if count < 2:
        return None
    mean, error = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(count)
    reach = student_quantile(level, count - 1) * error
    return mean - reach, mean + reach


def bootstrap_t(
    values: Floats, level: float = 0.95, seed: int = 0, *, resamples: int = RESAMPLES
) -> tuple[float, float] | None:
    """Studentised bootstrap interval of the mean (Efron): the skewed cousin of `cluster_t`.

    None for fewer than `FEWEST_RESAMPLED` values.
    """
    if len(values) < FEWEST_RESAMPLED:
        return None
    low, high = bootstrap_reach(values, level, seed, resamples=resamples)
    mean, error = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values))
    return mean - high * error, mean - low * error


def bootstrap_reach(
    values: Floats, level: float = 0.95, seed: int = 0, *, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Quantiles of resampled t statistics, in place of Student's; 0 where nothing varies. Two values or more."""
    count, mean = len(values), float(values.mean())
    draws = values[numpy.random.default_rng(seed).integers(count, size=(resamples, count))]
    means, spreads = draws.mean(1), draws.std(1, ddof=1)
    kept = spreads > 0
    if not kept.any() or values.std() == 0:
        return 0.0, 0.0
    pivots = (means[kept] - mean) / (spreads[kept] / math.sqrt(count))
    low, high = numpy.quantile(pivots, [0.5 - level / 2, 0.5 + level / 2])
    return float(low), float(high)


def log_t(values: Floats, level: float = 0.95) -> tuple[float, float] | None:
    """Student-t interval of the mean on the log scale, `m * exp(+-t * s / (sqrt(n) * m))`; never negative.

    None for fewer than two values. A one-sided bound at level `a` is an end of the interval at `2a - 1`.
    """
    count = len(values)
    if count < 2:
        return None
    mean, spread = float(values.mean()), float(values.std(ddof=1))
    if mean <= 0:
        return 0.0, 0.0
    reach = student_quantile(level, count - 1) * spread / (math.sqrt(count) * mean)
    return mean * math.exp(-reach), mean * math.exp(min(reach, 700.0))


def kl_interval(values: Floats, level: float = 0.95, seed: int = 0) -> tuple[float, float] | None:
    """Interval of a mean KL divergence: `log_t`, its upper end widened to that of `bootstrap_t`.

    Conservative above, where it matters. None for fewer than two values.
    """
    plain, resampled = log_t(values, level), bootstrap_t(values, level, seed)
    if plain is None or resampled is None:
        return plain
    return plain[0], max(plain[1], resampled[1])


def design_effect(means: Floats, spreads: Floats, positions: Floats) -> float | None:
    """Variance of the mean with sequences as the unit, over what independent tokens would give.

    `means` and `spreads` are each sequence's mean and variance over its `positions`.
    None when it cannot be told: fewer than two sequences, something not finite, or no variance.
    """
    count, tokens = len(means), float(positions.sum())
    if count < 2 or not (numpy.isfinite(means).all() and numpy.isfinite(spreads).all()):
        return None
    between = float(means.var(ddof=1)) / count
    overall = float((means * positions).sum()) / tokens
    pooled = float(((spreads + (means - overall) ** 2) * positions).sum()) / tokens
    return between * tokens / pooled if pooled > 0 else None
