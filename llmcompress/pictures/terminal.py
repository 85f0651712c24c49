"""Pictures as lines of plain text. Numbers carry the facts; bars are added where the terminal can show them."""

from collections.abc import Mapping, Sequence

from llmcompress.pictures.columns import columns_of
from llmcompress.pictures.words import shorten
from llmcompress.types import BitAllocation, ModelTrace

BARS = " ▁▂▃▄▅▆▇█"
KEPT_MARK = "kept"
BAR_LENGTH = 20


def aligned(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table as lines: the first column to the left, the others to the right, nothing cut."""
    table = [[shorten(cell, 120) for cell in row] for row in (columns, *rows)]
    widths = [max(len(row[place]) for row in table) for place in range(len(columns))]
    lines = []
    for row in table:
        first = row[0].ljust(widths[0])
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join([first, *rest]).rstrip())
    return lines


def heat_map_lines(trace: ModelTrace, allocation: BitAllocation, *, bars: bool = False) -> list[str]:
    """The widths of an allocation: a line for each block, a column for each fused unit.

    With `bars`, a block character beside each number grows with the width. Members of a unit that differ are
    written `3/4`; a linear left at the source precision is `kept`.
    """
    columns = columns_of(trace)
    specs = {a.linear: a.spec.bits for a in allocation.assigned}
    rows = []
    for block in trace.blocks:
        found: dict[str, int | None] = {columns.kind_of[x.name]: specs.get(x.name) for x in block.linears}
        cells = (list(dict.fromkeys(found[kind] for kind in unit if kind in found)) for unit in columns.units)
        rows.append([str(block.index), *(_cell(widths, bars) for widths in cells)])
    lines = aligned(["block", *("+".join(unit) for unit in columns.units)], rows)
    if trace.head is not None:
        lines.append(f"head   {shorten(trace.head.name, 80)} {_cell([specs.get(trace.head.name)], bars)}")
    return lines


def _cell(widths: Sequence[int | None], bars: bool) -> str:
    words = "/".join(KEPT_MARK if bits is None else str(bits) for bits in widths) or "-"
    known = [bits for bits in widths if bits is not None]
    return f"{words} {BARS[min(max(known, default=0), 8)]}" if bars else words


def void_map_lines(usage: Mapping[str, Sequence[float]], *, bars: bool = False) -> list[str]:
    """The usage of each block by phase, per cent: a line for each block, with a bar of the first phase where asked."""
    phases = list(usage)
    blocks = len(usage[phases[0]]) if phases else 0
    rows = [[str(place), *(f"{100 * usage[phase][place]:.0f} %" for phase in phases)] for place in range(blocks)]
    lines = aligned(["block", *phases], rows)
    if not bars or not phases:
        return lines
    lengths = [round(min(max(value, 0.0), 1.0) * BAR_LENGTH) for value in usage[phases[0]]]
    drawn = ("█" * length + "░" * (BAR_LENGTH - length) for length in lengths)
    return [lines[0], *(f"{line}  {bar}" for line, bar in zip(lines[1:], drawn, strict=True))]
