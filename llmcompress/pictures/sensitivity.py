"""What each width costs: a small plot for every kind of linear, median and range over the blocks, one log axis."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from llmcompress.pictures.axes import Frame, Scale, log_scale
from llmcompress.pictures.columns import columns_of
from llmcompress.pictures.svg import circle, document, stroke, text, text_width
from llmcompress.pictures.words import number, shorten
from llmcompress.types import BitAllocation, ModelTrace, Scores

PANEL, TALL = 178.0, 132.0
LEFT, TOP, STEP_X, STEP_Y = 84.0, 92.0, 196.0, 196.0
ACROSS = 4


@dataclass(frozen=True)
class Spread:
    """Damage of one kind of linear at one width: least, median and greatest over the blocks, and their number."""

    low: float
    middle: float
    high: float
    linears: int


Curve = dict[int, Spread]


def damage_by_kind(trace: ModelTrace, scores: Scores) -> dict[str, Curve]:
    """Kind of linear -> width -> spread of the damage over the blocks, kinds in call order, widths increasing."""
    columns = columns_of(trace)
    found: dict[str, dict[int, list[float]]] = {kind: {} for kind in columns.kinds}
    for layer in scores.layers:
        if layer.linear in columns.kind_of:
            table = found.setdefault(columns.kind_of[layer.linear], {})
            for candidate in layer.candidates:
                table.setdefault(candidate.spec.bits, []).append(candidate.damage)
    return {
        kind: {bits: Spread(min(v), median(v), max(v), len(v)) for bits, v in sorted(table.items())}
        for kind, table in found.items()
        if table
    }


def sensitivity_curves(
    trace: ModelTrace, scores: Scores, *, allocation: BitAllocation | None = None, name: str = ""
) -> str:
    """SVG of damage against bits, grouped by kind of linear: line = median over the blocks, band = least to greatest.

    With an `allocation`, the dot at a width grows with the share of the kind's linears that got it. `name` of the
    model for the title. Damage in `scores.unit`; zero lies on the lower edge of the log axis.
    """
    curves = damage_by_kind(trace, scores)
    chosen = _chosen(trace, allocation)
    every = [value for curve in curves.values() for s in curve.values() for value in (s.low, s.high)]
    widths = sorted({bits for curve in curves.values() for bits in curve}) or [2]
    rows = -(-len(curves) // ACROSS) or 1
    title = f"Damage against bits, {shorten(name, 44)}" if name else "Damage against bits"
    facts = (
        f"{shorten(scores.scorer, 24)}, {scores.unit} for each linear; line: median over the blocks, band: least to "
        "greatest"
    )
    parts = [text(LEFT, 24, title, kind="head ink"), text(LEFT, 44, facts, kind="soft")]
    if allocation is not None:
        parts.append(text(LEFT, 60, "large dots: widths this plan chose, by share of linears", kind="soft"))
    for place, (kind, curve) in enumerate(curves.items()):
        left, top = LEFT + STEP_X * (place % ACROSS), TOP + STEP_Y * (place // ACROSS)
        x = Scale(widths[0] - 0.4, widths[-1] + 0.4, left, left + PANEL)
        frame = Frame(x, log_scale(every, top + TALL, top))
        first = place % ACROSS == 0
        parts += frame.axes(widths, across_name="bits", up_name=scores.unit if first else "", named=first)
        parts.append(text(left, top - 8, kind, most=26))
        parts += _curve(frame, kind, curve, chosen=chosen.get(kind, {}))
    width = max(LEFT + STEP_X * min(max(len(curves), 1), ACROSS), LEFT + text_width(facts) + 10)
    return document(
        width, TOP + STEP_Y * rows, title=title, description=f"{facts}. {_in_words(curves)}", parts=parts
    )  # fmt: skip


def _chosen(trace: ModelTrace, allocation: BitAllocation | None) -> dict[str, dict[int, float]]:
    """Kind -> width -> share of its linears that an allocation gives this width."""
    if allocation is None:
        return {}
    columns = columns_of(trace)
    counts: dict[str, Counter[int]] = {}
    for a in allocation.assigned:
        if a.linear in columns.kind_of:
            counts.setdefault(columns.kind_of[a.linear], Counter())[a.spec.bits] += 1
    return {kind: {bits: n / sum(table.values()) for bits, n in table.items()} for kind, table in counts.items()}


def _curve(frame: Frame, kind: str, curve: Curve, *, chosen: Mapping[int, float]) -> list[str]:
    up, across = frame.y.at, frame.x.at
    high = [(across(bits), up(spread.high)) for bits, spread in curve.items()]
    low = [(across(bits), up(spread.low)) for bits, spread in curve.items()]
    middle = [(across(bits), up(spread.middle)) for bits, spread in curve.items()]
    parts = [stroke([*high, *reversed(low)], kind="band", closed=True), stroke(middle, kind="line")]
    for (x, y), (bits, spread) in zip(middle, curve.items(), strict=True):
        share = chosen.get(bits, 0.0)
        tip = (
            f"{shorten(kind, 40)}, {bits} bits: median {number(spread.middle)}, {number(spread.low)} to "
            f"{number(spread.high)} over {spread.linears}" + (f"; chosen for {share:.0%}" if share else "")
        )
        parts.append(circle(x, y, 2.5 + 6 * share**0.5, kind="dot", tip=tip))
    return parts


def _in_words(curves: Mapping[str, Curve]) -> str:
    shown: Sequence[str] = [
        f"{shorten(kind, 24)} from {number(next(iter(curve.values())).middle)} at {min(curve)} bits to "
        f"{number(next(reversed(curve.values())).middle)} at {max(curve)}"
        for kind, curve in curves.items()
    ]
    return f"Medians: {'; '.join(shown)}." if shown else "No linear has candidates."
