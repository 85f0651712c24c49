"""The order of codes in memory, and the PTX that turns words of them into floating point.

Codes of 2, 3, 4 and 8 bits lie *planar*: a row is a chain of blocks, a block is `planes` runs of `words` int16 words,
and one word holds one code of each of several fields, so that field f of a block is the `words` consecutive codes
`block + f * words ...`. A slice of the input that meets a field is then consecutive too, and two words side by side
are a ready pair for a matrix instruction.

    bits  fields  word i of a block, field f
    2     8       bits 2f, 2f + 1
    4     4       bits 4f ... 4f + 3
    8     2       bits 8f ... 8f + 7
    3     16      nibble n of plane p holds field 4p + n in its low three bits; the highest bits of nibble n of the
                  three planes are, in order, the bits of field 12 + n: 16 codes in 48 bits, nothing wasted
    4, paired     words i and i + 1 (i even) hold, from the lowest nibble, fields 0, 0, 1, 1 and 2, 2, 3, 3 of codes i
                  and i + 1: neighbours side by side, as byte permutations look them up (one table for all rows)
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

FIELDS = {2: 8, 3: 16, 4: 4, 8: 2}
PLANES = {2: 1, 3: 3, 4: 1, 8: 1}
MANTISSA = {"bf16": 7, "fp16": 10}
PACKED = {"bf16": "bf16x2", "fp16": "f16x2"}
RUNS = {2: (64, 32, 16), 3: (32, 16), 4: (64, 32, 16), 8: (64, 32, 16)}  # longest first
WASTE = 1.04  # words stored over words needed


@dataclass(frozen=True)
class Planar:
    """How the codes of one linear lie: `words` is the length of a run, in words and in codes of one field."""

    bits: int
    words: int
    paired: bool = False

    @property
    def fields(self) -> int:
        return FIELDS[self.bits]

    @property
    def planes(self) -> int:
        return PLANES[self.bits]

    @property
    def block(self) -> int:
        """Codes of one row in one block."""
        return self.fields * self.words

    def blocks(self, columns: int) -> int:
        """Blocks of a row, the last one padded."""
        return -(-columns // self.block)


def planar(bits: int, group: int, columns: int, paired: bool = False) -> Planar | None:
    """The order for groups of `group` codes (0: the row), None where there is none that has whole runs in a group.

    The longest run whose last block wastes little; the one that wastes least where all waste more.
    """
    fits = [Planar(bits, words, paired) for words in RUNS.get(bits, ()) if _fits(group, words, FIELDS[bits] * words)]
    waste = {order: order.blocks(columns) * order.block / columns for order in fits}
    return next((order for order in fits if waste[order] <= WASTE), min(fits, key=waste.__getitem__, default=None))


def _fits(group: int, run: int, block: int) -> bool:
    return group == 0 or (group % run == 0 and (block % group == 0 or group % block == 0))


def table_ptx(values: Sequence[int]) -> str:
    """PTX from two words of paired codes to all fields: bit patterns of 16-bit floats, looked up in a table of 16.

    A byte permutation takes four codes of three bits to four of eight bytes. Four of them, for the low and the high
    bytes of both halves of the table, and one each to choose by the codes' highest bits, make four values. `nothing`
    is 0, as no lane is below the first; the assembler does not know, and so keeps the table in registers.
    """
    low, high = (bytes(value >> shift & 0xFF for value in values) for shift in (0, 8))
    words = [int.from_bytes(part[at : at + 4], "little") for part in (low, high) for at in (0, 4, 8, 12)]
    lines = [".reg .b32 nothing, code, pick, below, above, low, high" + "".join(f", t{n}" for n in range(8)) + ";"]
    lines += ["mov.u32 nothing, %lanemask_lt;", "shr.u32 nothing, nothing, 31;"]
    lines += [f"xor.b32 t{number}, nothing, 0x{word:08x};" for number, word in enumerate(words)]
    lines += ["and.b32 code, $4, 0x77777777;", "shr.u32 pick, $4, 1;"]
    lines += ["lop3.b32 pick, pick, 0x44444444, 0x32103210, 0xEA;"]
    for half in range(2):
        if half:
            lines += ["shr.u32 code, code, 16;", "shr.u32 pick, pick, 16;"]
        for name, first in (("low", 0), ("high", 4)):
            lines += [
                f"prmt.b32 below, t{first}, t{first + 1}, code;",
                f"prmt.b32 above, t{first + 2}, t{first + 3}, code;",
                f"prmt.b32 {name}, below, above, pick;",
            ]
        lines += [f"prmt.b32 ${2 * half}, low, high, 0x5140;", f"prmt.b32 ${2 * half + 1}, low, high, 0x7362;"]
    return "\n".join(["{", *lines, "}"])


def centred_ptx(bits: int, kind: str) -> str:
    """PTX from the words of all planes to all fields, two neighbours at a time, as `code - 2**(bits - 1)`, exactly.

    `kind` is `bf16` or `fp16`. A code put into the mantissa of `base` (128 or 1024) is `base + code * 2**place`; one
    fused multiply-add takes base and centre away and undoes the place. Fields that fit a mantissa together share one
    shift. Operands: `$0 ...` are the fields, the next ones the words of each plane.
    """
    fields = FIELDS[bits]
    lines = [".reg .b32 shifted, part, top, one, factor, away, fourth;", f"mov.b32 one, {_pair(1.0, kind)};"]
    if bits == 8 and kind == "bf16":
        return "\n".join(["{", *lines, *_bytes(f"${fields}"), "}"])
    stride = 4 if bits == 3 else bits
    sources = [f"${fields + plane}" for plane in range(PLANES[bits])]
    if bits == 3:
        lines += _fourth(sources)
        sources.append("fourth")
    for number, source in enumerate(sources):
        lines += _word(source, number * (16 // stride), (bits, stride), kind)
    return "\n".join(["{", *lines, "}"])


def _word(source: str, first: int, widths: tuple[int, int], kind: str) -> list[str]:
    """The fields of one word, numbered from `first`; `widths` are those of a code and of the place it has."""
    bits, stride = widths
    mantissa = MANTISSA[kind]
    lines, shift, shifted = [], 0, source
    for position in range(0, 16, stride):
        if position - shift + bits > mantissa:
            shift, shifted = position, "shifted"
            lines.append(f"shr.u32 shifted, {source}, {shift};")
        place, field = position - shift, f"${first + position // stride}"
        mask, step = ((1 << bits) - 1) << place, 2.0**-place
        lines += [
            f"lop3.b32 {field}, {shifted}, {_twice(mask)}, {_pair(2.0**mantissa, kind)}, 0xEA;",
            f"mov.b32 factor, {_pair(step, kind)};",
            f"mov.b32 away, {_pair(-(2.0**mantissa * step + (1 << (bits - 1))), kind)};",
            f"fma.rn.{PACKED[kind]} {field}, {field}, factor, away;",
        ]
    return lines


def _fourth(planes: list[str]) -> list[str]:
    """The fourth word of three: one bit from each plane for each nibble."""
    masks = (0x1111, 0x2222, 0x4444)
    lines = ["mov.b32 fourth, 0x00000000;"]
    for number, plane in enumerate(planes):
        lines.append(f"shr.u32 part, {plane}, {3 - number};")
        lines.append(f"lop3.b32 fourth, part, {_twice(masks[number])}, fourth, 0xEA;")
    return lines


def _bytes(source: str) -> list[str]:
    """Eight bits do not fit seven: `128 + low seven bits` and, from the highest bit, 0 or 128, less 256."""
    lines = [f"mov.b32 away, {_pair(-384.0, 'bf16')};"]
    for field, shifted in enumerate((source, "shifted")):
        if field:
            lines.append(f"shr.u32 shifted, {source}, 8;")
        lines += [
            f"lop3.b32 part, {shifted}, {_twice(0x7F)}, {_pair(128.0, 'bf16')}, 0xEA;",
            f"lop3.b32 top, {shifted}, {_twice(0x80)}, {_pair(128.0, 'bf16')}, 0xEA;",
            "fma.rn.bf16x2 top, top, one, away;",
            f"fma.rn.bf16x2 ${field}, part, one, top;",
        ]
    return lines


def _twice(half: int) -> str:
    return f"0x{half:04x}{half:04x}"


def _pair(value: float, kind: str) -> str:
    """Two equal 16-bit floats as a hexadecimal word; `value` is one of those they can hold."""
    if kind == "fp16":
        return _twice(struct.unpack("<H", struct.pack("<e", value))[0])
    return _twice(struct.unpack("<I", struct.pack("<f", value))[0] >> 16)
