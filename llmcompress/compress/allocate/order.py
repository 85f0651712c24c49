"""Two widths by an order of blocks: the most important blocks get the wide format, the rest the narrow."""

from collections.abc import Sequence
from itertools import accumulate

from llmcompress.compress.allocate.integer import InfeasibleError
from llmcompress.errors import InputError


def first_blocks(importance: Sequence[float], low: Sequence[int], high: Sequence[int], budget: int) -> tuple[int, ...]:
    """The blocks that get the wide format, in the order they get it (arXiv 2406.17415).

    importance   per block, larger is more important: LIM as it is, ZD with its sign turned. Equals go by block
    low, high    storage bits per block in the narrow and in the wide format
    budget       storage bits of all blocks

    The order is walked until the next block no longer fits; later ones that would fit get nothing, so that a
    larger budget only adds blocks. Raises InfeasibleError when the narrow format alone is over the budget, and
    InputError when the three disagree in length or a wide format is smaller than a narrow one.
    """
    if not len(importance) == len(low) == len(high):
        raise InputError(f"{len(importance)} importances, {len(low)} and {len(high)} costs", "give one per block")
    if any(wide < narrow for narrow, wide in zip(low, high, strict=True)):
        raise InputError("a wide format is smaller than the narrow one", "exchange the two")
    smallest = sum(low)
    if smallest > budget:
        raise InfeasibleError(smallest, sum(high))
    order = sorted(range(len(importance)), key=lambda block: -importance[block])
    totals = accumulate((high[block] - low[block] for block in order), initial=smallest)
    fitting = sum(spent <= budget for spent in totals) - 1
    return tuple(order[:fitting])


def two_widths(
    importance: Sequence[float], blocks: Sequence[int], costs: Sequence[tuple[int, int]], budget: int
) -> tuple[int, ...]:
    """Choose 0 (narrow) or 1 (wide) for every unit from the importance of its block.

    importance   per block
    blocks       the block of each unit
    costs        storage bits of each unit in the narrow and in the wide format
    budget       storage bits of all units

    Errors as in `first_blocks`.
    """
    if len(blocks) != len(costs) or any(not 0 <= block < len(importance) for block in blocks):
        raise InputError("units do not match blocks", "give every unit a block and two costs")
    low, high = ([0] * len(importance) for _ in range(2))
    for block, (narrow, wide) in zip(blocks, costs, strict=True):
        low[block] += narrow
        high[block] += wide
    wide_blocks = set(first_blocks(importance, low, high, budget))
    return tuple(int(block in wide_blocks) for block in blocks)
