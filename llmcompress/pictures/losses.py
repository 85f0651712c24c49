"""What storing the linears cost, block by block: a dot for each linear, a line from the least to the worst."""

from collections.abc import Sequence

from llmcompress.pictures.axes import Box, Frame, linear_scale, log_scale, place_labels, ticks
from llmcompress.pictures.columns import columns_of, named_trace
from llmcompress.pictures.svg import circle, document, stroke, text
from llmcompress.pictures.words import number, shorten
from llmcompress.types import BlockOutcome

LEFT, TOP, WIDE, TALL = 84.0, 68.0, 620.0, 240.0
NAMED = 4


def block_losses(blocks: Sequence[BlockOutcome], *, name: str = "") -> str:
    """SVG of the relative output error of every linear (log axis) against its block; the worst few are named.

    The relative error is `tr(dW H dW^T) / tr(W H W^T)`, `H` being the Hessian of calibration text,
    or the identity where the quantizer looks at none.
    """
    shown = [block for block in blocks if block.linears]
    values = [(b.block, x.relative_loss, x.linear, x.bits) for b in shown for x in b.linears]
    x = linear_scale((float(b.block) for b in shown), LEFT, LEFT + WIDE)
    y = log_scale((value for _, value, _, _ in values), TOP + TALL, TOP)
    title = f"Relative output error of each linear, {shorten(name, 44)}" if name else "Relative output error"
    facts = "squared error over squared output; a dot is a linear, a line joins those of a block"
    frame = Frame(x, y)
    parts = [text(LEFT, 24, title, kind="head ink"), text(LEFT, 44, facts, kind="soft")]
    parts += frame.axes([at for at in ticks(x, 12) if at == round(at)], across_name="block", up_name="relative error")
    taken: list[Box] = []
    for block in shown:
        heights = [y.at(one.relative_loss) for one in block.linears]
        at = x.at(float(block.block))
        parts.append(stroke([(at, max(heights)), (at, min(heights))], kind="lead"))
        taken.append((at - 4, min(heights) - 4, at + 4, max(heights) + 4))
    for index, value, linear, bits in values:
        tip = f"{shorten(linear, 80)}: {bits} bits, {number(value)}"
        parts.append(circle(x.at(float(index)), y.at(value), 3, kind="dot", tip=tip))
    kinds = columns_of(named_trace(linear for _, _, linear, _ in values)).kind_of
    worst = sorted(values, key=lambda one: -one[1])[:NAMED]
    labels = [
        (x.at(float(index)), y.at(value), f"{shorten(kinds.get(linear, linear), 24)} {bits} bits")
        for index, value, linear, bits in worst
    ]
    parts += place_labels(labels, inside=(LEFT + 2, TOP - 12, LEFT + WIDE + 34, TOP + TALL - 2), taken=taken)
    told = "; ".join(f"block {b}, {shorten(linear, 60)}: {number(v)}" for b, v, linear, _ in worst)
    words = f"{facts}. {len(values)} linears in {len(shown)} blocks. The worst: {told}."
    return document(LEFT + WIDE + 40, TOP + TALL + 48, title=title, description=words, parts=parts)
