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

Kind = Literal["int", "asymmetric", "nf4", "fp4", "codebook"]


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
            raise InputError(f"{where}: {place}: {first['msg']}", "the file is damaged or was edited by hand") from None


class LinearSpec(Noun):
    """Format of one linear, and the arithmetic of its size.

    kind        `int`         codes of `bits` bits around zero, one 16-bit scale per `group_size` inputs
                `asymmetric`  the same with an 8-bit zero-point per group, in steps of `2**(bits - 8)` codes
                `nf4`, `fp4`  4-bit codes into a fixed table, a 32-bit scale per `group_size` weights in storage order
                `codebook`    codes into a table of `2**bits` 16-bit floats that each row has for itself; no groups
    double      `nf4` and `fp4`: scales are 8-bit codes themselves, in blocks of 256
    high_share  `int`: the share of columns that has two bits more than the others; the file says which
    """

    bits: int = Field(ge=2, le=8)
    group_size: int = Field(ge=0)
    kind: Kind = "int"
    double: bool = False
    high_share: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.group_size == 0) != (self.kind == "codebook"):
            raise ValueError("group_size must be positive, and 0 for codebook")
        if self.kind in FOUR_BIT and self.bits != 4:
            raise ValueError(f"{self.kind} has 4 bits")
        if self.double and self.kind not in FOUR_BIT:
            raise ValueError("double is for nf4 and fp4")
        if self.high_share and (self.kind != "int" or self.bits + HIGH_BITS > 8):
            raise ValueError(f"high_share is for int of at most {8 - HIGH_BITS} bits")
        return self

    @model_serializer(mode="wrap")
    def _short(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what is as usual, so that plain integers look in a file as they always have."""
        usual = {"kind": "int", "double": False, "high_share": 0.0}
        return {key: value for key, value in handler(self).items() if key not in usual or value != usual[key]}

    @property
    def label(self) -> str:
        """A short name for tables: `int3`, `nf4`, `int3+2` with high columns."""
        stem = self.kind if self.kind in FOUR_BIT else f"{self.kind}{self.bits}"
        return f"{stem}+{HIGH_BITS}" if self.high_share else stem

    def high_columns(self, columns: int) -> int:
        """How many of `columns` have two bits more."""
        return round(columns * self.high_share)

    def storage_bits(self, rows: int, columns: int) -> int:
        """True bits on disk of a `(rows, columns)` weight: every tensor that stands for it, padding included."""
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
