"""Pictures are whole, harmless documents that hold every figure they were given."""

import itertools
import re
import xml.etree.ElementTree as tree
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_reports import make_blocks
from synthetic_scores import make_file, make_scores, make_trace, path_series, usage_series

from llmcompress.compress.allocate.budget import parse_budget
from llmcompress.compress.decide import decide, desk_of, pick
from llmcompress.pictures.colours import contrast, letters_on, shade, width_colour
from llmcompress.pictures.columns import columns_of, named_trace
from llmcompress.pictures.curves import Axes, curve
from llmcompress.pictures.curves import Point as Along
from llmcompress.pictures.forest import Interval, forest
from llmcompress.pictures.frontier import Baseline, Point, frontier
from llmcompress.pictures.heatmap import bits_heat_map
from llmcompress.pictures.histogram import histogram, merged
from llmcompress.pictures.html import Html, el
from llmcompress.pictures.losses import block_losses
from llmcompress.pictures.page import Figure, page
from llmcompress.pictures.runs import Sized, size_against_kl
from llmcompress.pictures.sensitivity import damage_by_kind, sensitivity_curves
from llmcompress.pictures.svg import STYLE
from llmcompress.pictures.trajectory import breakpoint_words, breakpoints, path_of, trajectory
from llmcompress.pictures.voidmap import usage_of, void_map, void_words
from llmcompress.pictures.words import visible
from llmcompress.types import BitAllocation, ModelTrace, Series

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "<img src=x onerror=alert(1)>\x1b[31m\"'&\u202e]]>" + "y" * 500
SIZES = (1, 8, 32, 80)


def planned(blocks: int, *, head: bool = True) -> tuple[ModelTrace, BitAllocation]:
    file = make_file(blocks, head=head)
    return file.trace, decide(desk_of(file, pick(file)), parse_budget("3.5bits"))


def points(unit_scale: float = 1.0) -> list[Point]:
    return [Point(2.1 + k / 2, unit_scale * 4.0**-k, 5.0 * 4.0**-k if k % 2 else None) for k in range(12)]


def every_picture(blocks: int, name: str = "a model") -> Iterator[tuple[str, str]]:
    trace, allocation = planned(blocks)
    yield "bits", bits_heat_map(trace, allocation, name=name)
    yield "curves", sensitivity_curves(trace, make_scores(trace), allocation=allocation, name=name)
    yield "way", trajectory(path_series(blocks, tuple(range(0, blocks + 1, 3))), name=name)
    yield "voids", void_map(usage_series(blocks), name=name)
    base = [Baseline(name, Point(4.1, 0.2)), Baseline("other", Point(4.1, 0.2, 0.3))]
    yield "frontier", frontier(points(), unit="nats/token", baselines=base, chosen=Point(3.5, 0.1), name=name)
    yield (
        "curve",
        curve(
            [Along(k, 1.0 + k % 3, 0.8 + k % 3, 1.5 + k % 3) for k in range(-1, blocks)],
            Axes(name, name, "block", "error"),
            rules=[(float(k), str(k)) for k in range(0, blocks, 3)],
        ),
    )
    marks = [("median", 0.01), ("90 %", 0.1), ("95 %", 0.11), ("99 %", 0.12), ("99.9 %", 0.5)]
    edges, counts = [10.0 ** (k / 9 - 5) for k in range(blocks + 1)], [4 ** (k % 9) for k in range(blocks)]
    yield "histogram", histogram(edges, counts, title=name, facts=name, unit="nats", marks=marks)
    rows = [Interval(name, 0.1 * k, 0.1 * k - 0.05, 10.0**k, name) for k in range(min(blocks, 8))]
    yield "forest", forest(rows, title=name, facts=name, across="share", rule=(1.0, "limit"), zero=True)
    sizes = [Sized(f"{k} {name}", 3 + k / 9, 4.0 ** (-k % 5), 0.9 * 4.0 ** (-k % 5), 4.2 ** (-k % 5)) for k in range(9)]
    yield "runs", size_against_kl(sizes, title=name, size="bits")
    yield "losses", block_losses(make_blocks(make_file(blocks)), name=name)
    yield "two panels", frontier(points(9e4), unit="proxy loss", baselines=base, name=name)


