"""What a stored linear looks like: its format, and the true size of it. The base of every noun is here too."""

import hashlib
import json
from typing import Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from llmcompress.errors import InputError

SCALE_BITS = 16
WORD_BITS = 32
SHAPE_BITS = 2 * 64  # `weight_shape` is two int64
ZERO_BITS = 8
HIGH_BITS = 2  # what high-impact columns have more than the others
DOUBLE_BLOCK = 256  # scales that share a scale of their own
STATE_BYTES = {False: 96, True: 192}  # of the JSON record of a 4-bit linear, padded; by `double`
FOUR_BIT = ("nf4", "fp4")
GROUPED = ("int", "asymmetric")  # the kinds whose group size is the recipe's

PACKED_KINDS = (*GROUPED, "codebook")  # what can have a low-rank correction beside its codes
PER_ROW = ("int8", "fp8")  # one byte for each weight and one scale for each row: what integer and float8 hardware reads

InputsWord = Literal[
    "none", "int8", "int8-symmetric", "int8-token", "fp8", "fp8-token", "int4", "int4-symmetric", "int4-token"
]
Kind = Literal["int", "asymmetric", "nf4", "fp4", "codebook", "int8", "fp8"]


class Noun(BaseModel):
    """Base of every noun: immutable, no unknown fields, no silent conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def digest(self) -> str:
        """sha256 of the canonical JSON of this value."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @classmethod
    def parse(cls, text: str | bytes, where: str) -> Self:
        """Read from JSON. Raises InputError naming `where` and the first offending place."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "top level"
            hint = "the file is damaged, was edited by hand, or is of another version of llmcompress"
            raise InputError(f"{where}: {place}: {first['msg']}", hint) from None


class InputSpec(Noun):
    """How what a linear reads is rounded before it is multiplied.

    kind       `int`: codes of `bits` bits; `fp8`: float8_e4m3fn
    scale      `tensor`: one for everything, from calibration; `token`: each token's own, from its largest magnitude
    symmetric  whether 0 is code 0; otherwise there is a zero-point, also from calibration
    hadamard   how many inputs a Hadamard matrix mixes before they are rounded, a power of two; none where 0. The stored
               weight is that of the mixed inputs
    """

    bits: Literal[4, 8] = 8
    kind: Literal["int", "fp8"] = "int"
    scale: Literal["tensor", "token"] = "tensor"
    symmetric: bool = True
    hadamard: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.hadamard & (self.hadamard - 1):
            raise ValueError("hadamard is a power of two")
        if self.kind == "fp8" and self.bits != 8:
            raise ValueError("fp8 has 8 bits")
        if not self.symmetric and (self.kind == "fp8" or self.scale == "token"):
            raise ValueError("a zero-point is for integers with one scale")
        return self

    @model_serializer(mode="wrap")
    def _short(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without a rotation where there is none, as such formats have always looked in a file."""
        return {key: value for key, value in handler(self).items() if key != "hadamard" or value}

    @property
    def storage_bits(self) -> int:
        """Bits on disk of the scale and the zero-point."""
        static = SCALE_BITS if self.scale == "tensor" else 0
        return static if self.symmetric else static + ZERO_BITS

    @property
    def label(self) -> str:
        """Its name in `quantize.inputs`, and the rotation before it where there is one."""
        plain = self.model_copy(update={"hadamard": 0})
        name = next(name for name, spec in INPUTS.items() if spec == plain)
        return f"{name} hadamard{self.hadamard}" if self.hadamard else name


INPUTS = {
    "int8": InputSpec(symmetric=False),
    "int8-symmetric": InputSpec(),
    "int8-token": InputSpec(scale="token"),
    "fp8": InputSpec(kind="fp8"),
    "fp8-token": InputSpec(kind="fp8", scale="token"),
    "int4": InputSpec(bits=4, symmetric=False),
    "int4-symmetric": InputSpec(bits=4),
    "int4-token": InputSpec(bits=4, scale="token"),
}


