"""Means over sequences and what may be claimed of them. The sequence is the unit, never the token."""

import math
from collections.abc import Sequence

import numpy
from scipy.special import stdtrit


def mean(values: Sequence[float]) -> float:
    """Plain mean."""
    return math.fsum(values) / len(values)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean over sequences; infinite for fewer than two."""
    if len(values) < 2:
        return math.inf
    return float(numpy.std(values, ddof=1)) / math.sqrt(len(values))


def upper_bound(values: Sequence[float], level: float = 0.95) -> float:
    """One-sided Student-t bound of a mean that cannot be negative, on the log scale.

    `m * exp(t * s / (sqrt(n) * m))`, which for skewed divergences covers better than `m + t s / sqrt(n)`.
    Infinite for fewer than two sequences.
    """
    if len(values) < 2:
        return math.inf
    middle = mean(values)
    if middle <= 0:
        return 0.0
    reach = float(stdtrit(len(values) - 1, level)) * standard_error(values) / middle
    return middle * math.exp(min(reach, 700.0))


def or_limit(bound: float) -> str:
    """The option that allows a positive upper bound, its least value of two digits, as an alternative to another.

    Empty where no limit does: one sequence has no bound.
    """
    if not math.isfinite(bound):
        return ""
    step = 10.0 ** (math.floor(math.log10(bound)) - 1)
    return f", or --max-kld {math.ceil(bound / step) * step:.2g}"


def upper_bound_signed(values: Sequence[float], level: float = 0.95) -> float:
    """One-sided Student-t bound of a mean of either sign, e.g. of changes in log-likelihood."""
    if len(values) < 2:
        return math.inf
    return mean(values) + float(stdtrit(len(values) - 1, level)) * standard_error(values)


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Two-sided Student-t interval of a mean; the whole line for fewer than two sequences."""
    if len(values) < 2:
        return -math.inf, math.inf
    reach = float(stdtrit(len(values) - 1, (1 + level) / 2)) * standard_error(values)
    return mean(values) - reach, mean(values) + reach
