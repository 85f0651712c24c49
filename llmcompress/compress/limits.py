"""The smallest model inside a damage limit: a search over sizes, every step measured.

Damage falls with size and nearly exponentially, so each step interpolates the logarithm of the measured bound
against bits per weight between the nearest size that fails and the nearest that passes. What passes is
the upper confidence bound of the damage, not its mean.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from llmcompress.errors import InputError
from llmcompress.types import BitAllocation

MOST_PROBES = 8
CLOSE = 0.005  # of the bits per weight: a plan never has to be closer to its budget than that
INWARDS = 0.1  # an interpolated size keeps this share of the bracket from both ends


@dataclass(frozen=True)
class Probe:
    """One size that was measured: the allocation, its mean damage and the upper bound of it."""

    allocation: BitAllocation
    damage: float
    upper: float


Allocate = Callable[[float], BitAllocation]
Measure = Callable[[BitAllocation], tuple[float, float]]


def search(
    allocate: Allocate, measure: Measure, limit: float, *, smallest: float, largest: float, say: str
) -> tuple[Probe, tuple[Probe, ...]]:
    """The smallest allocation whose upper bound is within `limit`, and every one measured, at most `MOST_PROBES`.

    `allocate(bits)` gives the best allocation of at most that many bits per weight, `measure(allocation)` its
    damage and upper bound. `say` names the limit in messages. Raises InputError when even the largest fails.
    """
    made: list[Probe] = []

    def probe(bits: float) -> Probe:
        allocation = allocate(bits)
        known = next((p for p in made if p.allocation.assigned == allocation.assigned), None)
        if known is None:
            known = Probe(allocation, *measure(allocation))
            made.append(known)
        return known

    high = probe(largest)
    if high.upper > limit:
        raise InputError(
            f"{say} cannot be met: with the largest formats the bound is {high.upper:.4g}",
            f"ask for {high.upper * 1.05:.3g} or more, allow more bits with --set plan.bits, or measure on more text "
            "with --set calibration.samples",
        )
    low = probe(smallest)
    if low.upper <= limit:
        return low, tuple(made)
    low_bits, high_bits = smallest, largest
    steps = 0
    while len(made) < MOST_PROBES and steps < 2 * MOST_PROBES and high_bits - low_bits > CLOSE * high_bits:
        steps += 1
        bits = _between(low_bits, high_bits, low=low.upper, high=high.upper, limit=limit)
        found = probe(bits)
        if found.upper <= limit:
            high, high_bits = found, min(bits, found.allocation.bits_per_weight + 1e-9)
        else:
            low, low_bits = found, bits
    return high, tuple(made)


def _between(low_bits: float, high_bits: float, *, low: float, high: float, limit: float) -> float:
    """A size inside the bracket, where a straight line through the logarithms meets the limit."""
    share = 0.5
    if low > high > 0 and limit > 0:
        share = (math.log(low) - math.log(limit)) / (math.log(low) - math.log(high))
    return low_bits + min(max(share, INWARDS), 1 - INWARDS) * (high_bits - low_bits)
