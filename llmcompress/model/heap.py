"""Give the memory of tensors back to the system once they are let go.

glibc serves requests below a threshold from its heap, and raises that threshold, up to 32 MB, to the size of whatever
is freed. A hole is not taken again by a tensor of the size that left it, because tensors are aligned, so the heap of a
run that streams blocks grows with their number. With a threshold that stays where it is, larger tensors are mappings
of their own and leave no holes; those of smaller ones are given back when a block is freed.
"""

import ctypes
import os
import sys
from collections.abc import MutableMapping
from functools import cache
from typing import Any

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # names of parameters in glibc's malloc.h
LARGE_BYTES = 2 << 20  # tensors from here on are mapped
TOP_BYTES = 64 << 20  # at most so much is kept at the end of the heap


def use_huge_pages(environment: MutableMapping[str, str] = os.environ) -> None:
    """Ask torch for pages of 2 MiB: mapping a large tensor costs a fifth of the time then. Only before its first one.

    What the environment says of it already stays.
    """
    environment.setdefault("THP_MEM_ALLOC_ENABLE", "1")


@cache
def _library() -> Any:
    """The C library where it is glibc, or None."""
    library = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    return library if hasattr(library, "gnu_get_libc_version") else None


def map_large_tensors() -> bool:
    """Have tensors of 2 MiB and more mapped one by one in this process; returns whether that was possible.

    With another C library than glibc nothing changes. Calling it again does no harm.
    """
    library = _library()
    return library is not None and bool(
        library.mallopt(MMAP_THRESHOLD, LARGE_BYTES) and library.mallopt(TRIM_THRESHOLD, TOP_BYTES)
    )


def give_back() -> None:
    """Give the holes of the heap back to the system, where that is possible."""
    if _library() is not None:
        _library().malloc_trim(0)
