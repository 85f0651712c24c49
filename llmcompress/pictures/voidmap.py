"""How much each block is used: for every block and phase, the share of tokens for which the block is active."""

from collections.abc import Sequence

from llmcompress.pictures.colours import shade
from llmcompress.pictures.grid import Cell, Grid, legend
from llmcompress.pictures.svg import document, text, text_width
from llmcompress.pictures.words import listed, shorten
from llmcompress.types import Series

PREFIX = "usage "
VOID_BELOW = 0.5
LEFT, TOP = 58.0, 62.0


def usage_of(series: Sequence[Series]) -> dict[str, tuple[float, ...]]:
    """Usage of each block by phase, `(blocks,)` each, out of what a scorer returned; empty where it has none."""
    found = {x.name.removeprefix(PREFIX): x.values for x in series if x.name.startswith(PREFIX) and x.values}
    longest = max((len(values) for values in found.values()), default=0)
    return {phase: values for phase, values in found.items() if len(values) == longest}


def void_words(usage: dict[str, tuple[float, ...]]) -> list[str]:
    """The void map in words, one line per phase: blocks that fewer than half of the tokens activate."""
    lines = []
    for phase, values in usage.items():
        voids = [f"{place} ({value:.0%})" for place, value in enumerate(values) if value < VOID_BELOW]
        least = min(range(len(values)), key=values.__getitem__)
        if voids:
            noun, verb = ("block", "is") if len(voids) == 1 else ("blocks", "are")
            words = f"{noun} {listed(voids)} {verb} void for most tokens"
        else:
            words = f"no block is void for most tokens; block {least} is used least, by {values[least]:.0%} of them"
        lines.append(f"{shorten(phase, 24)}: {words}")
    return lines


def void_map(series: Sequence[Series], *, name: str = "") -> str:
    """SVG of the usage of each block, blocks downwards, phases across, percentages in the cells.

    `name` of the model for the title. Reads the series called `usage PHASE`; there must be at least one.
    """
    usage = usage_of(series)
    blocks = len(next(iter(usage.values()), ()))
    cells = [[_cell(phase, place, values[place]) for phase, values in usage.items()] for place in range(blocks)]
    grid = Grid([str(place) for place in range(blocks)], list(usage), [1] * len(usage), cells)
    keys, keys_width = legend(
        [(shade(0.0), "0 %: never active"), (shade(0.5), "50 %"), (shade(1.0), "100 %")],
        LEFT,
        TOP + grid.size[1] + 12,
    )
    title = f"Use of each block, {shorten(name, 50)}" if name else "Use of each block"
    facts = "share of tokens for which a block is active, per cent"
    width = max(grid.size[0], keys_width, text_width(title) * 1.25, text_width(facts)) + LEFT + 20
    return document(
        width,
        TOP + grid.size[1] + 38,
        title=title,
        description=f"{blocks} blocks by {len(usage)} phases: {facts}. {'. '.join(void_words(usage))}.",
        parts=[
            text(LEFT, 24, title, kind="head ink"),
            text(LEFT, 44, facts, kind="soft"),
            text(LEFT - 8, TOP + 13, "block", kind="soft", anchor="end"),
            *grid.draw(LEFT, TOP),
            *keys,
        ],
    )


def _cell(phase: str, block: int, value: float) -> Cell:
    return Cell(f"{100 * value:.0f}", shade(value), f"block {block}, {shorten(phase, 24)}: {value:.1%} of tokens")
