"""The Walsh-Hadamard transform of consecutive columns, a block each: what rotates inputs while a model runs."""

import math

import torch
from torch import Tensor


def transformed(values: Tensor, block: int) -> Tensor:
    """Every `block` consecutive columns of `(..., columns)` times the orthogonal Hadamard matrix of that order.

    block  a power of two that divides the columns; log2 of it additions for each value

    The matrix is symmetric and its own inverse. The dtype stays what it is.
    """
    shape = values.shape
    found, size = values.reshape(-1, block), 1
    while size < block:
        pairs = found.view(-1, block // (2 * size), 2, size)
        left, right = pairs.unbind(2)
        found = torch.stack((left + right, left - right), 2).view(-1, block)
        size *= 2
    return (found / math.sqrt(block)).view(shape)


def block_of(columns: int) -> int:
    """The largest power of two that divides a number of columns."""
    return columns & -columns
