"""nf4 and fp4: 4-bit codes into a fixed table, in blocks with a scale each; scales may be quantized once more.

The values and the order of operations are those of bitsandbytes (its own code is not used), so that codes and
scales are the same bits it would store. Blocks run through a weight in storage order, over the ends of its rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.spec import DOUBLE_BLOCK

# Quantiles of a normal distribution, eight above zero and seven below, over the largest (QLoRA, arXiv 2305.14314)
NF4 = (
    *(-1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.091050036, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
)
FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # by its three bits; the fourth is the sign
LEAST = 1e-38
LATTICE = 32767.5  # half the points that 8-bit codes are looked up on


@dataclass(frozen=True)
class DoubleScale:
    """Scales as 8-bit codes: `offset + value of code * absmax of its block of 256`.

    codes   (blocks,)               uint8
    absmax  (ceil(blocks / 256),)   float32
    offset  ()                      float32, the mean of the scales
    """

    codes: Tensor
    absmax: Tensor
    offset: Tensor

    def decode(self) -> Tensor:
        """The scales, float32 `(blocks,)`."""
        wide = self.absmax.repeat_interleave(DOUBLE_BLOCK)[: len(self.codes)]
        return dynamic_table().to(self.absmax.device)[self.codes.long()] * wide + self.offset


def table_of(kind: str) -> Tensor:
    """The sixteen values of `nf4` or `fp4`, by code, float32."""
    if kind == "nf4":
        return torch.tensor(NF4, dtype=torch.float32)
    positive = torch.tensor(FP4_TWELFTHS, dtype=torch.float32) / 12.0
    return torch.cat([positive, 0.0 - positive])  # whose zeros are both positive, as bitsandbytes has them


def dynamic_table() -> Tensor:
    """The 256 values of 8-bit dynamic codes, ascending, float32 (arXiv 1511.04561).

    Seven decades; decade i below 1 has `2**i` values of either sign, at the middles of equal steps; then 0 and 1.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1.0, (1 << decade) + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2.0
        scaled = (10.0 ** (decade - 6) * middles).tolist()
        values += [sign * value for value in scaled for sign in (1.0, -1.0)]
    return torch.tensor(sorted(values), dtype=torch.float32)


def _scaled(flat: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Values over the largest magnitude of their block, in [-1, 1], and those magnitudes; the last may be short."""
    full = len(flat) // size * size
    blocks = flat[:full].view(-1, size)
    absmax = blocks.abs().amax(1)
    scaled = torch.clamp(blocks * (1.0 / absmax.clamp_min(LEAST))[:, None], -1, 1).view(-1)
    if full < len(flat):
        last = flat[full:].abs().amax().clamp_min(LEAST)
        absmax = torch.cat([absmax, last[None]])
        scaled = torch.cat([scaled, torch.clamp(flat[full:] / last, -1, 1)])
    return scaled, absmax


def quantize_blocks(weight: Tensor, kind: str, size: int) -> tuple[Tensor, Tensor]:
    """Nearest codes of a weight, uint8 of its shape, and the largest magnitude of every block of `size`, float32."""
    scaled, absmax = _scaled(weight.float().reshape(-1), size)
    table = table_of(kind).to(weight.device)
    order = torch.argsort(table, stable=True)
    ordered = table[order]
    places = torch.bucketize(scaled, (ordered[:-1] + ordered[1:]) / 2)
    return order.to(torch.uint8)[places].view(weight.shape), absmax


def dequantize_blocks(codes: Tensor, absmax: Tensor, kind: str, size: int) -> Tensor:
    """The weights that codes of any shape and the scales of their blocks stand for, float32."""
    wide = absmax.repeat_interleave(size)[: codes.numel()].view(codes.shape)
    return table_of(kind).to(codes.device)[codes.long()] * wide


def double_quantize(absmax: Tensor) -> DoubleScale:
    """Scales `(blocks,)` less their mean as 8-bit codes, 256 to a block.

    As in bitsandbytes on CPU, a value is looked up from the nearest of 65536 points between -1 and 1; where it lies
    within 1/65536 of the border of two codes it may get the other, which is further away by as much.
    """
    offset = absmax.mean()
    left = absmax - offset
    blocks = torch.nn.functional.pad(left, (0, -len(left) % DOUBLE_BLOCK)).view(-1, DOUBLE_BLOCK)
    largest = blocks.abs().amax(1)
    scaled = torch.clamp(blocks * (1.0 / largest.clamp_min(LEAST))[:, None], -1, 1).view(-1)[: len(left)]
    points = ((scaled + 1.0) * LATTICE + 0.5).long() / LATTICE - 1.0
    table = dynamic_table().to(absmax.device)
    codes = torch.bucketize(points, (table[:-1] + table[1:]) / 2).to(torch.uint8)
    return DoubleScale(codes, largest, offset)


def pack_nibbles(codes: Tensor, kind: str) -> Tensor:
    """Codes as bytes, uint8 `(ceil(codes / 2), 1)`, the first of a pair in the upper half."""
    flat = codes.reshape(-1)
    if len(flat) % 2:
        zero = table_of(kind).abs().argmin().to(torch.uint8).to(flat.device)
        flat = torch.cat([flat, zero[None]])
    return ((flat[::2] << 4) | flat[1::2])[:, None]


def unpack_nibbles(packed: Tensor, rows: int, columns: int) -> Tensor:
    """Inverse of `pack_nibbles`: uint8 codes `(rows, columns)`."""
    flat = packed.reshape(-1)
    return torch.stack([flat >> 4, flat & 15], dim=1).view(-1)[: rows * columns].view(rows, columns)
