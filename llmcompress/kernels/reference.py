"""Pack, unpack and dequantize in plain torch: the oracle every other kernel is held against.

Codes of `bits` bits are laid dense and little-endian along the input axis: code j of a row occupies
bits `[j * bits, (j + 1) * bits)` of that row's 32-bit words, and a row is padded to whole words.
"""

import numpy
import torch
from torch import Tensor

from llmcompress.spec import HIGH_BITS, WORD_BITS, ZERO_BITS

CHUNK_CODES = 1 << 19  # rows are handled in chunks of about this many codes, to bound memory


def words_per_row(columns: int, bits: int) -> int:
    """Number of int32 words that hold one row."""
    return -(-columns * bits // WORD_BITS)


def _row_chunks(rows: int, columns: int) -> list[slice]:
    step = max(CHUNK_CODES // max(columns, 1), 1)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack uint8 codes `(rows, columns)`, each below `2**bits`, into int32 `(rows, words)`."""
    rows, columns = codes.shape
    packed = numpy.zeros((rows, words_per_row(columns, bits) * 4), dtype=numpy.uint8)
    source = codes.cpu().numpy()
    octets = -(-columns // 8)  # eight codes take `bits` bytes
    for chunk in _row_chunks(rows, columns):
        padded = numpy.pad(source[chunk], ((0, 0), (0, octets * 8 - columns))).reshape(-1, octets, 8)
        together = numpy.zeros(padded.shape[:2], dtype="<u8")
        for place in range(8):
            together |= padded[:, :, place].astype("<u8") << numpy.uint64(place * bits)
        folded = together.view(numpy.uint8).reshape(-1, octets, 8)[:, :, :bits].reshape(len(padded), -1)
        width = min(folded.shape[1], packed.shape[1])
        packed[chunk, :width] = folded[:, :width]
    return torch.from_numpy(packed.view(numpy.int32))


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of `pack`: int32 `(rows, words)` to uint8 codes `(rows, columns)`, on the device of `packed`."""
    rows, octets = packed.shape[0], -(-columns // 8)  # eight codes take `bits` bytes
    wide = torch.int32 if bits <= 4 else torch.int64
    into = torch.arange(bits, dtype=wide, device=packed.device) * 8
    out_of = torch.arange(8, dtype=wide, device=packed.device) * bits
    codes = torch.empty((rows, columns), dtype=torch.uint8, device=packed.device)
    for chunk in _row_chunks(rows, columns):
        source = packed[chunk].contiguous().view(torch.uint8)
        source = torch.nn.functional.pad(source, (0, max(octets * bits - source.shape[1], 0)))[:, : octets * bits]
        together = (source.reshape(-1, octets, bits).to(wide) << into).sum(2, dtype=wide)
        apart = (together[:, :, None] >> out_of) & ((1 << bits) - 1)
        codes[chunk] = apart.view(source.shape[0], -1)[:, :columns].to(torch.uint8)
    return codes


def dequantize(codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Weights of symmetric codes: `(code - 2**(bits - 1)) * scale`, float32 `(rows, columns)`.

    codes  (rows, columns)                uint8
    scale  (rows, columns / group size)   real units per code; may be negative
    """
    rows, columns = codes.shape
    signed = codes.to(torch.float32, copy=True).sub_(float(1 << (bits - 1)))
    grouped = signed.view(rows, scale.shape[1], columns // scale.shape[1])
    return grouped.mul_(scale.to(torch.float32)[:, :, None]).view(rows, columns)


def dequantize_zeros(codes: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Weights of codes with zero-points: `(code - zero / 2**(8 - bits)) * scale`, float32 `(rows, columns)`.

    codes        (rows, columns)               uint8
    scale, zero  (rows, columns / group size)  real units per code; the zero-point, uint8, in steps of `2**(bits - 8)`
    """
    rows, columns = codes.shape
    grouped = codes.to(torch.float32).view(rows, scale.shape[1], columns // scale.shape[1])
    middle = zero.to(torch.float32)[:, :, None] / float(1 << (ZERO_BITS - bits))
    return ((grouped - middle) * scale.to(torch.float32)[:, :, None]).view(rows, columns)


def dequantize_tiers(codes: Tensor, scale: Tensor, high: Tensor, bits: int) -> Tensor:
    """Weights of symmetric codes of which the columns in `high` have a grid four times as fine over the same range.

    codes  (rows, columns)               uint8, below `2**bits`, in high columns below `2**(bits + 2)`
    scale  (rows, columns / group size)  real units per code of the coarse grid
    high   (columns,)                    bool
    """
    middle = (high * ((1 << (bits + HIGH_BITS - 1)) - (1 << (bits - 1))) + (1 << (bits - 1))).to(torch.float32)
    step = torch.where(high, 1.0 / (1 << HIGH_BITS), 1.0)
    signed = (codes.to(torch.float32) - middle) * step
    rows, columns = codes.shape
    grouped = signed.view(rows, scale.shape[1], columns // scale.shape[1])
    return (grouped * scale.to(torch.float32)[:, :, None]).view(rows, columns)


def dequantize_codebook(codes: Tensor, codebook: Tensor) -> Tensor:
    """Weights of codes `(rows, columns)` into each row's own table `(rows, 2**bits)`, float32."""
    return codebook.to(torch.float32).gather(1, codes.long())
