"""Values with their intervals, one below the other on a common axis: the gate, trials, differences."""

from collections.abc import Sequence
from dataclasses import dataclass

from llmcompress.pictures.axes import Scale, label, ticks
from llmcompress.pictures.svg import circle, document, stroke, text, text_width
from llmcompress.pictures.words import number, shorten

ROW, TOP, WIDE = 30.0, 78.0, 360.0
FARTHEST = 12.0  # an interval that reaches this many times beyond all values is cut off


@dataclass(frozen=True)
class Interval:
    """A named value with the ends of its interval, and what is said beside it."""

    name: str
    value: float
    low: float
    high: float
    beside: str


def forest(
    rows: Sequence[Interval],
    *,
    title: str,
    facts: str,
    across: str,
    rule: tuple[float, str] | None = None,
    zero: bool = False,
) -> str:
    """SVG of the intervals; `across` names the axis, `rule` is a value marked by an upright line and its name.

    With `zero` the axis begins there, or to its left.
    """
    left = max(max((text_width(shorten(row.name, 30)) for row in rows), default=0.0) + 24, 84.0)
    x = _scale(rows, [*([rule[0]] if rule else []), *([0.0] if zero else [])], left)
    bottom = TOP + ROW * len(rows)
    title, facts = shorten(title, 80), shorten(facts, 140)
    parts = [text(left, 24, title, kind="head ink"), text(left, 44, facts, kind="soft")]
    for value in ticks(x, 6):
        at = x.at(value)
        parts.append(stroke([(at, TOP), (at, bottom)], kind="rule"))
        parts.append(text(at, bottom + 17, label(round(value, 12)), kind="soft", anchor="middle"))
    if rule is not None:
        parts.append(stroke([(x.at(rule[0]), TOP - 6), (x.at(rule[0]), bottom + 4)], kind="edge"))
        parts.append(text(x.at(rule[0]), TOP - 10, rule[1], kind="ink small", anchor="middle", most=24))
    parts.append(text(left + WIDE / 2, bottom + 35, across, kind="soft", anchor="middle"))
    for place, row in enumerate(rows):
        parts += _row(row, x, TOP + ROW * (place + 0.5))
    told = "; ".join(f"{_told(row)}, {shorten(row.beside, 60)}" for row in rows)
    width = left + WIDE + max((text_width(shorten(row.beside, 70)) for row in rows), default=0.0) + 30
    width = max(width, left + max(text_width(facts), text_width(title) * 1.25) + 10)
    return document(width, bottom + 48, title=title, description=f"{facts}. {told}.", parts=parts)


def _scale(rows: Sequence[Interval], others: Sequence[float], left: float) -> Scale:
    kept = [*(row.value for row in rows), *others]
    least, most = min(kept, default=0.0), max(kept, default=1.0)
    reach = max(most - least, abs(most) * 0.01, 1e-12) * FARTHEST
    low = max(min([least, *(row.low for row in rows)]), least - reach)
    high = min(max([most, *(row.high for row in rows)]), most + reach)
    room = (high - low) * 0.06 or 1.0
    return Scale(low - room, high + room, left, left + WIDE)


def _told(row: Interval) -> str:
    return f"{shorten(row.name, 40)}: {number(row.value)} [{number(row.low)}, {number(row.high)}]"


def _row(row: Interval, x: Scale, y: float) -> list[str]:
    ends = [x.at(row.low), x.at(row.high)]
    return [
        text(x.start - 12, y + 4, row.name, anchor="end", most=30),
        stroke([(ends[0], y), (ends[1], y)], kind="line"),
        *(stroke([(end, y - 5), (end, y + 5)], kind="line") for end in ends),
        circle(x.at(row.value), y, 4.5, kind="dot", tip=_told(row)),
        text(x.stop + 14, y + 4, row.beside, kind="soft", most=70),
    ]
