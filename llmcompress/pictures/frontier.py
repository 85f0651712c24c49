"""The frontier: bits per weight against the damage expected and, where there was a model, the damage measured."""

from collections.abc import Sequence
from dataclasses import dataclass

from llmcompress.pictures.axes import Box, Frame, line_room, linear_scale, log_scale, place_labels, ticks
from llmcompress.pictures.svg import circle, diamond, document, square, stroke, text, text_width
from llmcompress.pictures.words import number, shorten

NATS = "nats/token"
LEFT, TOP, WIDE, TALL = 88.0, 92.0, 600.0, 300.0


@dataclass(frozen=True)
class Point:
    """One allocation: size in bits per weight over the linears, expected damage, and measured KL in nats/token."""

    bits_per_weight: float
    expected: float
    measured: float | None = None


@dataclass(frozen=True)
class Baseline:
    """Something the frontier is compared with, and what it is called."""

    name: str
    point: Point


def frontier(
    points: Sequence[Point],
    *,
    unit: str,
    baselines: Sequence[Baseline] = (),
    chosen: Point | None = None,
    name: str = "",
) -> str:
    """SVG of damage (log axis) against bits per weight; `unit` is that of the expected damage.

    Measured damage is in nats per token: it shares the plot where the expected one is too, and has its own otherwise.
    `baselines` are labelled points, `chosen` is marked. `name` of the model for the title.
    """
    every = [*points, *(b.point for b in baselines), *([chosen] if chosen else [])]
    measured = any(point.measured is not None for point in every)
    panels: list[tuple[str, ...]] = [("expected", "measured")] if measured and unit == NATS else [("expected",)]
    if measured and unit != NATS:
        panels.append(("measured",))
    title = f"Bits against damage, {shorten(name, 44)}" if name else "Bits against damage"
    facts = f"circles: expected damage, {unit}" + ("; squares: measured KL, nats/token" if measured else "")
    parts = [text(LEFT, 24, title, kind="head ink"), text(LEFT, 44, facts, kind="soft")]
    marks = [*(["diamond: this plan"] if chosen else []), *(["crosses: baselines"] if baselines else [])]
    parts += [text(LEFT, 60, "; ".join(marks), kind="soft")] if marks else []
    for place, kinds in enumerate(panels):
        top = TOP + place * (TALL + 76)
        up = f"damage, {unit if 'expected' in kinds else NATS}"
        parts += _panel(points, baselines, chosen, kinds=kinds, top=top, up=up)
    ordered = sorted(points, key=lambda point: point.bits_per_weight)
    shown = "; ".join(f"{p.bits_per_weight:.2f} bits: {number(p.expected)}" for p in ordered)
    return document(
        max(LEFT + WIDE, LEFT + text_width(facts)) + 40,
        TOP + len(panels) * (TALL + 76) - 24,
        title=title,
        description=f"{facts}. Expected damage by bits per weight: {shown}.",
        parts=parts,
    )


def _value(point: Point, kind: str) -> float | None:
    return point.measured if kind == "measured" else point.expected


def _panel(
    points: Sequence[Point],
    baselines: Sequence[Baseline],
    chosen: Point | None,
    *,
    kinds: tuple[str, ...],
    top: float,
    up: str,
) -> list[str]:
    every = [*points, *(b.point for b in baselines), *([chosen] if chosen else [])]
    values = [v for point in every for kind in kinds if (v := _value(point, kind)) is not None]
    x = linear_scale((point.bits_per_weight for point in every), LEFT, LEFT + WIDE)
    frame = Frame(x, log_scale(values, top + TALL, top))
    parts = frame.axes(ticks(x), across_name="bits per weight, scales counted", up_name=up)
    taken: list[Box] = []
    for kind in kinds:
        drawn, boxes = _line(points, frame, kind)
        parts += drawn
        taken += boxes
    labels = []
    for item in baselines:
        for kind in kinds:
            if (value := _value(item.point, kind)) is not None:
                at = frame.x.at(item.point.bits_per_weight), frame.y.at(value)
                parts += _cross(*at)
                taken.append((at[0] - 6, at[1] - 6, at[0] + 6, at[1] + 6))
                labels.append((*at, shorten(item.name, 28) + (", measured" if kind == "measured" else "")))
    for kind in kinds:
        if chosen is not None and (value := _value(chosen, kind)) is not None:
            at = frame.x.at(chosen.bits_per_weight), frame.y.at(value)
            taken.append((at[0] - 7, at[1] - 7, at[0] + 7, at[1] + 7))
            parts.append(diamond(*at, 7, kind="mark", tip=_tip(chosen, kind)))
    return [*parts, *place_labels(labels, inside=(LEFT + 2, top, LEFT + WIDE + 34, top + TALL - 2), taken=taken)]


def _line(points: Sequence[Point], frame: Frame, kind: str) -> tuple[list[str], list[Box]]:
    """One damage over all points, marks and the line between them, and the room they take."""
    known = sorted((p.bits_per_weight, value, p) for p in points if (value := _value(p, kind)) is not None)
    places = [(frame.x.at(bits), frame.y.at(value)) for bits, value, _ in known]
    second = kind == "measured"
    parts = [stroke(places, kind="line2" if second else "line")]
    mark = square if second else circle
    for place, (_, _, point) in zip(places, known, strict=True):
        parts.append(mark(*place, 4, kind="dot2" if second else "dot", tip=_tip(point, kind)))
    return parts, line_room(places)


def _cross(x: float, y: float) -> list[str]:
    return [
        stroke([(x - 5, y - 5), (x + 5, y + 5)], kind="axis"),
        stroke([(x - 5, y + 5), (x + 5, y - 5)], kind="axis"),
    ]


def _tip(point: Point, kind: str) -> str:
    value = _value(point, kind)
    return f"{point.bits_per_weight:.4f} bits per weight: {kind} {number(value if value is not None else 0.0)}"
