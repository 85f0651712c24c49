"""Where the C library puts tensors: run by `Forker.run(..., call="tests.heap_cases:NAME")`, on a heap without holes."""

import ctypes

import torch

from llmcompress.model.heap import map_large_tensors

IS_MMAPPED = 2  # of the flags in the size that glibc keeps before what it hands out


def mapped(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a mapping of its own."""
    return bool(ctypes.c_size_t.from_address(tensor.data_ptr() - ctypes.sizeof(ctypes.c_size_t)).value & IS_MMAPPED)


def large_tensors() -> int:
    """Those that the heap would serve once others of their size were freed."""
    map_large_tensors()
    for size in (4 << 20, 16 << 20, 31 << 20):  # each would raise glibc's own threshold above the next
        assert mapped(torch.empty(size, dtype=torch.uint8).fill_(1))
        assert mapped(torch.empty(3 << 20, dtype=torch.uint8))
    assert not mapped(torch.empty(1 << 20, dtype=torch.uint8))
    return 0
