"""Products of many tokens in one kernel, which unpacks weights in registers, on compute capability 9.0.

A table of `triton/tuning.py` names it where it was measured to be faster, and right; nothing else uses it.
"""

import ctypes
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from llmcompress.kernels.nvrtc import small
from llmcompress.kernels.nvrtc.compiler import Definitions, Given, Launch, function
from llmcompress.kernels.triton.layout import Packing
from llmcompress.kernels.triton.tuning import Fused, Lean

CAPABILITY = (9, 0)
SHARED_BYTES = 227 << 10  # of one thread block
SLICE = 64  # columns of the input that are multiplied together
OF_FEW = ("TILES", "WHOLE", "SLOTS")  # what only the kernel for few tokens is compiled with
TABLE_BYTES, ALIGNMENT, THREADS = 32 << 10, 1024, 32  # of a warp
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
    return ALIGNMENT + inputs + waiting + (TABLE_BYTES if packing.table else 0)


def definitions(packing: Packing, dtype: torch.dtype, scale: torch.dtype, config: Fused) -> Definitions:
    """What `prefill.cu` is compiled with."""
    lean = Lean(config.rows // small.ROWS)
    found = small.definitions(packing, dtype, scale, tiles=1, config=lean, whole=False)
    tile = {"ROWS": config.rows, "TOKENS": config.tokens, "STAGES": config.stages}
    return (*(pair for pair in found if pair[0] not in OF_FEW), *tile.items())


def multiply(x: Tensor, prepared: Mapping[str, Tensor], packing: Packing, rows: int, config: Fused) -> Tensor:
    """`x` (M, columns) times the transposed weight, (M, rows); weights are rounded to the dtype of `x`."""
    x = x if x.data_ptr() % 16 == 0 else x.clone()
    out = torch.empty((len(x), rows), dtype=x.dtype, device=x.device)
    made = definitions(packing, x.dtype, prepared["scale"].dtype, config)
    device = x.device.index if x.device.index is not None else torch.cuda.current_device()
    grid = (-(-len(x) // config.tokens), -(-rows // config.rows))
    how = Launch(grid, THREADS * config.rows // small.ROWS, shared_bytes(packing, config))
    function("prefill", made, device).launch(how, given(x, prepared, out, packing))
    return out


def given(x: Tensor, prepared: Mapping[str, Tensor], out: Tensor, packing: Packing) -> list[Given]:
    """What the kernel is called with, as C takes it."""
    tensors = (x, *(prepared.get(name) for name in ("words", "scale", "zero", "table")), out)
    sizes = (*out.shape, packing.columns, prepared["words"].shape[1], packing.blocks)
    pointers = [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors]
    return [*pointers, *map(ctypes.c_int, sizes)]
