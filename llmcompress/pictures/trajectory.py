"""The way of the hidden states through the model, drawn on a plane, with the breakpoints where it turns."""

from collections.abc import Mapping, Sequence

from llmcompress.pictures.axes import Box, Frame, label, line_room, linear_scale, place_labels, ticks
from llmcompress.pictures.svg import circle, diamond, document, rectangle, square, stroke, text
from llmcompress.pictures.words import listed, number, shorten
from llmcompress.types import Series

NEEDED = ("trajectory x", "trajectory y", "selected")
SCORE = "breakpoint score"
LEFT, TOP, WIDE, TALL, STRIP = 84.0, 82.0, 620.0, 380.0, 110.0


def path_of(series: Sequence[Series]) -> dict[str, tuple[float, ...]] | None:
    """The series of a trajectory, `(blocks + 1,)` each, by name; None where a scorer returned no whole one."""
    found = {x.name: x.values for x in series}
    lengths = {len(found.get(name, ())) for name in NEEDED}
    if len(lengths) != 1 or lengths & {0, 1}:
        return None
    length = lengths.pop()
    return {name: values for name, values in found.items() if len(values) == length}


def breakpoints(path: Mapping[str, tuple[float, ...]]) -> list[int]:
    """Points at which the way through the model turns: 0 is the embedding, k + 1 what leaves block k."""
    return [place for place, value in enumerate(path["selected"]) if value > 0]


def breakpoint_words(path: Mapping[str, tuple[float, ...]]) -> str:
    """The breakpoints in one line; the point k is what leaves block k - 1."""
    found = breakpoints(path)
    last = len(path["selected"]) - 1
    return f"breakpoints: {listed([str(place) for place in found])}, on a path from 0 (embedding) to {last}"


def trajectory(series: Sequence[Series], *, name: str = "") -> str:
    """SVG of the hidden-state trajectory: a dot for every point, a numbered diamond for every breakpoint.

    Reads the series `trajectory x`, `trajectory y` and `selected` (1 = breakpoint), and `breakpoint score` for the
    bars below. Both axes have one scale unless one is over four times as long, and then the picture says so.
    """
    path = path_of(series) or dict.fromkeys(NEEDED, (0.0,))
    points = list(zip(path["trajectory x"], path["trajectory y"], strict=True))
    frame, equal = _frame(points)
    places = [(frame.x.at(x), frame.y.at(y)) for x, y in points]
    turns = breakpoints(path)
    title = f"Hidden-state trajectory, {shorten(name, 44)}" if name else "Hidden-state trajectory"
    facts = "dots: hidden states between blocks; diamonds: breakpoints, k is what leaves block k - 1"
    scales = "both axes in one scale" if equal else "the axes have different scales"
    up_name = "second direction"
    parts = [
        text(LEFT, 24, title, kind="head ink"),
        text(LEFT, 44, facts, kind="soft"),
        text(LEFT, 60, scales, kind="soft"),
        *frame.axes(ticks(frame.x), across_name="first direction of the plane", up_name=up_name),
        stroke(places, kind="line"),
        *(circle(*place, 3, kind="dot", tip=_tip(k, path)) for k, place in enumerate(places) if k not in turns),
        *_ends(places),
        *(diamond(*places[k], 6, kind="mark", tip=_tip(k, path)) for k in turns),
        *_labels(places, turns),
    ]
    height = TOP + TALL + 62
    if SCORE in path:
        parts += _strip(path[SCORE], turns, top=height + 8)
        height += STRIP + 66
    return document(
        LEFT + WIDE + 40,
        height,
        title=title,
        description=f"{len(points)} points. {breakpoint_words(path)}. {scales}.",
        parts=parts,
    )


def _frame(points: Sequence[tuple[float, float]]) -> tuple[Frame, bool]:
    x = linear_scale((x for x, _ in points), LEFT, LEFT + WIDE)
    y = linear_scale((y for _, y in points), TOP + TALL, TOP)
    wide, tall = x.high - x.low, y.high - y.low
    per_pixel = max(wide / WIDE, tall / TALL)
    if per_pixel > 4 * min(wide / WIDE, tall / TALL):
        return Frame(x, y), False
    more_x, more_y = (per_pixel * WIDE - wide) / 2, (per_pixel * TALL - tall) / 2
    return Frame(
        type(x)(x.low - more_x, x.high + more_x, x.start, x.stop),
        type(y)(y.low - more_y, y.high + more_y, y.start, y.stop),
    ), True


def _tip(place: int, path: Mapping[str, tuple[float, ...]]) -> str:
    where = "embedding" if place == 0 else f"leaves block {place - 1}"
    score = f", breakpoint score {number(path[SCORE][place])}" if SCORE in path else ""
    return f"point {place}: {where}{score}"


def _ends(places: Sequence[tuple[float, float]]) -> list[str]:
    return [square(*places[0], 5, kind="dot2", tip="start"), square(*places[-1], 5, kind="dot2", tip="end")]


def _labels(places: Sequence[tuple[float, float]], turns: Sequence[int]) -> list[str]:
    last = len(places) - 1
    words = {0: "0 start", last: f"{last} end"}
    marked = sorted({0, last, *turns})
    taken: list[Box] = line_room(places, 2.5)
    taken += [(places[k][0] - 7, places[k][1] - 7, places[k][0] + 7, places[k][1] + 7) for k in marked]
    inside = (LEFT + 2, TOP - 14, LEFT + WIDE + 34, TOP + TALL - 2)
    return place_labels([(*places[k], words.get(k, str(k))) for k in marked], inside=inside, taken=taken)


def _strip(scores: Sequence[float], turns: Sequence[int], *, top: float) -> list[str]:
    """Bars of the breakpoint score, one for each point, those of the breakpoints in full colour with their number."""
    step = WIDE / len(scores)
    y = linear_scale([0.0, *scores], top + STRIP, top, margin=0.0)
    parts = [text(LEFT, top - 6, "breakpoint score of each point", kind="soft")]
    for value in ticks(y, 3):
        parts.append(stroke([(LEFT, y.at(value)), (LEFT + WIDE, y.at(value))], kind="rule"))
        parts.append(text(LEFT - 6, y.at(value) + 4, label(value), kind="soft", anchor="end"))
    shown = -99.0
    for place, value in enumerate(scores):
        x, low, high = LEFT + step * place, max(y.at(value), y.at(0.0)), min(y.at(value), y.at(0.0))
        kind = "mark" if place in turns else "pale"
        tip = f"point {place}: {number(value)}"
        parts.append(rectangle(x + step * 0.1, high, step * 0.8, max(low - high, 0.5), kind=kind, look=("", tip)))
        every = max(len(scores) // 24, 1)
        if place % every == 0 and x - shown > 18:
            parts.append(text(x + step / 2, top + STRIP + 15, str(place), kind="soft", anchor="middle"))
            shown = x
    parts.append(stroke([(LEFT, y.at(0.0)), (LEFT + WIDE, y.at(0.0))], kind="axis"))
    middle = LEFT + WIDE / 2
    return [*parts, text(middle, top + STRIP + 32, "point (k leaves block k - 1)", kind="soft", anchor="middle")]
