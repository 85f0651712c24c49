"""Is a mean damage within its limit? Four rules, one for each kind of figure, and what holds their answers together.

Every rule is a paired test of "worse than the limit" and of its opposite. A pass is proven, a fail is proven, and
where the sample can prove neither the rule says how large it would have to be. Damage is positive: larger is worse.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy
from numpy.typing import NDArray

from llmcompress.eval.statistics import (
    bootstrap_reach,
    cluster_t,
    kl_interval,
    log_t,
    student_coverage,
    student_quantile,
)

SMALL_SAMPLE = 8  # with n sequences a skewed bound misses about `1 + 8 / n` times as often as it says (bench/gate.py)
POWER = 0.8  # the chance of a decision that `needed` aims at
MOST_UNITS = 1_000_000  # more are as good as never
HALVINGS = 60
Floats = NDArray[numpy.float64]
NORMAL = NormalDist()


@dataclass(frozen=True)
class Finding:
    """What one rule found in `count` sequences or documents.

    estimate   mean damage
    low, high  one-sided bounds of it at level `1 - alpha` each; infinite where there is none
    p_above    chance of damage this large if the truth were just within the limit; small: the limit is exceeded
    needed     how many would decide with a chance of `POWER` if all stays as measured; None: more than `MOST_UNITS`
    """

    count: int
    estimate: float
    low: float
    high: float
    p_above: float
    needed: int | None


@dataclass(frozen=True)
class Levels:
    """Error rates: of a pass that should not be, and of a fail that should not be (smaller where there are several)."""

    passing: float
    failing: float


def kl_rule(values: Floats, limit: float, levels: Levels) -> Finding:
    """Mean KL divergence of sequences, on the log scale.

    The upper bound is the larger of the log-t bound `m * exp(t * s / (sqrt(n) * m))` and that of the studentised
    bootstrap, at an error rate made smaller where sequences are few. `values` (sequences,) in nats per token, four or
    more; `limit` positive.
    """
    mean = float(values.mean())
    relative = float(values.std(ddof=1)) / mean if mean > 0 else 0.0
    gap = _gap(math.log(limit / mean), relative) if mean > 0 else math.inf
    low, _ = _whole(log_t(values, 1 - 2 * levels.passing))
    _, high = _whole(kl_interval(values, 1 - 2 * _strict(levels.passing, len(values))))
    return _by_student(len(values), mean, (low, high), gap=gap, levels=levels)


def mean_rule(values: Floats, limit: float, levels: Levels) -> Finding:
    """Mean of paired differences, by Student's t with sequences or documents as the unit; two or more `values`."""
    mean, spread = float(values.mean()), float(values.std(ddof=1))
    bounds = _whole(cluster_t(values, 1 - 2 * levels.passing))
    return _by_student(len(values), mean, bounds, gap=_gap(limit - mean, spread), levels=levels)


def ratio_rule(now: Floats, before: Floats, limit: float, levels: Levels) -> Finding:
    """Relative rise of a mean, `mean(now) / mean(before) - 1`, over the same sequences, by Fieller's theorem.

    The mean of `now - (1 + limit) * before` is tested against 0, so the noise of `before` counts too; for a pass also
    with the t statistics of resamples. The mean of `before` must be positive. Bounds are infinite where it is not above
    0 beyond doubt.
    """
    excess = now - (1 + limit) * before
    gap = _gap(-float(excess.mean()), float(excess.std(ddof=1)))
    strict = 1 - 2 * _strict(levels.passing, len(now))
    low, _ = _fieller(now, before, student_quantile(1 - 2 * levels.passing, len(now) - 1))
    _, high = _fieller(now, before, max(student_quantile(strict, len(now) - 1), -bootstrap_reach(excess, strict)[0]))
    estimate = float(now.mean() / before.mean()) - 1
    return _by_student(len(now), estimate, (low - 1, high - 1), gap=gap, levels=levels)


def paired_rule(gained: int, lost: int, count: int, limit: float, levels: Levels) -> Finding:
    """Drop of the share of right answers among `count` documents, by Tango's score test (1998).

    `gained` only the candidate got right, `lost` only the reference; the drop is `(lost - gained) / count`.
    """
    drop, flips = (lost - gained) / count, (lost + gained) / count
    reach = NORMAL.inv_cdf(1 - levels.passing)
    score = tango_score(gained, lost, count, -limit)
    level = levels.passing if drop <= limit else levels.failing
    null, spread = tango_variance(gained, lost, count, -limit), math.sqrt(max(flips - drop**2, 0.0))
    wanted = NORMAL.inv_cdf(1 - level) * math.sqrt(null) + NORMAL.inv_cdf(POWER) * spread
    gap = abs(limit - drop)
    units = (wanted / gap) ** 2 if gap else math.inf
    return Finding(
        count=count,
        estimate=drop,
        low=-_solve(gained, lost, count, -reach),
        high=-_solve(gained, lost, count, reach),
        p_above=NORMAL.cdf(score),
        needed=math.ceil(units) if units <= MOST_UNITS else None,
    )


