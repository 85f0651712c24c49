"""Where the C library puts tensors: run by `Forker.run(..., call="tests.heap_cases:NAME")`, on a heap without holes."""

import ctypes
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llmcompress.compress.descent import metric_of
from llmcompress.compress.feedback import inverse_factor
from llmcompress.compress.rounding import Seen
from llmcompress.compress.sizes import FACTOR, FACTORS
from llmcompress.compress.targets import Targets
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


def anonymous() -> int:
    """RssAnon of this process in bytes."""
    return int(re.findall(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) << 10


def highest(work: Callable[[], Any]) -> tuple[int, Any]:
    """Anonymous memory that a piece of work took at most, and what it gave, which is part of it."""
    done, found, before = threading.Event(), [0], anonymous()

    def watch() -> None:
        while not done.wait(0.001):
            found[0] = max(found[0], anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    given = work()
    done.set()
    watcher.join()
    return max(found[0], anonymous()) - before, given


def factors() -> int:
    """What comes of a Hessian takes what the forecast says, and nothing of its size beside."""
    map_large_tensors()
    columns = 1536
    x = torch.randn(columns, 2 * columns)
    seen = Seen((x @ x.T) / 2, 9999, None)
    order, square, slack = torch.randperm(columns), columns**2, 12 << 20
    inverse_factor(seen.hessian, order, 0.01)  # the libraries' own rooms are there from here on
    taken, (factor, _) = highest(lambda: inverse_factor(seen.hessian, order, 0.01))
    assert taken <= FACTOR * square + slack, taken
    taken, metric = highest(lambda: metric_of(seen.hessian, 0.01))
    assert taken <= FACTORS * square // 2 + slack, taken
    del factor, metric
    weight, term = torch.randn(64, columns), torch.randn(64, columns)
    taken, _ = highest(lambda: Targets(seen, 0.01, 0.5).of(weight, term))
    assert taken <= FACTORS * square + slack, taken
    taken, _ = highest(lambda: seen.finite)
    assert taken <= slack // 2, taken
    return 0
