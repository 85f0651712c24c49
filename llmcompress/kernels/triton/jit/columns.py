"""Columns of many rows rounded one after the other, a block of columns in one program instead of a dozen calls each."""

import triton
import triton.language as tl

from llmcompress.kernels.triton.jit.int8 import ROUNDER


@triton.jit
def _clamped(value, least, most):
    """The nearest whole number between two, ties to even."""
    return tl.minimum(tl.maximum(value, least), most) + ROUNDER - ROUNDER


@triton.jit
def round_block(
    left, upper, steps, half, codes, errors, first, count, N, K, BK: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Rounding with feedback of columns `first ... first + count - 1`; later columns are for the caller to correct.

    left    (K, N) float32, columns as they stand   upper  (K, K) float32, factor of the inverse Hessian
    steps   (count, N) float32                      half   (N,) float32, half the number of codes of each row
    codes   (K, N) uint8, written                   errors (K, N) float32, written: over the diagonal of `upper`
    """
    rows, inner = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
    inside, known = rows < N, inner < count
    place = (first + inner)[:, None].to(tl.int64) * N + rows[None, :]
    tile = tl.load(left + place, mask=known[:, None] & inside[None, :], other=0.0)
    middle = tl.load(half + rows, mask=inside, other=1.0)
    for column in range(count):
        at = (first + column).to(tl.int64)
        value = tl.sum(tl.where(inner[:, None] == column, tile, 0.0), 0)
        step = tl.load(steps + column * N + rows, mask=inside, other=1.0)
        level = _clamped(tl.div_rn(value, step), -middle, middle - 1.0)
        factors = tl.load(upper + at * K + first + inner, mask=known & (inner >= column), other=0.0)
        diagonal = tl.sum(tl.where(inner == column, factors, 0.0), 0)
        error = tl.div_rn(value - level * step, diagonal + tl.zeros_like(value))
        tl.store(codes + at * N + rows, (level + middle).to(tl.uint8), mask=inside)
        tl.store(errors + at * N + rows, error, mask=inside)
        tile -= factors[:, None] * error[None, :]


@triton.jit
def settle_block(
    gradient, metric, steps, codes, moves, first, count, N, K, top, BK: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    """Coordinate descent over the codes of columns `first ... first + count - 1`; `gradient` is left as it was.

    gradient (K, N) float32   metric (K, K) float32, symmetric   steps (K, N) float32
    codes    (K, N) uint8, 0 ... top, written                    moves (count, N) float32, written: changes of weights
    """
    rows, inner = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
    inside, known = rows < N, inner < count
    place = (first + inner)[:, None].to(tl.int64) * N + rows[None, :]
    tile = tl.load(gradient + place, mask=known[:, None] & inside[None, :], other=0.0)
    for column in range(count):
        at = (first + column).to(tl.int64)
        slope = tl.sum(tl.where(inner[:, None] == column, tile, 0.0), 0)
        step = tl.load(steps + at * N + rows, mask=inside, other=1.0)
        old = tl.load(codes + at * N + rows, mask=inside, other=0).to(tl.float32)
        factors = tl.load(metric + at * K + first + inner, mask=known & (inner >= column), other=0.0)
        diagonal = tl.sum(tl.where(inner == column, factors, 0.0), 0)
        new = _clamped(old - tl.div_rn(slope, diagonal * step), 0.0, top.to(tl.float32))
        move = (new - old) * step
        tl.store(codes + at * N + rows, new.to(tl.uint8), mask=inside)
        tl.store(moves + column * N + rows, move, mask=inside)
        tile += factors[:, None] * move[None, :]
