"""Few tokens against a packed weight: weights are the tall operand of the matrix instructions, tokens the narrow one.

Codes become floating point in registers, exactly; products of a group add up in float32 and meet its scale there,
once. Several programs may share a row of tiles (`SPLIT`): each leaves its partial sums, and the last to arrive adds
all of them in order, so that equal inputs give equal bits.
"""

import triton
import triton.language as tl

from llmcompress.kernels.triton.jit.parts import together
from llmcompress.kernels.triton.jit.unpack import all_fields, integer_field, less, load_words


@triton.jit
def _values(fields, table, middle, inner, FIELD: tl.constexpr, BITS: tl.constexpr, ZERO: tl.constexpr,
            TABLE: tl.constexpr, PTX: tl.constexpr):  # fmt: skip
    """Weights of one field without their scale, in the type of `table`; `middle` is the zero-point of each row."""
    if PTX != "":
        return less(fields[FIELD], middle) if ZERO else fields[FIELD]
    elif TABLE == 0:
        centred = (integer_field(fields, inner, FIELD, BITS, False) - (1 << (BITS - 1))).to(table.dtype)
        return centred - middle if ZERO else centred
    else:
        return tl.gather(table, integer_field(fields, inner, FIELD, BITS, TABLE == 1), 1)


@triton.jit
def _table(table, rows, N, TABLE: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """The values of codes for each row, `(rows, 2**bits)`; without a table, a column that only carries the type."""
    if TABLE == 0:
        return tl.zeros((rows.shape[0], 1), DTYPE)
    else:
        row = rows * (1 << BITS) if TABLE == 2 else rows * 0
        return tl.load(table + row[:, None] + tl.arange(0, 1 << BITS)[None, :]).to(DTYPE)


@triton.jit
def _middle(zero, place, inside, BITS: tl.constexpr, ZERO: tl.constexpr, DTYPE: tl.constexpr):
    """Zero-points of one group, one for each row, in codes above the centre; every one fits seven bits and a sign."""
    if ZERO:
        found = tl.load(zero + place, mask=inside, other=0).to(tl.float32) * (1.0 / (1 << (8 - BITS)))
        return (found - (1 << (BITS - 1))).to(DTYPE)[:, None]
    else:
        return tl.zeros((1, 1), DTYPE)


@triton.jit
def decode(
    x, words, scale, zero, table, out, partials, counters, M, N, K, stride,
    BITS: tl.constexpr, WORDS: tl.constexpr, FIELDS: tl.constexpr, PLANES: tl.constexpr,
    GROUP: tl.constexpr, ZERO: tl.constexpr, TABLE: tl.constexpr, BLOCKS: tl.constexpr, EVEN: tl.constexpr,
    SPLIT: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    """`out[m, n] = sum over k of x[m, k] * weight[n, k]`, for one tile of rows, one part of k, one tile of tokens.

    x         (M, K)               float16, bfloat16 or float32
    words     (N, stride)          int16, see `bits.py`
    scale     (groups, N)          any float; with GROUP 0 one for the row, without scales (TABLE 2) not read
    zero      (groups, N)          uint8, steps of `2**(bits - 8)` codes, where ZERO
    table     (1 or N, 2**bits)    float32, where TABLE is 1 or 2
    partials  (SPLIT, M, N)        float32, scratch
    counters  (tiles,)             int32 zeros, and zeros again afterwards
    """
    rows, tokens = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(2) * BM + tl.arange(0, BM)
    read, inner = tl.minimum(rows, N - 1), tl.arange(0, WORDS)
    dtype: tl.constexpr = x.dtype.element_ty
    values = _table(table, read, N, TABLE if PTX == "" else 0, BITS, dtype)
    middle = _middle(zero, read, True, BITS, ZERO and GROUP == 0, dtype)
    sums = tl.zeros((BN, BM), tl.float32)
    chunk: tl.constexpr = FIELDS if GROUP == 0 else (GROUP // WORDS if GROUP // WORDS < FIELDS else FIELDS)
    each: tl.constexpr = (BLOCKS + SPLIT - 1) // SPLIT
    for step in range(each):
        block = tl.program_id(1) * each + step
        place = words + read[:, None].to(tl.int64) * stride + block * (PLANES * WORDS) + inner[None, :]
        fields = load_words(place, inner, True if EVEN else block < BLOCKS, WORDS, BITS, TABLE == 1 and PTX == "")
        if PTX != "":
            fields = all_fields(fields, BITS, FIELDS, dtype, PTX)
        for part in tl.static_range(FIELDS // chunk):
            group = (block * FIELDS + part * chunk) * WORDS // (GROUP if GROUP > 0 else 1)
            inside = True if EVEN else (group * GROUP < K) & (read < N)
            here = middle if GROUP == 0 else _middle(zero, group * N + read, inside, BITS, ZERO, dtype)
            product = sums if GROUP == 0 else tl.zeros((BN, BM), tl.float32)
            for field in tl.static_range(part * chunk, part * chunk + chunk):
                k = (block * FIELDS + field) * WORDS + inner
                known = (tokens < M)[None, :] if EVEN else (tokens < M)[None, :] & (k < K)[:, None]
                seen = tl.load(x + tokens[None, :] * K + k[:, None], mask=known, other=0)
                weights = _values(fields, values, here, inner, field, BITS, ZERO, TABLE, PTX)
                product = tl.dot(weights, seen, product, input_precision="ieee")
            if GROUP == 0:
                sums = product
            else:
                sums += product * tl.load(scale + group * N + read, mask=inside, other=0).to(tl.float32)[:, None]
    if GROUP == 0 and TABLE != 2:
        sums *= tl.load(scale + read).to(tl.float32)[:, None]
    whole, place = (tokens[None, :] < M) & (rows[:, None] < N), tokens[None, :] * N + rows[:, None]
    sums, last = together(sums, place, whole, M * N, partials, counters, SPLIT)
    if last:
        tl.store(out + place, sums.to(out.dtype.element_ty), mask=whole)
