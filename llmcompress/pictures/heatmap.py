"""Which linear got how many bits: a row for each block, a column for each kind of linear, the width in the cell."""

from collections import Counter

from llmcompress.pictures.colours import KEPT, width_colour
from llmcompress.pictures.columns import columns_of
from llmcompress.pictures.grid import GAP, ROW, Cell, Grid, legend
from llmcompress.pictures.svg import document, text, text_width
from llmcompress.pictures.words import shorten
from llmcompress.types import BitAllocation, LinearInfo, LinearSpec, ModelTrace

KEPT_WORD = "kept"
LEFT, TOP = 58.0, 62.0


def bits_heat_map(trace: ModelTrace, allocation: BitAllocation, *, name: str = "") -> str:
    """SVG of the widths of an allocation, blocks downwards, kinds of linears across, fused ones set together.

    `name` of the model for the title. A linear without a format is marked `kept`: left at the source precision.
    """
    columns = columns_of(trace)
    specs = {a.linear: a.spec for a in allocation.assigned}
    rows = []
    for block in trace.blocks:
        found = {columns.kind_of[x.name]: _cell(x, specs.get(x.name)) for x in block.linears}
        rows.append([found.get(kind) for kind in columns.kinds])
    names = [str(block.index) for block in trace.blocks]
    head = None if trace.head is None else _cell(trace.head, specs.get(trace.head.name))
    grid = Grid(names, columns.kinds, [len(unit) for unit in columns.units], rows)
    counts = Counter(specs[x.name].bits if x.name in specs else 0 for x in trace.every)
    entries = [(width_colour(bits), f"{bits} bits: {counts[bits]}") for bits in sorted(counts) if bits]
    entries += [(KEPT, f"source precision: {counts[0]}")] if counts[0] else []
    below = TOP + grid.size[1] + (ROW + GAP if head else 0.0)
    keys, keys_width = legend(entries, LEFT, below + 12)
    title = f"Bits of each linear, {shorten(name, 50)}" if name else "Bits of each linear"
    facts = f"{allocation.bits_per_weight:.4g} bits per weight, scales counted; budget {shorten(allocation.budget, 30)}"
    width = max(grid.size[0], keys_width, text_width(title) * 1.25, text_width(facts)) + LEFT + 20
    return document(
        width,
        below + 38,
        title=title,
        description=f"{len(names)} blocks by {len(columns.kinds)} kinds of linears. {facts}. "
        f"Linears by width: {', '.join(words for _, words in entries)}.",
        parts=[
            text(LEFT, 24, title, kind="head ink"),
            text(LEFT, 44, facts, kind="soft"),
            text(LEFT - 8, TOP + 13, "block", kind="soft", anchor="end"),
            *grid.draw(LEFT, TOP),
            *(_head(head, trace.head.name, TOP + grid.size[1] + GAP) if head and trace.head else []),
            *keys,
        ],
    )


def _head(cell: Cell, name: str, top: float) -> list[str]:
    """A row of its own below the blocks, for the head belongs to none."""
    row = Grid(["head"], [""], [1], [[cell]])
    beside = LEFT + row.widths[0] + 8
    return [*row.draw(LEFT, top - ROW), text(beside, top + 13.5, name, kind="soft", most=40)]


def _cell(linear: LinearInfo, spec: LinearSpec | None) -> Cell:
    name = shorten(linear.name, 80)
    shape = f"{name} ({linear.rows} x {linear.columns})" if linear.rows else name
    if spec is None:
        return Cell(KEPT_WORD, KEPT, f"{shape}: source precision")
    made = f"groups of {spec.group_size}" if spec.label == f"int{spec.bits}" else spec.label
    return Cell(str(spec.bits), width_colour(spec.bits), f"{shape}: {spec.bits} bits, {made}")
