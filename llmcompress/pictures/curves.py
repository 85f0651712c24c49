"""One plot for whatever runs along an axis: positions of a text, blocks of a model, temperatures of sampling."""

from collections.abc import Sequence
from dataclasses import dataclass

from llmcompress.pictures.axes import Frame, Scale, linear_scale, ticks
from llmcompress.pictures.svg import circle, document, stroke, text, text_width
from llmcompress.pictures.words import number, shorten

LEFT, TOP, WIDE, TALL = 84.0, 74.0, 620.0, 240.0
MANY = 40  # points; more get smaller dots


@dataclass(frozen=True)
class Point:
    """A value at a place of the axis, and the ends of its interval where it has one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Axes:
    """What a plot is about: its title, a line below it, and the names of both axes."""

    title: str
    facts: str
    across: str
    up: str


def curve(points: Sequence[Point], axes: Axes, *, rules: Sequence[tuple[float, str]] = ()) -> str:
    """SVG of a curve from left to right over an axis that begins at zero, with the band of its intervals.

    `rules` are places of the axis marked by an upright line and a word.
    """
    most = max([v for p in points for v in (p.y, p.high) if v is not None] + [1e-12])
    x = linear_scale((point.x for point in points), LEFT, LEFT + WIDE)
    frame = Frame(x, Scale(0.0, most * 1.08, TOP + TALL, TOP))
    title, facts = shorten(axes.title, 90), shorten(axes.facts, 160)
    parts = [text(LEFT, 24, title, kind="head ink"), text(LEFT, 44, facts, kind="soft")]
    parts += frame.axes(_across(x), across_name=axes.across, up_name=axes.up)
    parts += [*_rules(frame, rules), *_band(frame, points)]
    places = [(x.at(p.x), frame.y.at(p.y)) for p in points]
    parts.append(stroke(places, kind="line"))
    for (at, height), point in zip(places, points, strict=True):
        tip = f"{number(point.x)}: {number(point.y)}{_between(point)}"
        parts.append(circle(at, height, 3.5 if len(points) <= MANY else 2.5, kind="dot", tip=tip))
    width = max(LEFT + WIDE + 40, LEFT + text_width(facts) + 10)
    words = f"{facts}. {axes.up} by {axes.across}: {_in_words(points)}."
    return document(width, TOP + TALL + 48, title=title, description=words, parts=parts)


def _across(scale: Scale) -> list[float]:
    """Ticks of the horizontal axis, whole numbers where there are enough of them."""
    found = ticks(scale, 9)
    whole = [value for value in found if value == round(value)]
    return whole if len(whole) > 3 else found


def _rules(frame: Frame, rules: Sequence[tuple[float, str]]) -> list[str]:
    parts, end = [], -99.0
    for at, words in sorted(rules):
        x, half = frame.x.at(at), text_width(words) / 2
        parts.append(stroke([(x, frame.y.start), (x, frame.y.stop)], kind="lead"))
        if x - half > end:
            parts.append(text(x, frame.y.stop - 5, words, kind="soft small", anchor="middle", most=12))
            end = x + half + 4
    return parts


def _band(frame: Frame, points: Sequence[Point]) -> list[str]:
    ends = [(frame.x.at(p.x), p.low, p.high) for p in points if p.low is not None and p.high is not None]
    if len(ends) < 2:
        return []
    above = [(x, frame.y.at(high)) for x, _, high in ends]
    below = [(x, frame.y.at(low)) for x, low, _ in reversed(ends)]
    return [stroke([*above, *below], kind="band", closed=True)]


def _between(point: Point) -> str:
    if point.low is None or point.high is None:
        return ""
    return f" [{number(point.low)}, {number(point.high)}]"


def _in_words(points: Sequence[Point]) -> str:
    first, last = points[0], points[-1]
    most = max(points, key=lambda point: point.y)
    return (
        f"{number(first.y)} at {number(first.x)}, {number(last.y)} at {number(last.x)}, "
        f"greatest {number(most.y)} at {number(most.x)}"
    )
