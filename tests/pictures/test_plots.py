"""Marks lie where their values are: equal steps are equal distances, larger values lie farther along the axis."""

import itertools
import math
import re
import xml.etree.ElementTree as tree

import pytest
from synthetic_reports import make_blocks
from synthetic_scores import make_file

from llmcompress.pictures.curves import Axes, Point, curve
from llmcompress.pictures.forest import Interval, forest
from llmcompress.pictures.histogram import histogram
from llmcompress.pictures.losses import block_losses
from llmcompress.pictures.runs import Sized, size_against_kl

SVG = "{http://www.w3.org/2000/svg}"


def marks(svg: str) -> list[tuple[float, float, str]]:
    """Centre and tip of every round mark, in the order drawn."""
    found = tree.fromstring(svg).iter(f"{SVG}circle")
    return [(float(c.get("cx", 0)), float(c.get("cy", 0)), c.findtext(f"{SVG}title") or "") for c in found]


def lines(svg: str, kind: str) -> list[list[tuple[float, float]]]:
    found = [e for e in tree.fromstring(svg).iter() if e.get("class") == kind and e.get("points")]
    return [[(float(x), float(y)) for x, y in (p.split(",") for p in e.get("points", "").split())] for e in found]


def test_a_curve_is_linear_from_zero_with_its_band_around_it() -> None:
    points = [Point(0, 1.0, 0.5, 2.0), Point(1, 2.0, 1.0, 4.0), Point(3, 3.0, 2.5, 3.5)]
    svg = curve(points, Axes("t", "f", "x", "y"))
    (ax, ay, _), (bx, by, _), (cx, cy, _) = marks(svg)
    assert ay - by == pytest.approx(by - cy, abs=0.02)
    assert cx - bx == pytest.approx(2 * (bx - ax), abs=0.02)
    step = ay - by
    band = lines(svg, "band")[0]
    wanted = [ay - step * (end - 1) for end in (2.0, 4.0, 3.5, 2.5, 1.0, 0.5)]
    assert [y for _, y in band] == pytest.approx(wanted, abs=0.05)
    axis = max(y for _, y in lines(svg, "axis")[-1])
    assert axis == pytest.approx(ay + step, abs=0.05)  # one step below 1 is 0


def test_intervals_lie_between_their_ends_on_one_axis() -> None:
    rows = [Interval("a", 0.5, 0.4, 0.7, ""), Interval("b", 1.5, 1.0, 1.8, "")]
    svg = forest(rows, title="t", facts="f", across="x", rule=(1.0, "limit"), zero=True)
    (ax, ay, _), (bx, by, _) = marks(svg)
    unit = bx - ax
    spans = [line for line in lines(svg, "line") if line[0][1] == line[1][1]]
    assert [x for line in spans for x, _ in line] == pytest.approx(
        [ax - 0.1 * unit, ax + 0.2 * unit, bx - 0.5 * unit, bx + 0.3 * unit], abs=0.05
    )
    assert ay < by
    assert lines(svg, "edge")[0][0][0] == pytest.approx((ax + bx) / 2, abs=0.05)


def test_losses_lie_on_one_logarithmic_axis_in_their_block() -> None:
    blocks = make_blocks(make_file(8))
    svg = block_losses(blocks)
    found = marks(svg)
    joined = {line[0][0]: sorted(y for _, y in line) for line in lines(svg, "lead") if line[0][0] == line[1][0]}
    for x, ends in joined.items():
        assert ends == [act(y for at, y, _ in found if at == x) for act in (min, max)]
    assert len(joined) == len(blocks)
    wanted = [(block.block, math.log(x.relative_loss), x.linear) for block in blocks for x in block.linears]
    assert [tip.split(":")[0] for _, _, tip in found] == [name for _, _, name in wanted]
    (_, first, _), (_, second, _) = found[0], max(found, key=lambda mark: mark[1])
    low = min(value for _, value, _ in wanted)
    per_unit = (second - first) / (wanted[0][1] - low)
    for (x, y, _), (block, value, _) in zip(found, wanted, strict=True):
        assert y == pytest.approx(first + per_unit * (wanted[0][1] - value), abs=0.05)
        assert x == pytest.approx(found[0][0] + block * (found[-1][0] - found[0][0]) / 7, abs=0.05)


def test_models_lie_by_size_and_divergence_and_the_best_are_joined() -> None:
    rows = [Sized("a", 2.0, 0.4), Sized("b", 3.0, 0.1, 0.05, 0.2), Sized("c", 4.0, 0.2), Sized("d", 5.0, 0.025)]
    svg = size_against_kl(rows, title="t", size="bits")
    found = marks(svg)  # the first is a star
    assert [tip[0] for _, _, tip in found] == ["b", "c", "d"]
    (bx, by, _), (cx, cy, _), (dx, dy, _) = found
    assert cx - bx == pytest.approx(dx - cx, abs=0.02)
    assert dy - by == pytest.approx(2 * (by - cy), abs=0.05)
    whiskers = [line for line in lines(svg, "axis") if line[0][0] == line[1][0] == bx]
    ends = max((sorted(y for _, y in line) for line in whiskers), key=lambda pair: pair[1] - pair[0])
    assert ends == pytest.approx([by - (by - cy), by + (by - cy)], abs=0.05)
    stairs = lines(svg, "line")[0]
    assert (cx, cy) not in stairs
    assert {(bx, by), (dx, dy)} <= set(stairs)
    assert re.search(r'class="pale"', svg)


def test_bars_are_as_high_as_the_logarithm_of_their_count() -> None:
    svg = histogram([1.0, 10.0, 100.0, 1000.0], [1, 10, 100], title="t", facts="f", unit="nats", marks=[("m", 10.0)])
    bars = [r for r in tree.fromstring(svg).iter(f"{SVG}rect") if r.get("class") == "bar"]
    heights = [float(bar.get("height", 0)) for bar in bars]
    steps = [later - sooner for sooner, later in itertools.pairwise(heights)]
    assert steps[0] == pytest.approx(steps[1], abs=0.02)
    lefts = [float(bar.get("x", 0)) for bar in bars]
    assert lefts[1] - lefts[0] == pytest.approx(lefts[2] - lefts[1], abs=0.02)
    assert any(line[0][0] == line[1][0] == pytest.approx(lefts[1]) for line in lines(svg, "axis"))
