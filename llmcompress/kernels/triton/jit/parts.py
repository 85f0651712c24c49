"""Several programs on one tile: sums that depend on nothing but the inputs, with one launch and no zeroing."""

import triton
import triton.language as tl


@triton.jit
def together(sums, place, whole, size, partials, counters, SPLIT: tl.constexpr):
    """Sums of all `SPLIT` programs of a tile, and whether this is the one that has them: the last to arrive.

    Each leaves its part at `partials + part * size + place`; the last adds all of them in order and sets the counter
    of the tile back to zero. `partials` has the type of `sums`.
    """
    last = True
    if SPLIT > 1:
        tl.store(partials + tl.program_id(1) * size + place, sums, mask=whole)
        tl.debug_barrier()
        counter = counters + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        last = tl.atomic_add(counter, 1, sem="acq_rel") == SPLIT - 1
        if last:
            sums = tl.zeros_like(sums)
            for part in range(SPLIT):
                sums += tl.load(partials + part * size + place, mask=whole, other=0, cache_modifier=".cg")
            tl.store(counter, 0)
    return sums, last
