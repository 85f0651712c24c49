"""Searching the smallest plan inside a damage limit, and the bounds it is held against."""

import math
import random

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_allocate import allocate as toy

from llmcompress.compress.limits import MOST_PROBES, search
from llmcompress.compress.statistics import mean, standard_error, upper_bound, upper_bound_signed
from llmcompress.errors import InputError
from llmcompress.types import BitAllocation

_, TOY = toy("3bits")


def sized(bits: float) -> BitAllocation:
    """An allocation that stands for a size: sizes come in steps of 0.02 bits."""
    step = math.floor(bits / 0.02 + 1e-9)
    assigned = tuple(a.model_copy(update={"linear": f"{a.linear}-{step}"}) for a in TOY.assigned)
    return TOY.model_copy(update={"bits_per_weight": step * 0.02, "assigned": assigned})


@given(st.floats(0.5, 2.5), st.floats(-8, 1), st.floats(0, 0.3), st.integers(0, 100))
@settings(max_examples=200, deadline=None)
def test_the_answer_keeps_the_limit_within_eight_measurements(
    slope: float, wanted: float, bend: float, seed: int
) -> None:
    source = random.Random(seed)
    wobble = [source.uniform(-0.02, 0.02) for _ in range(1000)]

    def damage(allocation: BitAllocation) -> tuple[float, float]:
        bits = allocation.bits_per_weight
        value = math.exp(2 - slope * bits - bend * (bits - 5) ** 2 + wobble[round(bits / 0.02)])
        return value, 1.1 * value

    limit = math.exp(wanted)
    try:
        best, made = search(sized, damage, limit, smallest=2.2, largest=8.2, say="kld<=x")
    except InputError:
        assert damage(sized(8.2))[1] > limit
        return
    assert len(made) <= MOST_PROBES
    assert best.upper <= limit
    assert best.upper == damage(best.allocation)[1]
    assert best.allocation.bits_per_weight == min(p.allocation.bits_per_weight for p in made if p.upper <= limit)


@pytest.mark.parametrize("wanted", [1.0, 0.3, 0.1, 0.03, 0.01, 1e-3])
def test_the_answer_is_close_to_the_smallest_there_is(wanted: float) -> None:
    def damage(allocation: BitAllocation) -> tuple[float, float]:
        value = 60 * math.exp(-1.4 * allocation.bits_per_weight) * (1 + 0.5 * math.sin(allocation.bits_per_weight))
        return value, value

    best, _ = search(sized, damage, wanted, smallest=2.2, largest=8.2, say="kld<=x")
    smallest = next(b for b in (2.2 + 0.02 * k for k in range(301)) if damage(sized(b))[0] <= wanted)
    assert best.allocation.bits_per_weight <= smallest + 0.15


def test_what_cannot_be_met_says_what_can() -> None:
    with pytest.raises(InputError) as caught:
        search(sized, lambda _: (0.5, 0.6), 0.1, smallest=2.2, largest=8.2, say="budget kld<=0.1")
    assert "budget kld<=0.1 cannot be met" in caught.value.what
    assert "0.6" in caught.value.what


def test_the_smallest_formats_are_enough_when_they_are() -> None:
    best, made = search(sized, lambda a: (0.01, 0.02 / a.bits_per_weight), 0.1, smallest=2.2, largest=8.2, say="x")
    assert best.allocation.bits_per_weight == pytest.approx(2.2)
    assert len(made) == 2


def test_bounds_cover_skewed_means() -> None:
    """Per-sequence divergences are skewed; nine in ten bounds at 95 % must lie above the truth at 16 sequences."""
    source = numpy.random.default_rng(0)
    draws = source.lognormal(-2, 0.6, size=(2000, 16))
    truth = math.exp(-2 + 0.18)
    covered = numpy.mean([upper_bound(list(row)) >= truth for row in draws])
    assert 0.91 <= covered <= 0.99
    signed = source.normal(0.1, 1, size=(2000, 16))
    assert 0.935 <= numpy.mean([upper_bound_signed(list(row)) >= 0.1 for row in signed]) <= 0.965


def test_one_sequence_proves_nothing() -> None:
    assert upper_bound([0.1]) == math.inf
    assert upper_bound_signed([0.1]) == math.inf
    assert standard_error([0.1]) == math.inf
    assert upper_bound([0.0, 0.0]) == 0.0
    assert mean([1.0, 2.0, 6.0]) == 3.0
