"""How often which value occurs, both axes logarithmic, with a rule at each quantile."""

import math
from collections.abc import Sequence
from itertools import pairwise

from llmcompress.pictures.axes import Frame, Scale, ticks
from llmcompress.pictures.svg import document, rectangle, stroke, text, text_width
from llmcompress.pictures.words import number, shorten

LEFT, TOP, WIDE, TALL = 84.0, 134.0, 620.0, 230.0
LINES = 5  # of names above the plot
MOST_BARS = 80


def merged(edges: Sequence[float], counts: Sequence[int], most: int = MOST_BARS) -> tuple[list[float], list[int]]:
    """Neighbouring bins put together until there are at most `most`, empty ones at both ends left out."""
    filled = [place for place, count in enumerate(counts) if count]
    if not filled:
        return list(edges), list(counts)
    first, last = filled[0], filled[-1] + 1
    inner, ends = list(counts[first:last]), list(edges[first : last + 1])
    step = -(-len(inner) // most)
    bins = [sum(inner[place : place + step]) for place in range(0, len(inner), step)]
    return [*ends[:-1:step], ends[-1]], bins


def histogram(
    edges: Sequence[float],
    counts: Sequence[int],
    *,
    title: str,
    facts: str,
    unit: str,
    marks: Sequence[tuple[str, float]] = (),
) -> str:
    """SVG of `counts` between increasing positive `edges`, one more than counts; `marks` are values with a name."""
    edges, counts = merged(edges, counts)
    most = max([*counts, 1])
    marks = [mark for mark in marks if mark[1] > 0 and math.isfinite(mark[1])]
    values = [value for _, value in marks]
    low, high = min([edges[0], *values]), max([edges[-1], *values])
    high = max(high, low * 10)
    x = Scale(low, high, LEFT, LEFT + WIDE, log=True)
    y = Scale(0.8, max(most * 1.3, 10.0), TOP + TALL, TOP, log=True)
    frame = Frame(x, y)
    title, facts = shorten(title, 90), shorten(facts, 160)
    parts = [text(LEFT, 24, title, kind="head ink"), text(LEFT, 44, facts, kind="soft")]
    parts += frame.axes(ticks(x), across_name=unit, up_name="tokens")
    for (left, right), count in zip(pairwise(edges), counts, strict=True):
        if count:
            at, top = x.at(left), y.at(count)
            tip = f"{number(left)} to {number(right)}: {count:,}"
            width = max(x.at(right) - at - 1, 0.5)
            parts.append(rectangle(at, top, width, TOP + TALL - top, kind="bar", look=("", tip)))
    parts += _marks(frame, marks)
    told = "; ".join(f"{name} {number(value)}" for name, value in marks)
    width = max(LEFT + WIDE + 110, LEFT + text_width(facts) + 10)
    words = f"{facts}. {sum(counts):,} tokens in {len(counts)} bins. {told}."
    return document(width, TOP + TALL + 48, title=title, description=words, parts=parts)


def _marks(frame: Frame, marks: Sequence[tuple[str, float]]) -> list[str]:
    """A rule and a name for each value; from right to left, each name above the rules that it reaches across."""
    parts: list[str] = []
    tops: list[tuple[float, int]] = []
    for name, value in sorted(marks, key=lambda mark: -mark[1]):
        at = frame.x.at(value)
        words = f"{name} {number(value)}"
        line = max((line + 1 for x, line in tops if x < at + 8 + text_width(words)), default=0)
        if line < LINES:
            tops.append((at, line))
            top = TOP - 14 - 15 * line
            parts.append(stroke([(at, frame.y.start), (at, top)], kind="axis"))
            parts.append(text(at + 4, top + 8, words, kind="ink small"))
    return parts
