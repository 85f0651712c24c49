"""Products of many tokens in one kernel, which unpacks weights in registers, on compute capability 9.0.

A table of `triton/tuning.py` names it where it was measured to be faster, and right; nothing else uses it.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from llmcompress.kernels.nvrtc import small
from llmcompress.kernels.nvrtc.compiler import Definitions, Function, Launch
from llmcompress.kernels.triton.layout import Packing
from llmcompress.kernels.triton.tuning import Fused

CAPABILITY = (9, 0)
SHARED_BYTES = 227 << 10  # of one thread block
SLICE = 64  # columns of the input that are multiplied together
ALIGNMENT, THREADS = 1024, 32  # of a warp
CANDIDATES = (
    *(Fused(rows, 128, 6) for rows in (128, 192, 256)), *(Fused(128, tokens, 4) for tokens in (128, 256)),
    Fused(128, 256, 5),
)  # fmt: skip


def fits(packing: Packing, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernel knows this order of codes and this type of inputs, and runs on this device."""
    if not small.fits(packing, dtype, device) or torch.cuda.get_device_capability(device) != CAPABILITY:
        return False
    return knows(packing)


def knows(packing: Packing) -> bool:
    """Whether the codes lie in blocks of an even number of slices."""
    return packing.planar is not None and packing.planar.block % (2 * SLICE) == 0


def candidates(packing: Packing) -> Iterator[Fused]:
    """The tiles that are worth trying and find room in shared memory."""
    yield from (config for config in CANDIDATES if has_room(packing, config))


def has_room(packing: Packing, config: Fused) -> bool:
    """Whether a tile's inputs and words fit into shared memory."""
    return shared_bytes(packing, config) <= SHARED_BYTES


def shared_bytes(packing: Packing, config: Fused) -> int:
    """Inputs of every stage, the words that wait, and the values of pairs of codes, as `prefill.cu` lays them out."""
    order = packing.planar
    planes, words, block = (order.planes, order.words, order.block) if order else (0, 0, SLICE)
    inputs = config.stages * 2 * SLICE * config.tokens
    buffers = (config.stages - 2) // (block // SLICE) + 1
    waiting = buffers * config.rows * (2 * planes * words + 16)
    return ALIGNMENT + inputs + waiting + (small.TABLE_BYTES if packing.table else 0)


def definitions(packing: Packing, dtype: torch.dtype, scale: torch.dtype, config: Fused) -> Definitions:
    """What `prefill.cu` is compiled with."""
    found = small.order_definitions(packing, dtype, scale, config.rows // small.ROWS)
    return tuple((found | {"ROWS": config.rows, "TOKENS": config.tokens, "STAGES": config.stages}).items())


def multiply(x: Tensor, prepared: Mapping[str, Tensor], packing: Packing, rows: int, config: Fused) -> Tensor:
    """`x` (M, columns) times the transposed weight, (M, rows); weights are rounded to the dtype of `x`."""
    x = x if x.data_ptr() % 16 == 0 else x.clone()
    out = torch.empty((len(x), rows), dtype=x.dtype, device=x.device)
    function, how = ready(x, prepared, packing, rows, config)
    function.launch(how, small.given(x, prepared, out, packing))
    return out


def ready(
    x: Tensor, prepared: Mapping[str, Tensor], packing: Packing, rows: int, config: Fused
) -> tuple[Function, Launch]:
    """The kernel that `multiply` launches, compiled, and how."""
    made = definitions(packing, x.dtype, prepared["scale"].dtype, config)
    grid = (-(-len(x) // config.tokens), -(-rows // config.rows))
    how = Launch(grid, THREADS * config.rows // small.ROWS, shared_bytes(packing, config))
    return small.kernel("prefill", made, x.device), how
