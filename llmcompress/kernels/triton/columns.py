"""The columns of a block one after the other, on a GPU: in torch every one of them is a dozen launches."""

import torch
import triton
from torch import Tensor

from llmcompress.kernels.triton.jit import columns as jit

ROWS, WARPS = 16, 4  # of one program


def round_block(
    left: Tensor, upper: Tensor, steps: Tensor, half: Tensor, *, codes: Tensor, errors: Tensor, start: int
) -> None:
    """Round columns `start` on, as many as there are steps, of `left` `(columns, rows)`; see `jit.round_block`."""
    count, rows = steps.shape
    block = triton.next_power_of_2(count)
    with torch.cuda.device_of(left):  # type: ignore[no-untyped-call]
        jit.round_block[(triton.cdiv(rows, ROWS),)](
            left, upper, steps, half, codes, errors, start, count, rows, len(left), BK=block, BN=ROWS, num_warps=WARPS
        )


def settle_block(
    gradient: Tensor, metric: Tensor, steps: Tensor, *, codes: Tensor, moves: Tensor, start: int, top: int
) -> None:
    """Settle the codes of columns `start` on, as many as there are `moves`; see `jit.settle_block`."""
    count, rows = moves.shape
    block = triton.next_power_of_2(count)
    with torch.cuda.device_of(gradient):  # type: ignore[no-untyped-call]
        jit.settle_block[(triton.cdiv(rows, ROWS),)](
            gradient, metric, steps, codes, moves, start, count, rows, len(gradient), top,
            BK=block, BN=ROWS, num_warps=WARPS,
        )  # fmt: skip