def words_of(svg: str) -> list[str]:
    return [element.text or "" for element in tree.fromstring(svg).iter(f"{SVG}text")]


def check_harmless(svg: str) -> None:
    root = tree.fromstring(svg)
    allowed = {"svg", "title", "desc", "style", "rect", "text", "polyline", "polygon", "circle"}
    assert {element.tag.removeprefix(SVG) for element in root.iter()} <= allowed
    attributes = {name for element in root.iter() for name in element.attrib}
    assert not {name for name in attributes if name.startswith("on") or "href" in name or name == "style"}
    assert svg.count("http") == svg.count('xmlns="http://www.w3.org/2000/svg"') == 1
    assert not re.search(r"url\(|@import|javascript", svg)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e]", svg)


@pytest.mark.parametrize("blocks", SIZES)
def test_whole_accessible_and_harmless(blocks: int) -> None:
    for _, svg in every_picture(blocks):
        check_harmless(svg)
        root = tree.fromstring(svg)
        assert root.tag == f"{SVG}svg"
        assert root.get("role") == "img"
        assert [child.tag for child in root][:2] == [f"{SVG}title", f"{SVG}desc"]
        assert all(child.text for child in list(root)[:2])
        assert "prefers-color-scheme:dark" in svg


def test_the_harm_check_can_fail() -> None:
    svg = next(every_picture(1))[1]
    for bad in ("<script/>", "<a href='x'/>", "<rect onclick='x'/>", "<text>http://x</text>", "<foreignObject/>"):
        with pytest.raises(AssertionError):
            check_harmless(svg.replace("</svg>", f"{bad}</svg>"))


def test_hostile_names_are_inert_and_short() -> None:
    for kind, svg in every_picture(8, HOSTILE):
        check_harmless(svg)
        assert max(map(len, words_of(svg))) < 200, kind
    trace = make_trace(3, head=True, prefix=HOSTILE)
    blocks = tuple(
        b.model_copy(update={"linears": tuple(x.model_copy(update={"name": x.name + HOSTILE}) for x in b.linears)})
        for b in trace.blocks
    )
    trace = trace.model_copy(update={"blocks": blocks})
    scores = make_scores(trace, scorer=HOSTILE)
    check_harmless(sensitivity_curves(trace, scores))
    check_harmless(bits_heat_map(trace, planned(3)[1]))
    check_harmless(void_map((Series(name="usage " + HOSTILE, values=(0.5, 0.7)),)))
    whole = page(HOSTILE, [Figure("x", next(every_picture(1))[1], [HOSTILE, "b"], [[HOSTILE, HOSTILE]])])
    assert "<img" not in whole
    assert "<script" not in whole
    assert "\x1b" not in whole


@pytest.mark.parametrize("blocks", SIZES)
def test_heat_map_holds_every_linear(blocks: int) -> None:
    trace, allocation = planned(blocks)
    root = tree.fromstring(bits_heat_map(trace, allocation))
    tips = {(tip.text or "") for rect in root.iter(f"{SVG}rect") for tip in rect.iter(f"{SVG}title")}
    for assigned in allocation.assigned:
        assert any(t.startswith(assigned.linear + " (") and f": {assigned.spec.bits} bits" in t for t in tips)
    assert len(tips) == len(trace.every)
    inside = Counter(e.text for e in root.iter(f"{SVG}text") if e.get("fill"))
    wanted = Counter(str(a.spec.bits) for a in allocation.assigned) + Counter(["kept"])
    assert inside == wanted


def test_heat_map_leaves_out_what_a_block_lacks() -> None:
    trace, allocation = planned(2, head=False)
    fewer = trace.blocks[1].model_copy(update={"linears": trace.blocks[1].linears[:4]})
    trace = trace.model_copy(update={"blocks": (trace.blocks[0], fewer)})
    root = tree.fromstring(bits_heat_map(trace, allocation))
    assert len([e for e in root.iter(f"{SVG}text") if e.get("fill")]) == 11


@pytest.mark.parametrize("blocks", SIZES)
def test_void_map_holds_every_figure(blocks: int) -> None:
    series = usage_series(blocks)
    root = tree.fromstring(void_map(series))
    inside = Counter(e.text for e in root.iter(f"{SVG}text") if e.get("fill"))
    assert inside == Counter(f"{100 * value:.0f}" for one in series for value in one.values)


