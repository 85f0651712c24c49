"""The columns of a block one after the other, on a GPU: in torch every one of them is a dozen launches."""

import torch
import triton
from torch import Tensor

from llmcompress.kernels.triton.jit import columns as jit

ROWS, WARPS = 16, 4  # of one program


def round_block(
    left: Tensor, upper: Tensor, grid: tuple[Tensor, Tensor], *, out: tuple[Tensor, Tensor], start: int
) -> None:
    """Round columns `start` on, as many as there are steps, of `left` `(columns, rows)`; see `jit.round_block`.

    grid  steps and half the number of codes
    out   codes and errors
    """
    (count, rows), block = grid[0].shape, triton.next_power_of_2(len(grid[0]))
    with torch.cuda.device_of(left):  # type: ignore[no-untyped-call]
        jit.round_block[(triton.cdiv(rows, ROWS),)](
            left, upper, *grid, *out, start, count, rows, len(left), BK=block, BN=ROWS, num_warps=WARPS
        )


def settle_block(
    gradient: Tensor, metric: Tensor, steps: Tensor, *, out: tuple[Tensor, Tensor], start: int, top: int
) -> None:
    """Settle the codes, up to `top`, of columns `start` on; see `jit.settle_block`.

    out  codes, and moves of as many columns as are settled
    """
    (count, rows), block = out[1].shape, triton.next_power_of_2(len(out[1]))
    with torch.cuda.device_of(gradient):  # type: ignore[no-untyped-call]
        jit.settle_block[(triton.cdiv(rows, ROWS),)](
            gradient, metric, steps, *out, start, count, rows, len(gradient), top, BK=block, BN=ROWS, num_warps=WARPS
        )
