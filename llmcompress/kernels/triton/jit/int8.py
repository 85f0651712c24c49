"""8-bit codes times 8-bit codes: sums are exact integers, scales and zero-points come after them."""

import triton
import triton.language as tl

from llmcompress.kernels.triton.jit.parts import together

ROUNDER = tl.constexpr(12582912.0)  # 1.5 * 2**23: added and taken away, it leaves whole numbers, ties to even


@triton.jit
def quantize(x, scale, zero, codes, token_scale, K, STATIC: tl.constexpr, ZERO: tl.constexpr, STEPS: tl.constexpr,
             BK: tl.constexpr):  # fmt: skip
    """Codes int8 of one token: `clip(round(x / scale) + zero)`, the scale given or the largest magnitude over 127.5."""
    token, inner = tl.program_id(0).to(tl.int64), tl.arange(0, BK)
    if STATIC:
        step = tl.load(scale).to(tl.float32)
    else:
        most = tl.zeros((BK,), tl.float32)
        for part in range(STEPS):
            k = part * BK + inner
            most = tl.maximum(most, tl.abs(tl.load(x + token * K + k, mask=k < K, other=0).to(tl.float32)))
        step = tl.div_rn(tl.max(most, 0), 127.5)
        step = tl.where(step == 0, 1.0, step)
        tl.store(token_scale + token, step)
    shift = tl.load(zero).to(tl.float32) if ZERO else 0.0
    for part in range(STEPS):
        k = part * BK + inner
        value = tl.div_rn(tl.load(x + token * K + k, mask=k < K, other=0).to(tl.float32), step) + shift
        value = tl.minimum(tl.maximum(value, -128.0), 127.0) + ROUNDER - ROUNDER
        tl.store(codes + token * K + k, value.to(tl.int8), mask=k < K)


@triton.jit
def _finish(sums, x_scale, zero, scale, weight_sums, out, place, whole, rows, tokens, STATIC: tl.constexpr,
            ZERO: tl.constexpr):  # fmt: skip
    """Integer sums `(rows, tokens)` of which some are `whole`, to numbers."""
    inside, seen = tl.max(whole.to(tl.int32), 1) > 0, tl.max(whole.to(tl.int32), 0) > 0
    if ZERO:
        sums -= tl.load(zero).to(tl.int32) * tl.load(weight_sums + rows, mask=inside, other=0)[:, None]
    of_token = tl.load(x_scale + tokens * (0 if STATIC else 1), mask=seen, other=0).to(tl.float32)
    of_row = tl.load(scale + rows, mask=inside, other=0).to(tl.float32)
    numbers = sums.to(tl.float32) * (of_row[:, None] * of_token[None, :])
    tl.store(out + place, numbers.to(out.dtype.element_ty), mask=whole)


@triton.jit
def multiply(
    x, words, x_scale, zero, scale, weight_sums, out, partials, counters, M, N, K,
    STATIC: tl.constexpr, ZERO: tl.constexpr, STEPS: tl.constexpr, SPLIT: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """`out[m, n] = x_scale[m] * scale[n] * sum over k of (x[m, k] - zero) * words[n, k]`, few tokens.

    x            (M, K) int8       words     (N, K) int8
    x_scale      (M,), STATIC: (1,)   zero   (1,) int8, where ZERO
    scale        (N,)              weight_sums (N,) int32, sums of `words` over k, where ZERO
    partials     (SPLIT, M, N) int32 scratch; counters as in `decode`
    """
    rows, tokens = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(2) * BM + tl.arange(0, BM)
    read, inner = tl.minimum(rows, N - 1), tl.arange(0, BK)
    sums = tl.zeros((BN, BM), tl.int32)
    each: tl.constexpr = (STEPS + SPLIT - 1) // SPLIT
    for step in range(each):
        k = (tl.program_id(1) * each + step) * BK + inner
        known = k < K
        weights = tl.load(words + read[:, None].to(tl.int64) * K + k[None, :], mask=known[None, :], other=0)
        seen = tl.load(x + tokens[None, :] * K + k[:, None], mask=known[:, None] & (tokens < M)[None, :], other=0)
        sums = tl.dot(weights, seen, sums, out_dtype=tl.int32)
    whole, place = (tokens[None, :] < M) & (rows[:, None] < N), tokens[None, :] * N + rows[:, None]
    sums, last = together(sums, place, whole, M * N, partials, counters, SPLIT)
    if last:
        _finish(sums, x_scale, zero, scale, weight_sums, out, place, whole, rows, tokens, STATIC, ZERO)


@triton.jit
def finish(
    sums, x_scale, zero, scale, weight_sums, out, M, N,
    STATIC: tl.constexpr, ZERO: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """The same from integer sums (M, N) that a library made."""
    rows, tokens = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * BM + tl.arange(0, BM)
    whole = (tokens[None, :] < M) & (rows[:, None] < N)
    place = tokens[None, :].to(tl.int64) * N + rows[:, None]
    found = tl.load(sums + place, mask=whole, other=0)
    _finish(found, x_scale, zero, scale, weight_sums, out, place, whole, rows, tokens, STATIC, ZERO)