def test_voids_in_words() -> None:
    usage = usage_of((Series(name="usage prompt", values=(0.9, 0.2, 0.4)), Series(name="usage x", values=(0.9,) * 3)))
    first, second = void_words(usage)
    assert first == "prompt: blocks 1 (20%) and 2 (40%) are void for most tokens"
    assert "no block is void" in second
    assert usage_of((Series(name="lim", values=(1.0,)),)) == {}


@pytest.mark.parametrize("blocks", SIZES)
def test_trajectory_marks_and_numbers_every_breakpoint(blocks: int) -> None:
    turns = tuple(range(1, blocks, 2))
    svg = trajectory(path_series(blocks, turns))
    root = tree.fromstring(svg)
    tips = [e.text or "" for e in root.iter(f"{SVG}title")]
    assert {f"point {k}" for k in range(blocks + 1)} <= {tip.split(":")[0] for tip in tips}
    words = words_of(svg)
    assert all(str(k) in words for k in turns)
    assert {"0 start", f"{blocks} end"} <= set(words)
    path = path_of(path_series(blocks, turns))
    assert path is not None
    assert breakpoints(path) == list(turns)


def test_breakpoints_in_words_and_incomplete_paths() -> None:
    path = path_of(path_series(8, (2, 5)))
    assert path is not None
    assert breakpoint_words(path) == "breakpoints: 2 and 5, on a path from 0 (embedding) to 8"
    assert path_of(path_series(8, (2,))[1:]) is None
    assert path_of(()) is None


def test_a_path_far_longer_than_wide_says_that_its_axes_differ() -> None:
    series = [Series(name="selected", values=(0.0,) * 5)]
    series += [
        Series(name=f"trajectory {a}", values=tuple(f * k for k in range(5))) for a, f in (("x", 100.0), ("y", 1.0))
    ]
    assert "different scales" in trajectory(series)
    assert "in one scale" in trajectory(path_series(8, (2,)))


def test_sensitivity_is_median_and_range_by_kind() -> None:
    trace = make_trace(5)
    scores = make_scores(trace)
    curves = damage_by_kind(trace, scores)
    assert list(curves) == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    every = sorted(
        c.damage for x in scores.layers if x.linear.endswith("o_proj") for c in x.candidates if c.spec.bits == 3
    )
    spread = curves["o_proj"][3]
    assert (spread.low, spread.middle, spread.high, spread.linears) == (every[0], every[2], every[-1], 5)
    tips = [e.text or "" for e in tree.fromstring(sensitivity_curves(trace, scores)).iter(f"{SVG}title")]
    assert sum("median" in tip for tip in tips) == 7 * 6


def test_sensitivity_of_no_damage_at_all() -> None:
    trace = make_trace(2)
    scores = make_scores(trace)
    zero = tuple(
        x.model_copy(update={"candidates": tuple(c.model_copy(update={"damage": 0.0}) for c in x.candidates)})
        for x in scores.layers
    )
    check_harmless(sensitivity_curves(trace, scores.model_copy(update={"layers": zero})))
    check_harmless(sensitivity_curves(trace, scores.model_copy(update={"layers": ()})))


@pytest.mark.parametrize(("unit", "panels"), [("nats/token", 1), ("proxy loss", 2)])
def test_frontier_shows_every_point_and_baseline(unit: str, panels: int) -> None:
    base = [Baseline(f"uniform {k} bits", Point(2.2 + k, 0.3 * 4.0**-k)) for k in range(3)]
    svg = frontier(points(), unit=unit, baselines=base, chosen=Point(3.5, 0.1))
    tips = [e.text or "" for e in tree.fromstring(svg).iter(f"{SVG}title")]
    assert sum("expected" in tip for tip in tips) == 12 + 1
    assert sum("measured" in tip for tip in tips) == 6
    assert {f"uniform {k} bits" for k in range(3)} <= set(words_of(svg))
    assert svg.count("bits per weight, scales counted") == panels


