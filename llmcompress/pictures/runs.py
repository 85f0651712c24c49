"""Several compressed models in one plane: size against KL divergence with its interval, the best of a size joined."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llmcompress.pictures.axes import Box, Frame, line_room, linear_scale, log_scale, place_labels, ticks
from llmcompress.pictures.svg import circle, document, polygon, stroke, text
from llmcompress.pictures.words import number, shorten

LEFT, TOP, WIDE, TALL = 88.0, 84.0, 600.0, 330.0


@dataclass(frozen=True)
class Sized:
    """One model: bits per weight and KL in nats per token, with the ends of its interval where there is one."""

    name: str
    bits_per_weight: float
    kld: float
    low: float | None = None
    high: float | None = None


def dominated(rows: Sequence[Sized]) -> list[bool]:
    """For each, whether another is no larger and no worse, and better in one of the two."""
    return [
        any(
            o.bits_per_weight <= r.bits_per_weight
            and o.kld <= r.kld
            and (o.bits_per_weight, o.kld) != (r.bits_per_weight, r.kld)
            for o in rows
        )
        for r in rows
    ]


def size_against_kl(rows: Sequence[Sized], *, title: str, size: str) -> str:
    """SVG of the models, the first a star; `size` names the horizontal axis."""
    behind = dominated(rows)
    x = linear_scale((row.bits_per_weight for row in rows), LEFT, LEFT + WIDE, margin=0.08)
    first, title = shorten(rows[0].name, 34), shorten(title, 80)
    y = log_scale((v for row in rows for v in (row.kld, row.low, row.high) if v), TOP + TALL, TOP)
    frame = Frame(x, y)
    facts = f"bars: 95 % intervals; line: best of its size; grey: another is no larger and no worse; star: {first}"
    parts = [text(LEFT, 24, title, kind="head ink"), text(LEFT, 44, facts, kind="soft")]
    parts += frame.axes(ticks(x), across_name=size, up_name="KL, nats/token")
    places = [(x.at(row.bits_per_weight), y.at(row.kld)) for row in rows]
    best = sorted(place for place, hidden in zip(places, behind, strict=True) if not hidden)
    stairs = _stairs(best)
    parts.append(stroke(stairs, kind="line"))
    taken: list[Box] = line_room(stairs, 3.0)
    for place, (row, at) in enumerate(zip(rows, places, strict=True)):
        parts += _one(row, at, frame, star=place == 0, behind=behind[place])
        taken.append((at[0] - 8, at[1] - 8, at[0] + 8, at[1] + 8))
    labels = [(*at, shorten(row.name, 34)) for row, at in zip(rows, places, strict=True)]
    inside = (LEFT + 2, TOP - 14, LEFT + WIDE + 50, TOP + TALL - 2)
    parts += place_labels(labels, inside=inside, taken=taken)
    told = "; ".join(f"{shorten(r.name, 40)}: {r.bits_per_weight:.3f} bits, KL {number(r.kld)}" for r in rows)
    return document(LEFT + WIDE + 60, TOP + TALL + 48, title=title, description=f"{facts}. {told}.", parts=parts)


def _stairs(best: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Steps through points from left to right: what a size buys until the next better point."""
    found: list[tuple[float, float]] = []
    for x, y in best:
        found += [(x, found[-1][1])] if found else []
        found.append((x, y))
    return found


def _star(x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """Corners of a star, outer and inner in turn."""
    turns = [(radius if corner % 2 == 0 else radius * 0.45, math.pi * (corner / 5 - 0.5)) for corner in range(10)]
    return [(x + reach * math.cos(turn), y + reach * math.sin(turn)) for reach, turn in turns]


def _one(row: Sized, at: tuple[float, float], frame: Frame, *, star: bool, behind: bool) -> list[str]:
    parts, (x, y) = [], at
    if row.low is not None and row.high is not None:
        low, high = frame.y.at(row.low), frame.y.at(row.high)
        parts.append(stroke([(x, low), (x, high)], kind="axis"))
        parts += [stroke([(x - 4, end), (x + 4, end)], kind="axis") for end in (low, high)]
    between = "" if row.low is None or row.high is None else f" [{number(row.low)}, {number(row.high)}]"
    tip = f"{shorten(row.name, 60)}: {row.bits_per_weight:.4f} bits per weight, KL {number(row.kld)}{between}"
    kind = "pale" if behind else "dot2" if star else "dot"
    return [*parts, polygon(_star(x, y, 9), kind=kind, tip=tip) if star else circle(x, y, 5, kind=kind, tip=tip)]
