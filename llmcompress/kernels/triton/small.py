"""Products of few tokens: the kernel reads the packed weight once for all of them."""

from collections.abc import Mapping

import torch
import triton
from torch import Tensor

from llmcompress.errors import InputError
from llmcompress.kernels.fourbit import table_of
from llmcompress.kernels.triton.bits import centred_ptx, table_ptx
from llmcompress.kernels.triton.jit.decode import decode
from llmcompress.kernels.triton.layout import COUNTERS, NO_TABLE, ONE_TABLE, Packing
from llmcompress.kernels.triton.tuning import Config, Lean, choose

PTX_KIND = {torch.float16: "fp16", torch.bfloat16: "bf16"}


def multiply(
    x: Tensor, prepared: Mapping[str, Tensor], packing: Packing, rows: int, config: Config | None = None
) -> Tensor:
    """`x` (M, columns) times the transposed weight, (M, rows); `config` in place of the tuned one."""
    order = packing.planar
    if order is None:
        raise InputError(f"{packing.label}: no planar order", "multiply it in strips")
    tokens = len(x)
    found = config or choose(packing, rows, tokens, x.device)
    if isinstance(found, Lean):
        raise InputError(f"{found}: not a tile of this kernel", "choose without `lean`")
    config = for_dtype(found, x.dtype)
    grid = (triton.cdiv(rows, config.rows), config.split, triton.cdiv(tokens, config.tokens))
    if grid[0] * grid[2] > COUNTERS:
        config = config._replace(split=1)
        grid = (grid[0], 1, grid[2])
    out = torch.empty((tokens, rows), dtype=x.dtype, device=x.device)
    partials = (
        torch.empty((config.split, tokens, rows), dtype=torch.float32, device=x.device) if config.split > 1 else out
    )
    words, none = prepared["words"], prepared["counters"]
    decode[grid](
        x, words, prepared.get("scale", none), prepared.get("zero", none), prepared.get("table", none),
        out, partials, prepared["counters"], tokens, rows, packing.columns, words.shape[1],
        **constants(packing, config, x.dtype, x.is_cuda), num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out


def for_dtype(config: Config, dtype: torch.dtype) -> Config:
    """The tile sizes for inputs of `dtype`: float32 has no exact matrix instructions, and its sums need registers."""
    if dtype != torch.float32:
        return config
    return config._replace(rows=min(config.rows, 32), tokens=min(config.tokens, 16))


def constants(packing: Packing, config: Config, dtype: torch.dtype, assembly: bool) -> dict[str, object]:
    """What `decode` is compiled for."""
    order = packing.planar
    if order is None:
        raise InputError(f"{packing.label}: no planar order", "multiply it in strips")
    blocks = order.blocks(packing.columns)
    even = packing.columns % order.block == 0 and blocks % config.split == 0
    return {
        "BITS": packing.bits, "WORDS": order.words, "FIELDS": order.fields, "PLANES": order.planes,
        "GROUP": packing.group, "ZERO": packing.zero, "TABLE": packing.table, "BLOCKS": blocks, "EVEN": even,
        "SPLIT": config.split, "BN": config.rows, "BM": config.tokens,
        "PTX": _assembly(packing, dtype) if assembly else "",
    }  # fmt: skip


def _assembly(packing: Packing, dtype: torch.dtype) -> str:
    """The instructions that make numbers of codes; empty where Triton's own do."""
    if dtype not in PTX_KIND or packing.table not in (NO_TABLE, ONE_TABLE):
        return ""
    if packing.table == NO_TABLE:
        return centred_ptx(packing.bits, PTX_KIND[dtype])
    return table_ptx([value & 0xFFFF for value in table_of(packing.kind).to(dtype).view(torch.int16).tolist()])