def boxes_of(svg: str) -> list[tuple[float, float, float, float]]:
    """About where each upright word lies, from its anchor and 5.5 pixels a letter."""
    found = []
    for element in tree.fromstring(svg).iter(f"{SVG}text"):
        if element.get("transform") is None:
            x, y, wide = float(element.get("x", 0)), float(element.get("y", 0)), 5.5 * len(element.text or "")
            left = x - {"start": 0.0, "middle": wide / 2, "end": wide}[element.get("text-anchor", "start")]
            found.append((left, y - 8, left + wide, y + 1))
    return found


@pytest.mark.parametrize("blocks", [8, 32, 80])
def test_words_stay_on_the_page_and_off_each_other(blocks: int) -> None:
    for kind, svg in every_picture(blocks):
        width, height = (float(tree.fromstring(svg).get(side, 0)) for side in ("width", "height"))
        boxes = boxes_of(svg)
        assert all(a >= 0 and b >= 0 and c <= width and d <= height for a, b, c, d in boxes), kind
        for one, other in itertools.combinations(boxes, 2):
            apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
            assert apart, (kind, one, other)


def test_both_schemes_give_every_class_a_colour() -> None:
    light, _, dark = STYLE.partition("@media")
    coloured = {rule.split("{")[0] for rule in light.splitlines() if re.search(r"(fill|stroke):#", rule)}
    assert len(coloured) > 10
    assert coloured == {rule.split("{")[0] for rule in dark.splitlines() if rule.startswith(".llmc")}
    for name, least in (("ink", 4.5), ("soft", 4.5), ("line", 3.0), ("line2", 3.0)):
        for scheme in (light, dark):
            paper, drawn = (
                re.search(rf"\.{c}\{{[^}}]*?(?:fill|stroke):(#\w{{6}})", scheme) for c in ("paper", name)
            )  # fmt: skip
            assert paper is not None
            assert drawn is not None
            assert contrast(paper[1], drawn[1]) >= least


def test_letters_can_be_read_on_every_cell_and_widths_differ_in_grey() -> None:
    shades: Callable[[float], str] = shade
    assert all(contrast(letters_on(shades(k / 50)), shades(k / 50)) >= 4.5 for k in range(51))
    against_black = [contrast(width_colour(bits), "#000000") for bits in range(2, 9)]
    assert against_black == sorted(against_black)
    assert all(later / sooner > 1.15 for sooner, later in itertools.pairwise(against_black))


def test_a_page_holds_pictures_and_their_data() -> None:
    svg = next(every_picture(2))[1]
    whole = page("Title", [Figure("one", svg, ["linear", "bits"], [["a<b", "3"], ["c", "4"]])])
    assert "default-src 'none'" in whole
    assert '<th scope="row">a&lt;b</th><td>3</td>' in whole
    assert whole.count("<svg") == 1
    assert "<details>" in whole


@given(st.lists(st.integers(0, 50), min_size=1, max_size=300), st.integers(1, 90))
def test_bins_put_together_lose_no_token(counts: list[int], most: int) -> None:
    edges = [1.01**k for k in range(len(counts) + 1)]
    ends, found = merged(edges, counts, most)
    assert sum(found) == sum(counts)
    assert len(found) <= max(most, 1) or not any(counts)
    assert len(ends) == len(found) + 1
    assert ends == sorted(ends)
    for low, high, count in zip(ends, ends[1:], found, strict=False):
        inside = (c for edge, c in zip(edges, counts, strict=False) if low <= edge < high)
        assert count == sum(inside)


def test_a_cell_of_hidden_characters_is_spelt() -> None:
    assert visible("a\u202eb\n\tc\x1b\u200b\U000e0041") == "a[U+202E]b↵⇥c[U+001B][U+200B][U+E0041]"
    assert el("p", "<b>", Html("<b>x</b>"), title='"') == '<p title="&quot;">&lt;b&gt;<b>x</b></p>'
    assert el("p", f"{Html('<b>')}") == "<p>&lt;b&gt;</p>"


def test_blocks_are_told_from_names_alone() -> None:
    trace, _ = planned(8)
    named = named_trace(x.name for x in trace.every)
    assert [[x.name for x in b.linears] for b in named.blocks] == [[x.name for x in b.linears] for b in trace.blocks]
    assert named.head is not None
    assert trace.head is not None
    assert named.head.name == trace.head.name
    assert columns_of(named).kind_of == columns_of(trace).kind_of
