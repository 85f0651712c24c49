"""Products of 8-bit integers, exact: what a linear with 8-bit weights and integer inputs computes.

With codes `q` of the inputs around a zero-point `z`, `sum_j (q_j - z) w_j = sum_j q_j w_j - z sum_j w_j`: the sums over
a row of weights are known beforehand, and scales are applied once, to the result.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.kernels.inputs import InputQuantizer

MOST_COLUMNS = (1 << 31) // (1 << 14) - 1  # products of up to 2**14 in size, summed in 32 bits


def exact_matmul(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right.T` of int8 `(tokens, columns)` and `(rows, columns)`, without any rounding.

    Returns int32 `(tokens, rows)`, or int64 where the sum over so many columns may not fit.
    """
    if left.device.type == "cpu" and 1 < left.shape[1] <= MOST_COLUMNS:  # torch 2.13 is wrong for a single column
        return torch._int_mm(left, right.T)
    # elsewhere the fast product has conditions on shapes; sums of whole numbers below 2**53 are exact in float64
    return (left.double() @ right.double().T).long()


@dataclass(frozen=True)
class IntegerWeight:
    """A weight as integers.

    codes  (rows, columns)  int8
    scale  (rows,)          float32
    sums   (rows,)          int64, of the codes of each row
    """

    codes: Tensor
    scale: Tensor
    sums: Tensor

    @classmethod
    def of(cls, codes: Tensor, scale: Tensor) -> "IntegerWeight":
        """From unsigned 8-bit codes `(rows, columns)` around 128 and the scale of each row, `(rows, 1)`."""
        signed = (codes.to(torch.int16) - 128).to(torch.int8)
        return cls(signed, scale.float().flatten(), signed.sum(1, dtype=torch.int64))

    def multiply(self, inputs: Tensor, quantizer: InputQuantizer) -> Tensor:
        """The product with rounded inputs `(..., columns)`: float32 `(..., rows)`, summed in integers."""
        codes, scale = quantizer.codes(inputs)
        flat = codes.flatten(0, -2).to(torch.int8)
        total = exact_matmul(flat, self.codes)
        if quantizer.zero is not None:
            total = total.long() - quantizer.zero.to(total.device).long() * self.sums
        return total.view(*inputs.shape[:-1], -1).float() * (scale * self.scale)
