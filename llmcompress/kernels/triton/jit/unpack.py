"""From words to fields: integers, or floating point less the centre."""

import triton
import triton.language as tl


@triton.constexpr_function
def constraints(fields, planes):
    """Operands of the assembly: a register for each field, then one for each plane."""
    return ",".join(["=r"] * fields + ["r"] * planes)


@triton.constexpr_function
def types(fields, dtype):
    """Its results."""
    return (dtype,) * fields


@triton.jit
def load_words(pointer, inner, mask, WORDS: tl.constexpr, BITS: tl.constexpr, PAIRED: tl.constexpr):
    """What holds the codes of one block, `(rows, WORDS)` each: three planes, both words of a pair, or one thrice."""
    if BITS == 3:
        low, middle = tl.load(pointer, mask=mask, other=0), tl.load(pointer + WORDS, mask=mask, other=0)
        return low, middle, tl.load(pointer + 2 * WORDS, mask=mask, other=0)
    elif PAIRED:
        even = pointer - (inner & 1)[None, :]
        low, high = tl.load(even, mask=mask, other=0), tl.load(even + 1, mask=mask, other=0)
        return low, high, high
    else:
        low = tl.load(pointer, mask=mask, other=0)
        return low, low, low


@triton.jit
def integer_field(words, inner, FIELD: tl.constexpr, BITS: tl.constexpr, PAIRED: tl.constexpr):
    """The codes of one field, int32 `(rows, WORDS)`."""
    if PAIRED:
        return (words[FIELD // 2].to(tl.int32) >> (FIELD % 2 * 8 + (inner & 1) * 4)[None, :]) & 15
    elif BITS != 3:
        return (words[0].to(tl.int32) >> (FIELD * BITS)) & ((1 << BITS) - 1)
    elif FIELD < 12:
        return (words[FIELD // 4].to(tl.int32) >> (FIELD % 4 * 4)) & 7
    else:
        top: tl.constexpr = FIELD % 4 * 4 + 3
        low = (words[0].to(tl.int32) >> top) & 1
        middle = (words[1].to(tl.int32) >> top) & 1
        high = (words[2].to(tl.int32) >> top) & 1
        return low | (middle << 1) | (high << 2)


@triton.jit
def all_fields(words, BITS: tl.constexpr, FIELDS: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """The values of all fields at once, through the assembly of `bits.py`."""
    if BITS == 3:
        return tl.inline_asm_elementwise(PTX, constraints(FIELDS, 3), words, types(FIELDS, DTYPE), True, 2)
    else:
        return tl.inline_asm_elementwise(PTX, constraints(FIELDS, 1), [words[0]], types(FIELDS, DTYPE), True, 2)


@triton.jit
def less(values, middle):
    """`values - middle`, two at a time; `middle` has one column."""
    if values.dtype == tl.bfloat16:
        text: tl.constexpr = "{.reg .b32 n; mov.b32 n, 0xbf80bf80; fma.rn.bf16x2 $0, $2, n, $1;}"
        return tl.inline_asm_elementwise(text, "=r,r,r", [values, middle], tl.bfloat16, True, 2)
    else:
        plain: tl.constexpr = "sub.rn.f16x2 $0, $1, $2;"
        return tl.inline_asm_elementwise(plain, "=r,r,r", [values, middle], tl.float16, True, 2)
