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
def load_words(pointer, mask, WORDS: tl.constexpr, BITS: tl.constexpr):
    """The planes of one block, `(rows, WORDS)` each; where one would do for all three, it is repeated."""
    low = tl.load(pointer, mask=mask, other=0)
    if BITS == 3:
        return low, tl.load(pointer + WORDS, mask=mask, other=0), tl.load(pointer + 2 * WORDS, mask=mask, other=0)
    else:
        return low, low, low


@triton.jit
def integer_field(planes, FIELD: tl.constexpr, BITS: tl.constexpr):
    """The codes of one field, int32 `(rows, WORDS)`."""
    if BITS != 3:
        return (planes[0].to(tl.int32) >> (FIELD * BITS)) & ((1 << BITS) - 1)
    elif FIELD < 12:
        return (planes[FIELD // 4].to(tl.int32) >> (FIELD % 4 * 4)) & 7
    else:
        top: tl.constexpr = FIELD % 4 * 4 + 3
        low = (planes[0].to(tl.int32) >> top) & 1
        middle = (planes[1].to(tl.int32) >> top) & 1
        high = (planes[2].to(tl.int32) >> top) & 1
        return low | (middle << 1) | (high << 2)


@triton.jit
def centred_fields(planes, BITS: tl.constexpr, FIELDS: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """All fields at once, less the centre, through the packed instructions of `bits.centred_ptx`."""
    if BITS == 3:
        return tl.inline_asm_elementwise(PTX, constraints(FIELDS, 3), planes, types(FIELDS, DTYPE), True, 2)
    else:
        return tl.inline_asm_elementwise(PTX, constraints(FIELDS, 1), [planes[0]], types(FIELDS, DTYPE), True, 2)


@triton.jit
def less(values, middle):
    """`values - middle`, two at a time; `middle` has one column."""
    if values.dtype == tl.bfloat16:
        text: tl.constexpr = "{.reg .b32 n; mov.b32 n, 0xbf80bf80; fma.rn.bf16x2 $0, $2, n, $1;}"
        return tl.inline_asm_elementwise(text, "=r,r,r", [values, middle], tl.bfloat16, True, 2)
    else:
        plain: tl.constexpr = "sub.rn.f16x2 $0, $1, $2;"
        return tl.inline_asm_elementwise(plain, "=r,r,r", [values, middle], tl.float16, True, 2)
