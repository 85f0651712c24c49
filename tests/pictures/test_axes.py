"""Scales are monotone, ticks are round and inside, labels keep apart."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmcompress.pictures.axes import linear_scale, log_scale, place_labels, ticks
from llmcompress.pictures.words import UNFIT, escape, listed, shorten

NUMBERS = st.floats(-1e12, 1e12)
POSITIVE = st.floats(1e-12, 1e12)


@given(st.lists(NUMBERS, min_size=1, max_size=20), st.booleans())
def test_linear_scales_are_monotone_and_hold_their_values(values: list[float], down: bool) -> None:
    scale = linear_scale(values, *((300.0, 10.0) if down else (10.0, 300.0)))
    places = [scale.at(value) for value in sorted(values)]
    assert places == sorted(places, reverse=down)
    assert all(10 <= place <= 300 for place in places)
    found = ticks(scale)
    assert found == sorted(set(found))
    assert 1 <= len(found) <= 10
    assert all(scale.low - 1e-6 * abs(scale.low) <= tick <= scale.high + 1e-6 * abs(scale.high) for tick in found)


@given(st.lists(POSITIVE, min_size=1, max_size=20))
def test_log_scales_are_monotone_and_have_ticks_enough(values: list[float]) -> None:
    scale = log_scale(values, 300.0, 10.0)
    places = [scale.at(value) for value in sorted(values)]
    assert places == sorted(places, reverse=True)
    found = ticks(scale)
    assert 3 <= len(found) <= 10
    assert all(scale.low <= tick * (1 + 1e-9) and tick <= scale.high * (1 + 1e-9) for tick in found)
    for tick in found:
        assert tick / 10 ** math.floor(math.log10(tick) + 1e-9) == pytest.approx(
            round(tick / 10 ** math.floor(math.log10(tick) + 1e-9))
        )


def test_equal_ratios_are_equal_distances_on_a_log_axis() -> None:
    scale = log_scale([1e-6, 1.0], 0.0, 100.0)
    steps = [scale.at(10.0**k) for k in range(-6, 1)]
    gaps = [later - sooner for sooner, later in itertools.pairwise(steps)]
    assert gaps == pytest.approx([gaps[0]] * 6)


def test_zero_lies_at_the_low_end_of_a_log_axis() -> None:
    scale = log_scale([0.0, 0.1, 1.0], 300.0, 10.0)
    assert scale.at(0.0) == 300.0
    assert scale.at(1.0) < scale.at(0.1) < 300.0


def test_labels_keep_apart_and_none_is_lost() -> None:
    points = [(100.0 + k % 3, 100.0 + k % 2, f"{k:02d}") for k in range(20)]
    parts = [part for part in place_labels(points, inside=(0, 0, 300, 300)) if part.startswith("<text")]
    assert len(parts) == 20
    places = sorted((float(p.split('x="')[1].split('"')[0]), float(p.split('y="')[1].split('"')[0])) for p in parts)
    for one, other in itertools.combinations(places, 2):
        assert abs(one[0] - other[0]) > 12 or abs(one[1] - other[1]) > 12


@given(st.text(max_size=300), st.integers(5, 60))
def test_words_are_short_and_mean_nothing_to_xml(words: str, most: int) -> None:
    short = shorten(words, most)
    assert len(short) <= most
    assert not UNFIT.search(short)
    assert not set(escape(words, most)) & set("<>\"'")
    if len(words) <= most and not UNFIT.search(words):
        assert short == words


def test_long_words_keep_both_ends() -> None:
    assert shorten("model.layers.0.self_attn.q_proj", 20).startswith("model.la")
    assert shorten("model.layers.0.self_attn.q_proj", 20).endswith("q_proj")
    assert listed(["a"]) == "a"
    assert listed(["a", "b", "c"]) == "a, b and c"
    assert listed([]) == "none"
