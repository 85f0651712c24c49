"""Products of few tokens, and rows of a weight in floating point, by kernels in CUDA C++.

They read what `triton/layout.py` prepares, so that either language can have the next call.
"""

import ctypes
import functools
import os
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from llmcompress.kernels.nvrtc.compiler import Definitions, Function, Given, Launch, function, library
from llmcompress.kernels.triton.layout import TABLE_PER_ROW, Packing
from llmcompress.kernels.triton.tuning import Lean

VARIABLE = "LLMCOMPRESS_NVRTC"
TILE, MOST_TOKENS, ROWS = 8, 16, 16
MOST_OF_TERMS = 4  # tokens, where each has two columns of the narrow operand
RESIDENT = 24  # warps of that kernel that a processor holds
PART = 128  # columns of an input that share a scale at most, where it becomes two bytes
EXPAND_WARPS = 4
EARLY_FROM = (9, 0)
SHORTEST = 32  # run of words that a warp reads at once
VECTOR = 8  # of 16-bit inputs, in one load
TABLE_BYTES, SUMS_BYTES, SYSTEM_BYTES = 256 * 32 * 4, 4 << 10, 1 << 10  # of a thread block; the first: pairs of values
MOST_BLOCKS = (1 << 31) - 1
READ = "llmcompress_read"
SCALES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def fits(packing: Packing, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels know this order of codes and this type of inputs, and can be compiled here."""
    order = packing.planar
    if order is None or device.type != "cuda" or os.environ.get(VARIABLE) == "0":
        return False
    if dtype not in (torch.bfloat16, torch.float16) or packing.table == TABLE_PER_ROW or order.words < SHORTEST:
        return False
    whole = packing.group == 0 or (
        packing.group % order.block == 0 if packing.group >= order.block else order.block % packing.group == 0
    )
    return whole and packing.columns % VECTOR == 0 and library() is not None


def order_definitions(packing: Packing, dtype: torch.dtype, scale: torch.dtype, warps: int) -> dict[str, int]:
    """What every kernel is compiled with, as `codes.cu` and `ptx.cu` say."""
    order = packing.planar
    words, fields, planes, block = (order.words, order.fields, order.planes, order.block) if order else (0, 0, 0, 1)
    return {
        "BITS": packing.bits, "WORDS": words, "FIELDS": fields, "PLANES": planes, "GROUP": packing.group,
        "ZERO": int(packing.zero), "TABLE": int(bool(packing.table)), "EVEN": int(packing.columns % block == 0),
        "WARPS": warps, "BFLOAT": int(dtype == torch.bfloat16), "SCALE": SCALES[scale], "EARLY": 0,
    }  # fmt: skip


def definitions(
    packing: Packing, dtype: torch.dtype, scale: torch.dtype, *, tokens: int, config: Lean, whole: bool
) -> Definitions:
    """What the kernel is compiled with; `whole`: scales and zero-points of 16 rows lie at multiples of 16 bytes."""
    found = order_definitions(packing, dtype, scale, config.warps)
    own = {"TILES": -(-tokens // TILE), "WHOLE": int(whole), "SLOTS": config.slots, "EARLY": config.early}
    return tuple((found | own).items())


def slot_bytes(packing: Packing, scale: torch.dtype, whole: bool) -> int:
    """Of one block of 16 rows in shared memory: codes, scales and zero-points."""
    order = packing.planar
    if order is None or not packing.group or not whole:
        return order.planes * order.words * 2 * ROWS if order else 0
    groups = max(order.block // packing.group, 1)
    return order.planes * order.words * 2 * ROWS + groups * ROWS * (scale.itemsize + packing.zero)


def takes_terms(packing: Packing, tokens: int) -> bool:
    """Whether `twoterm.cu` knows such codes and so many tokens."""
    return packing.planar is not None and not packing.table and tokens <= MOST_OF_TERMS


def input_bytes(packing: Packing) -> int:
    """Of all inputs of a token as two bytes each, with the scale and the sum of every part."""
    order = packing.planar
    if order is None:
        return 0
    group = packing.group or order.block
    parts = order.block // min(group, order.block, PART)
    return packing.blocks * (2 * order.block + -(-parts * 8 // 16) * 16) + 16


def shared_bytes(packing: Packing, scale: torch.dtype, *, tokens: int, config: Lean, whole: bool) -> int:
    """Of a thread block at launch: slots, and inputs where they become bytes."""
    slots = config.warps * config.slots * slot_bytes(packing, scale, whole)
    return slots + (tokens * input_bytes(packing) if config.terms == 2 else 0)


@functools.lru_cache(maxsize=4096)
def possible(config: Lean, packing: Packing, tokens: int, device: torch.device) -> Lean:
    """`config` without what the device, so many tokens or such codes cannot have: an early start, inputs as bytes."""
    found = torch.cuda.get_device_properties(device)
    if config.early and (found.major, found.minor) < EARLY_FROM:
        config = config._replace(early=0)
    needed = shared_bytes(packing, torch.float32, tokens=tokens, config=config, whole=True) + _beside(packing, config)
    if config.terms == 2 and not (takes_terms(packing, tokens) and needed <= found.shared_memory_per_multiprocessor):
        config = config._replace(terms=1)
    return config


def _beside(packing: Packing, config: Lean) -> int:
    """Bytes of shared memory that a thread block takes beside those at launch: tables, sums, what the system takes."""
    sums = 2 * config.warps * MOST_OF_TERMS * ROWS * 4
    return SYSTEM_BYTES + sums if config.terms == 2 else SYSTEM_BYTES + SUMS_BYTES + TABLE_BYTES * bool(packing.table)


def is_whole(prepared: Mapping[str, Tensor], rows: int) -> bool:
    """Whether scales and zero-points of 16 rows lie at multiples of 16 bytes, and rows are whole tiles."""
    beside = [prepared[part] for part in ("scale", "zero") if part in prepared]
    return rows % ROWS == 0 and all(tensor.data_ptr() % 16 == 0 for tensor in beside)


def multiply(x: Tensor, prepared: Mapping[str, Tensor], packing: Packing, rows: int, config: Lean) -> Tensor:
    """`x` (M, columns) of up to 16 tokens times the transposed weight, (M, rows)."""
    x = x if x.data_ptr() % 16 == 0 else x.clone()
    out = torch.empty((len(x), rows), dtype=x.dtype, device=x.device)
    function, how = ready(x, prepared, packing, rows, config)
    if not _read_before(prepared["words"]):
        how = replace(how, early=False)
    function.launch(how, given(x, prepared, out, packing))
    return out


def ready(
    x: Tensor, prepared: Mapping[str, Tensor], packing: Packing, rows: int, config: Lean
) -> tuple[Function, Launch]:
    """The kernel that `multiply` launches, compiled, and how."""
    scale, whole = prepared["scale"].dtype, is_whole(prepared, rows)
    config = possible(config, packing, len(x), x.device)
    made = definitions(packing, x.dtype, scale, tokens=len(x), config=config, whole=whole)
    shared = shared_bytes(packing, scale, tokens=len(x), config=config, whole=whole)
    tiles = min(-(-rows // ROWS), _resident(packing, shared, config, x.device))
    how = Launch((tiles, 1), 32 * config.warps, shared, bool(config.early))
    return kernel(("decode", "twoterm")[config.terms - 1], made, x.device), how


def _read_before(words: Tensor) -> bool:
    """Whether a kernel has read this weight; the first one begins late, as what wrote it may still run."""
    known: bool = getattr(words, READ, False)
    setattr(words, READ, True)
    return known


@functools.lru_cache(maxsize=4096)
def _resident(packing: Packing, shared: int, config: Lean, device: torch.device) -> int:
    """Thread blocks that a GPU holds at a time, where each makes a table or bytes of inputs first; else any number."""
    if not packing.table and config.terms == 1:
        return MOST_BLOCKS
    found = torch.cuda.get_device_properties(device)
    each = found.shared_memory_per_multiprocessor // (shared + _beside(packing, config))
    if config.terms == 2:
        each = min(each, RESIDENT // config.warps)
    return max(each, 1) * found.multi_processor_count


def dequantize(prepared: Mapping[str, Tensor], packing: Packing, span: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Rows `span[0] ... span[1] - 1` of the weight, `(rows, columns)`, rounded to `dtype`."""
    first, last = span
    words, scale = prepared["words"], prepared["scale"]
    out = torch.empty((last - first, packing.columns), dtype=dtype, device=words.device)
    made = tuple(order_definitions(packing, dtype, scale.dtype, EXPAND_WARPS).items())
    numbers = _numbers(packing, words, first, last, scale.shape[1])
    how = Launch((-(-(last - first) // ROWS), -(-packing.blocks // EXPAND_WARPS)), 32 * EXPAND_WARPS)
    kernel("expand", made, words.device).launch(how, [*_weight(prepared), *_pointers(out), *numbers])
    return out


def given(x: Tensor, prepared: Mapping[str, Tensor], out: Tensor, packing: Packing) -> list[Given]:
    """What a kernel that multiplies is called with, as C takes it."""
    numbers = _numbers(packing, prepared["words"], *out.shape)
    return [*_pointers(x), *_weight(prepared), *_pointers(out), *numbers]


def kernel(name: str, made: Definitions, device: torch.device) -> Function:
    """The kernel of the file `name`.cu on a device, which is the current one where it has no number."""
    return function(name, made, device.index if device.index is not None else torch.cuda.current_device())


def _pointers(*tensors: Tensor | None) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors]


def _weight(prepared: Mapping[str, Tensor]) -> list[ctypes.c_void_p]:
    return _pointers(prepared["words"], prepared["scale"], prepared.get("zero"), prepared.get("table"))


def _numbers(packing: Packing, words: Tensor, *first: int) -> list[ctypes.c_int]:
    """Those given, then columns, words of a row, blocks of a row."""
    return [ctypes.c_int(value) for value in (*first, packing.columns, words.shape[1], packing.blocks)]
