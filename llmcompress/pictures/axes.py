"""Scales from values to places on the page, their ticks, and labels that keep out of each other's way."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from llmcompress.pictures.svg import LINE, stroke, text, text_width, upright

NARROWEST_LOG = 10.0  # a log axis spans at least this ratio, so that it always has three ticks
RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Scale:
    """Maps `[low, high]` onto `[start, stop]` (pixels), evenly or by the logarithm; values outside are clamped."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def at(self, value: float) -> float:
        """Where a value lies; monotone in it."""
        inside = min(max(value, self.low), self.high)
        if self.log:
            share = math.log(inside / self.low) / math.log(self.high / self.low)
        else:
            share = (inside - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)


def linear_scale(values: Iterable[float], start: float, stop: float, *, margin: float = 0.05) -> Scale:
    """A scale with a little room around the values; a single value sits in the middle."""
    known = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(known), max(known)
    room = (high - low) * margin if high > low else max(abs(high), 1.0) * 0.5
    return Scale(low - room, high + room, start, stop)


def log_scale(values: Iterable[float], start: float, stop: float) -> Scale:
    """A logarithmic scale over the positive values; zero and less are drawn at its low end."""
    known = [value for value in values if math.isfinite(value) and value > 0] or [1.0]
    low, high = max(min(known), 1e-300), min(max(known), 1e300)
    spread = max(math.sqrt(NARROWEST_LOG / (high / low)), 1.25)
    return Scale(low / spread, high * spread, start, stop, log=True)


def ticks(scale: Scale, most: int = 7) -> list[float]:
    """Round values inside a scale, increasing, about `most` of them."""
    return _log_ticks(scale, most) if scale.log else _linear_ticks(scale, most)


def _linear_ticks(scale: Scale, most: int) -> list[float]:
    rough = (scale.high - scale.low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first, last = math.ceil(scale.low / step), math.floor(scale.high / step)
    return [place * step for place in range(first, last + 1)]


def _log_ticks(scale: Scale, most: int) -> list[float]:
    first, last = math.ceil(math.log10(scale.low) - 1e-9), math.floor(math.log10(scale.high) + 1e-9)
    if last - first >= 2:
        step = -(-(last - first + 1) // most)
        return [10.0**power for power in range(first, last + 1, step)]
    every = (factor * 10.0**power for power in range(first - 1, last + 1) for factor in (1, 2, 5))
    return [value for value in every if scale.low <= value <= scale.high]


def label(value: float) -> str:
    """A tick's value, short; what would need an exponent has it raised: `2·10⁻⁷`."""
    words = f"{value:.6g}"
    factor, at, power = words.partition("e")
    raised = str(int(power)).translate(RAISED) if at else ""
    return words if not at else f"10{raised}" if factor == "1" else f"{factor}·10{raised}"


@dataclass(frozen=True)
class Frame:
    """Two scales that make a plot. Pixels grow downwards, so `y.start` is the lower edge."""

    x: Scale
    y: Scale

    def axes(
        self, across: Sequence[float], *, across_name: str = "", up_name: str = "", named: bool = True
    ) -> list[str]:
        """Grid lines with their values; `across` are the ticks of x. `named=False` leaves the values of y out."""
        left, right, bottom, top = self.x.start, self.x.stop, self.y.start, self.y.stop
        parts = []
        for value in ticks(self.y, max(int((bottom - top) / 34), 3)):
            y = self.y.at(value)
            parts.append(stroke([(left, y), (right, y)], kind="rule"))
            if named:
                parts.append(text(left - 6, y + 4, label(value), kind="soft", anchor="end"))
        for value in across:
            x = self.x.at(value)
            parts.append(stroke([(x, bottom), (x, bottom + 4)], kind="axis"))
            parts.append(text(x, bottom + 17, label(value), kind="soft", anchor="middle"))
        parts.append(stroke([(left, top), (left, bottom), (right, bottom)], kind="axis"))
        if across_name:
            parts.append(text((left + right) / 2, bottom + 35, across_name, kind="soft", anchor="middle"))
        if up_name:
            parts.append(upright(left - 62, (bottom + top) / 2, up_name))
        return parts


def line_room(places: Sequence[tuple[float, float]], reach: float = 4.0) -> list[Box]:
    """Small boxes along a line, for labels to keep out of."""
    boxes: list[Box] = []
    for (x, y), (next_x, next_y) in pairwise(places):
        steps = max(int(max(abs(next_x - x), abs(next_y - y)) / (2 * reach)), 1)
        for step in range(steps + 1):
            at_x, at_y = x + (next_x - x) * step / steps, y + (next_y - y) * step / steps
            boxes.append((at_x - reach, at_y - reach, at_x + reach, at_y + reach))
    return boxes


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _spots(x: float, y: float, width: float) -> Iterable[tuple[Box, float]]:
    """Boxes for a label around a point, near ones first, with how far out they are."""
    for ring in range(12):
        reach = 8.0 + 9.0 * ring
        for turn in range(16):
            angle = -math.pi / 4 + turn * math.pi / 8
            middle_x = x + math.cos(angle) * (reach + width / 2)
            middle_y = y + math.sin(angle) * (reach + LINE / 2)
            yield (middle_x - width / 2, middle_y - 7, middle_x + width / 2, middle_y + 7), reach


def place_labels(points: Sequence[tuple[float, float, str]], *, inside: Box, taken: Sequence[Box] = ()) -> list[str]:
    """Words beside points `(x, y, words)`, none over another or over `taken`, with a thin line where it is far."""
    boxes, parts = list(taken), []
    for x, y, words in points:
        free = [
            (box, reach)
            for box, reach in _spots(x, y, text_width(words) + 2)
            if box[0] >= inside[0] and box[1] >= inside[1] and box[2] <= inside[2] and box[3] <= inside[3]
        ]
        clear = (spot for spot in free if not any(_overlap(spot[0], other) for other in boxes))
        spot = next(clear, free[0] if free else None)
        if spot is not None:
            boxes.append(spot[0])
            parts += _label(x, y, words, spot=spot)
    return parts


def _label(x: float, y: float, words: str, *, spot: tuple[Box, float]) -> list[str]:
    (left, top, right, bottom), reach = spot
    parts = [text((left + right) / 2, bottom - 3, words, anchor="middle")]
    if reach > 10:
        side = left if left > x else right if right < x else (left + right) / 2
        edge = top if top > y else bottom if bottom < y else (top + bottom) / 2
        parts.insert(0, stroke([(x, y), (side, edge)], kind="lead"))
    return parts
