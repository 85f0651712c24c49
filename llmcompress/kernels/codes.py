"""A quantized linear in memory: the one carrier of tensors between a quantizer, a file and whoever reads it."""

from dataclasses import dataclass

from torch import Tensor

from llmcompress.kernels import fourbit, reference, words
from llmcompress.kernels.inputs import FLOAT8, InputQuantizer
from llmcompress.spec import FOUR_BIT, LinearSpec


@dataclass(frozen=True)
class Codes:
    """Codes of one linear, and what turns them into weights.

    codes     (rows, columns)               uint8, below 2**bits; in high columns below 2**(bits + 2); `fp8`: its bytes
    scale     (rows, columns / group size)  `int`, `asymmetric`, `int8`, `fp8`: in the dtype it is stored in
              (blocks,)                     `nf4` and `fp4`: float32, in storage order
              (rows, 0)                     `codebook`: nothing
    zero      (rows, columns / group size)  `asymmetric`: uint8, in steps of 2**(bits - 8) codes
    codebook  (rows, 2**bits)               `codebook`: float16
    high      (columns,)                    bool, the columns with two bits more, where there are any
    double    8-bit codes of the scale, where it is stored so; `scale` is what they stand for
    up        (rows, rank)                  in the dtype of scales, where a correction `up @ down` is added
    down      (rank, columns)               the same
    inputs    what rounds the inputs of the linear, where the format says that they are rounded
    """

    codes: Tensor
    scale: Tensor
    spec: LinearSpec
    zero: Tensor | None = None
    codebook: Tensor | None = None
    high: Tensor | None = None
    double: fourbit.DoubleScale | None = None
    inputs: InputQuantizer | None = None
    up: Tensor | None = None
    down: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The weights a reader of the file will see, float32 `(rows, columns)`."""
        change = self.correction()
        return self._of_codes() if change is None else self._of_codes() + change

    def correction(self) -> Tensor | None:
        """What is added to the weights that the codes stand for, float32 `(rows, columns)`; None where nothing is."""
        return None if self.up is None or self.down is None else self.up.float() @ self.down.float()

    def _of_codes(self) -> Tensor:
        spec = self.spec
        if spec.kind in FOUR_BIT:
            return fourbit.dequantize_blocks(self.codes, self.scale, spec.kind, spec.group_size)
        if spec.kind == "fp8":
            return self.codes.view(FLOAT8).float() * self.scale.float()
        if self.codebook is not None:
            return reference.dequantize_codebook(self.codes, self.codebook)
        if self.zero is not None:
            return reference.dequantize_zeros(self.codes, self.scale, self.zero, spec.bits)
        if self.high is not None:
            return reference.dequantize_tiers(self.codes, self.scale, self.high, spec.bits)
        return words.dequantize(self.codes, self.scale, spec.bits)
