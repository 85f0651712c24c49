"""One plot for whatever runs along an axis: positions of a text, blocks of a model, temperatures of sampling."""

from collections.abc import Sequence
from dataclasses import dataclass

from llmcompress.pictures.axes import Box, Frame, Scale, line_room, linear_scale, log_scale, place_labels, ticks
from llmcompress.pictures.svg import circle, document, square, stroke, text, text_width
from llmcompress.pictures.words import number, shorten

LEFT, TOP, WIDE = 84.0, 68.0, 620.0


@dataclass(frozen=True)
class Point:
    """A value at a place of the axis, and the ends of its interval where it has one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Curve:
    """Points in order and what they are; at most two curves share a plot."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Axes:
    """What the plot is about: its title, a line below it, the names of both axes, and whether they are logarithmic."""

    title: str
    facts: str
    across: str
    up: str
    log_x: bool = False
    log_y: bool = False
    tall: float = 240.0


def curves(drawn: Sequence[Curve], axes: Axes, *, rules: Sequence[tuple[float, str]] = ()) -> str:
    """SVG of one or two curves, named at the plot; `rules` are places of the axis marked by a line and a word.

    A linear vertical axis begins at zero, so that heights can be compared.
    """
    frame = _frame(drawn, axes)
    title, facts = shorten(axes.title, 90), shorten(axes.facts, 160)
    parts = [text(LEFT, 24, title, kind="head ink"), text(LEFT, 44, facts, kind="soft")]
    parts += frame.axes(_across(frame.x), across_name=axes.across, up_name=axes.up)
    parts += _rules(frame, rules)
    taken: list[Box] = []
    names = []
    for place, curve in enumerate(drawn[:2]):
        lines, boxes, named = _curve(curve, frame, second=place == 1)
        parts += lines
        taken += boxes
        names.append(named)
    if len(drawn) > 1:
        inside = (LEFT + 2, TOP + 2, LEFT + WIDE + 30, TOP + axes.tall - 2)
        parts += place_labels(names, inside=inside, taken=taken)
    words = "; ".join(_in_words(curve) for curve in drawn[:2])
    width = max(LEFT + WIDE + 40, LEFT + text_width(facts) + 10)
    return document(width, TOP + axes.tall + 48, title=title, description=f"{facts}. {words}.", parts=parts)


def _frame(drawn: Sequence[Curve], axes: Axes) -> Frame:
    points = [point for curve in drawn for point in curve.points]
    ends = [v for p in points for v in (p.y, p.low, p.high) if v is not None]
    bottom = TOP + axes.tall
    y = log_scale(ends, bottom, TOP) if axes.log_y else Scale(0.0, max([*ends, 1e-12]) * 1.08, bottom, TOP)
    xs = [point.x for point in points]
    x = (log_scale if axes.log_x else linear_scale)(xs, LEFT, LEFT + WIDE)
    if axes.log_x and len(xs) > 1 and min(xs) > 0:
        x = Scale(min(xs) / 1.15, max(max(xs), min(xs) * 1.01) * 1.15, LEFT, LEFT + WIDE, log=True)
    return Frame(x, y)


def _across(scale: Scale) -> list[float]:
    found = ticks(scale, 9)
    whole = [value for value in found if value == round(value)]
    return whole if len(whole) > 3 else found


def _rules(frame: Frame, rules: Sequence[tuple[float, str]]) -> list[str]:
    parts, shown = [], -99.0
    for at, words in rules:
        x = frame.x.at(at)
        parts.append(stroke([(x, frame.y.start), (x, frame.y.stop)], kind="lead"))
        if x - shown > text_width(words) + 6:
            parts.append(text(x, frame.y.stop - 5, words, kind="soft small", anchor="middle", most=12))
            shown = x
    return parts


def _curve(curve: Curve, frame: Frame, *, second: bool) -> tuple[list[str], list[Box], tuple[float, float, str]]:
    places = [(frame.x.at(p.x), frame.y.at(p.y)) for p in curve.points]
    parts, banded = [], [p for p in curve.points if p.low is not None and p.high is not None]
    if len(banded) > 1:
        above = [(frame.x.at(p.x), frame.y.at(p.high or 0.0)) for p in banded]
        below = [(frame.x.at(p.x), frame.y.at(p.low or 0.0)) for p in banded]
        parts.append(stroke([*above, *reversed(below)], kind="band", closed=True))
    parts.append(stroke(places, kind="line2" if second else "line"))
    mark = square if second else circle
    size = 3.5 if len(places) <= 40 else 2.5
    for place, point in zip(places, curve.points, strict=True):
        tip = f"{shorten(curve.name, 40)}, {number(point.x)}: {number(point.y)}{_between(point)}"
        parts.append(mark(*place, size, kind="dot2" if second else "dot", tip=tip))
    return parts, line_room(places), (*places[-1 if second else len(places) // 2], shorten(curve.name, 30))


def _between(point: Point) -> str:
    if point.low is None or point.high is None:
        return ""
    return f" [{number(point.low)}, {number(point.high)}]"


def _in_words(curve: Curve) -> str:
    first, last = curve.points[0], curve.points[-1]
    most = max(curve.points, key=lambda point: point.y)
    return (
        f"{shorten(curve.name, 60)}: {number(first.y)} at {number(first.x)}, {number(last.y)} at {number(last.x)}, "
        f"greatest {number(most.y)} at {number(most.x)}"
    )
