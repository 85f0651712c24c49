"""Memory in pages of two megabytes, where Linux has them: reading then waits for fewer translations of addresses."""

import ctypes
import sys
from functools import cache
from typing import Any

from torch import Tensor

HUGE = 2 << 20
ADVICE = (14, 25)  # MADV_HUGEPAGE: pages that are still to come; MADV_COLLAPSE: those that are there


@cache
def _madvise() -> Any:
    """The function of the C library, or None."""
    if sys.platform != "linux":
        return None
    try:
        found = ctypes.CDLL(None).madvise
    except (AttributeError, OSError):
        return None
    found.argtypes, found.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return found


def in_huge_pages(tensor: Tensor) -> None:
    """Ask the system for huge pages under a tensor on CPU; it may not have any.

    Contents, addresses and the memory taken stay what they are: only pages that lie wholly inside are asked for. What
    is still in a file comes in huge pages when it is read, what is in memory is moved into them.
    """
    if tensor.device.type != "cpu" or (madvise := _madvise()) is None:
        return
    first, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
    begin = -(-first // HUGE) * HUGE
    length = (first + size - begin) // HUGE * HUGE
    if length > 0:
        for advice in ADVICE:
            madvise(begin, length, advice)