def tango_variance(gained: int, lost: int, count: int, difference: float) -> float:
    """Variance of one document's paired difference, were its mean `difference`: the likeliest such truth decides."""
    linear = -gained - lost + (2 * count - gained + lost) * difference
    constant = -lost * difference * (1 - difference)
    share = (math.sqrt(max(linear**2 - 8 * count * constant, 0.0)) - linear) / (4 * count)  # reference right alone
    return max(2 * share + difference * (1 - difference), 0.0)


def tango_score(gained: int, lost: int, count: int, difference: float) -> float:
    """How many standard errors the gain in right answers lies above `count * difference`, -1 < difference < 1."""
    excess = gained - lost - count * difference
    error = math.sqrt(count * tango_variance(gained, lost, count, difference))
    if error == 0:
        return math.copysign(math.inf, excess) if excess else 0.0
    return excess / error


def _solve(gained: int, lost: int, count: int, score: float) -> float:
    """The difference with that score, by halving: the score falls as the difference grows."""
    low, high = -1.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if tango_score(gained, lost, count, middle) > score:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p-value of McNemar's test: do the two models differ at all?"""
    flips, fewer = gained + lost, min(gained, lost)
    ways, total = 1, 0
    for place in range(fewer + 1):
        total += ways
        ways = ways * (flips - place) // (place + 1)
    return min(2 * total / (1 << flips), 1.0)


def holm(p_values: Sequence[float], alpha: float) -> tuple[bool, ...]:
    """Which hypotheses Holm's procedure rejects; the chance of any wrong rejection is at most `alpha`."""
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    rejected = [False] * len(order)
    for done, place in enumerate(order):
        if p_values[place] > alpha / (len(order) - done):
            break
        rejected[place] = True
    return tuple(rejected)


def units_needed(gap: float, level: float, power: float = POWER) -> int | None:
    """How many units reject at `level` with chance `power` when the mean lies `gap` standard deviations off.

    The smallest n with `(t(level, n - 1) + z(power)) / sqrt(n) <= |gap|`; None beyond `MOST_UNITS`.
    """
    beyond = NORMAL.inv_cdf(power)
    rough = ((NORMAL.inv_cdf(1 - level) + beyond) / gap) ** 2 if gap else math.inf
    if rough > MOST_UNITS:
        return None
    count = max(math.ceil(rough), 2)
    while student_quantile(1 - 2 * level, count - 1) + beyond > abs(gap) * math.sqrt(count):
        count += 1
    return count


def _by_student(count: int, estimate: float, bounds: tuple[float, float], *, gap: float, levels: Levels) -> Finding:
    """A finding whose mean lies `gap` standard deviations of one unit within the limit (beyond it if negative)."""
    reach = math.sqrt(count) * gap
    tail = (1 - student_coverage(reach, count - 1)) / 2
    level = levels.passing if gap >= 0 else levels.failing
    return Finding(
        count=count,
        estimate=estimate,
        low=bounds[0],
        high=bounds[1],
        p_above=1 - tail if gap >= 0 else tail,
        needed=units_needed(gap, level),
    )


def _gap(distance: float, spread: float) -> float:
    """A distance in standard deviations; infinite where nothing varies."""
    if spread > 0:
        return distance / spread
    return math.copysign(math.inf, distance) if distance else 0.0


def _strict(alpha: float, count: int) -> float:
    """The error rate to ask for, so that about `alpha` comes out."""
    return alpha / (1 + SMALL_SAMPLE / count)


def _fieller(above: Floats, below: Floats, reach: float) -> tuple[float, float]:
    """Interval of the ratio of two means of paired values, `reach` standard errors wide either way."""
    weight = reach**2 / len(above)
    spreads = numpy.cov(above, below)
    squares = float(below.mean()) ** 2 - weight * float(spreads[1, 1])
    mixed = float(above.mean() * below.mean()) - weight * float(spreads[0, 1])
    rest = float(above.mean()) ** 2 - weight * float(spreads[0, 0])
    if squares <= 0:
        return -math.inf, math.inf
    root = math.sqrt(max(mixed**2 - squares * rest, 0.0))
    return (mixed - root) / squares, (mixed + root) / squares


def _whole(interval: tuple[float, float] | None) -> tuple[float, float]:
    return interval if interval is not None else (-math.inf, math.inf)