class LinearSpec(Noun):
    """Format of one linear, and the arithmetic of its size.

    kind        `int`         codes of `bits` bits around zero, one 16-bit scale per `group_size` inputs
                `asymmetric`  the same with an 8-bit zero-point per group, in steps of `2**(bits - 8)` codes
                `nf4`, `fp4`  4-bit codes into a fixed table, a 32-bit scale per `group_size` weights in storage order
                `codebook`    codes into a table of `2**bits` 16-bit floats that each row has for itself; no groups
                `int8`        8-bit codes around zero, a 16-bit scale per row; `group_size` is the number of inputs
                `fp8`         the same with the 256 values of float8_e4m3fn
    double      `nf4` and `fp4`: scales are 8-bit codes themselves, in blocks of 256
    high_share  `int`: the share of columns that has two bits more than the others; the file says which
    inputs      how what the linear reads is rounded; not at all where None
    rank        of the low-rank correction added to the codes' weight, two 16-bit factors; none where 0
    """

    bits: int = Field(ge=2, le=8)
    group_size: int = Field(ge=0)
    kind: Kind = "int"
    double: bool = False
    high_share: float = Field(default=0.0, ge=0, lt=1)
    inputs: InputSpec | None = None
    rank: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.group_size == 0) != (self.kind == "codebook"):
            raise ValueError("group_size must be positive, and 0 for codebook")
        if self.kind in FOUR_BIT and self.bits != 4:
            raise ValueError(f"{self.kind} has 4 bits")
        if self.kind in PER_ROW and self.bits != 8:
            raise ValueError(f"{self.kind} has 8 bits")
        if self.double and self.kind not in FOUR_BIT:
            raise ValueError("double is for nf4 and fp4")
        if self.high_share and (self.kind != "int" or self.bits + HIGH_BITS > 8):
            raise ValueError(f"high_share is for int of at most {8 - HIGH_BITS} bits")
        if self.rank and self.kind not in PACKED_KINDS:
            raise ValueError(f"rank is for {', '.join(PACKED_KINDS)}")
        return self

    @model_serializer(mode="wrap")
    def _short(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what is as usual, so that plain integers look in a file as they always have."""
        usual = {"kind": "int", "double": False, "high_share": 0.0, "inputs": None, "rank": 0}
        return {key: value for key, value in handler(self).items() if key not in usual or value != usual[key]}

    @property
    def label(self) -> str:
        """A short name for tables: `int3`, `nf4`, `int3+2` with high columns, `int3 r8` with a correction,
        `int4 x int8-token` on rounded inputs.
        """
        stem = self.kind if self.kind in (*FOUR_BIT, "fp8") else f"{self.kind}{self.bits}"
        stem = "int8 rows" if self.kind == "int8" else stem
        stem = f"{stem}+{HIGH_BITS}" if self.high_share else stem
        stem = f"{stem} r{self.rank}" if self.rank else stem
        return f"{stem} x {self.inputs.label}" if self.inputs else stem

    @property
    def integer(self) -> bool:
        """Whether the product with its inputs is one of 8-bit integers, with nothing to scale but the sums."""
        return self.kind == "int8" and self.inputs is not None and self.inputs.kind == "int"

    @property
    def plain(self) -> "LinearSpec":
        """The format of the codes alone: nothing rounded before them, nothing added after them."""
        return self.model_copy(update={"inputs": None, "rank": 0})

    def rank_of(self, rows: int, columns: int) -> int:
        """The rank of the correction of a `(rows, columns)` weight, which has no higher one than its sides."""
        return min(self.rank, rows, columns)

    def high_columns(self, columns: int) -> int:
        """How many of `columns` have two bits more."""
        return round(columns * self.high_share)

    def storage_bits(self, rows: int, columns: int) -> int:
        """True bits on disk of a `(rows, columns)` weight: every tensor that stands for it, padding included."""
        factors = self.rank_of(rows, columns) * (rows + columns) * SCALE_BITS
        return self._weight_storage(rows, columns) + factors + (self.inputs.storage_bits if self.inputs else 0)

    def _weight_storage(self, rows: int, columns: int) -> int:
        if self.kind in PER_ROW:
            return rows * (columns * 8 + SCALE_BITS)
        if self.kind in FOUR_BIT:
            return self._four_bit_storage(rows * columns)
        high = self.high_columns(columns)
        row = _words(columns - high, self.bits) + _words(high, self.bits + HIGH_BITS)
        if self.kind == "codebook":
            return rows * (row + (1 << self.bits) * SCALE_BITS) + SHAPE_BITS
        groups = columns // self.group_size
        row += groups * (SCALE_BITS + (ZERO_BITS if self.kind == "asymmetric" else 0))
        mask = 8 * -(-columns // 8) if high else 0
        return rows * row + mask + SHAPE_BITS

    def _four_bit_storage(self, weights: int) -> int:
        blocks = -(-weights // self.group_size)
        fixed = 16 * 32 + 8 * STATE_BYTES[self.double]  # the table of values, and a record of type and shape
        scales = blocks * 8 + -(-blocks // DOUBLE_BLOCK) * 32 + 256 * 32 if self.double else blocks * 32
        return 8 * -(-weights // 2) + scales + fixed

    def bits_per_weight(self, rows: int, columns: int) -> float:
        """`storage_bits` over the number of weights."""
        return self.storage_bits(rows, columns) / (rows * columns)


def _words(columns: int, bits: int) -> int:
    """Bits of one row of codes, padded to whole words."""
    return -(-columns * bits // WORD_BITS) * WORD_BITS
