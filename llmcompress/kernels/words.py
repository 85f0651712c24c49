"""Packing and dequantizing by the C library where it can, else by `reference`, which it equals to the last bit."""

from torch import Tensor

from llmcompress.kernels import native_grid, reference


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 `(rows, columns)`, each below `2**bits`, in int32 words `(rows, words)` on the CPU."""
    found = native_grid.pack(codes, bits)
    return reference.pack(codes, bits) if found is None else found


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Inverse of `pack`: uint8 codes `(rows, columns)`, on the device of `packed`."""
    found = native_grid.unpack(packed, bits, columns)
    return reference.unpack(packed, bits, columns) if found is None else found


def dequantize(codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Weights float32 `(rows, columns)` of symmetric codes, with scales `(rows, groups)`."""
    found = native_grid.weights_of(codes, scale, bits)
    return reference.dequantize(codes, scale, bits) if found is None else found
