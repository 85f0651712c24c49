"""A strip of rows from packed codes to floating point, for a matrix product of many tokens."""

import triton
import triton.language as tl

from llmcompress.kernels.triton.jit.unpack import integer_field, load_words


@triton.jit
def _weights(codes, rows, k, known, scale, zero, table, N, GROUP: tl.constexpr, ZERO: tl.constexpr,
             TABLE: tl.constexpr, BITS: tl.constexpr):  # fmt: skip
    """Float32 weights of codes `(rows, k)`; `k` is a row of columns of which those in `known` exist."""
    if TABLE == 0:
        middle = tl.full((1, 1), 1 << (BITS - 1), tl.float32)
        weights = codes.to(tl.float32)
    else:
        place = codes + rows[:, None] * (1 << BITS) if TABLE == 2 else codes
        weights = tl.load(table + place)
    if TABLE != 2:
        group = k // GROUP if GROUP > 0 else k * 0
        place = tl.where(known, group, 0)[None, :] * N + rows[:, None]
        if ZERO:
            middle = tl.load(zero + place).to(tl.float32) * (1.0 / (1 << (8 - BITS)))
        if TABLE == 0:
            weights -= middle
        weights *= tl.load(scale + place).to(tl.float32)
    return weights


@triton.jit
def dequantize_planar(
    words, scale, zero, table, out, first, last, N, K, stride,
    BITS: tl.constexpr, WORDS: tl.constexpr, FIELDS: tl.constexpr, PLANES: tl.constexpr,
    GROUP: tl.constexpr, ZERO: tl.constexpr, TABLE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Rows `first ... last - 1` of one block of columns to `out` (rows, K); operands as in `decode`."""
    rows, inner = first + tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, WORDS)
    read = tl.minimum(rows, last - 1)
    block = tl.program_id(1)
    place = words + read[:, None].to(tl.int64) * stride + block * (PLANES * WORDS) + inner[None, :]
    held = load_words(place, inner, True, WORDS, BITS, TABLE == 1)
    for field in tl.static_range(FIELDS):
        k = (block * FIELDS + field) * WORDS + inner
        codes = integer_field(held, inner, field, BITS, TABLE == 1)
        weights = _weights(codes, read, k, k < K, scale, zero, table, N, GROUP, ZERO, TABLE, BITS)
        to = out + (rows - first)[:, None].to(tl.int64) * K + k[None, :]
        tl.store(to, weights.to(out.dtype.element_ty), mask=(rows < last)[:, None] & (k < K)[None, :])


@triton.jit
def dequantize_dense(
    words, scale, zero, table, out, first, last, N, K, stride,
    BITS: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr, TABLE: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The same from words as they lie in a file: code k is `BITS` bits from bit `k * BITS` of a row's int32 words."""
    rows, k = first + tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * BK + tl.arange(0, BK)
    read, bit = tl.minimum(rows, last - 1), tl.minimum(k, K - 1) * BITS
    place = words + read[:, None].to(tl.int64) * stride + (bit >> 5)[None, :]
    shift = (bit & 31)[None, :]
    low = tl.load(place).to(tl.uint32, bitcast=True) >> shift
    high = tl.load(place + 1, mask=shift + BITS > 32, other=0).to(tl.uint32, bitcast=True)
    codes = ((low | (high << ((32 - shift) & 31))) & ((1 << BITS) - 1)).to(tl.int32)
    weights = _weights(codes, read, k, k < K, scale, zero, table, N, GROUP, ZERO, TABLE, BITS)
    to = out + (rows - first)[:, None].to(tl.int64) * K + k[None, :]
    tl.store(to, weights.to(out.dtype.element_ty), mask=(rows < last)[:, None] & (k < K)[None, :])
