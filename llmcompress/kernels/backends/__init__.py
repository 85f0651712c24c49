"""Ways to multiply with a packed weight, one a file; which one does it, and how a user decides that.

A backend has three functions:

    why_not(spec, rows, columns, *, tokens, dtype, device) -> str | None
        None where it can do the case, else the reason in words that fit after "cannot do this: "
    prepare(tensors, spec) -> dict[str, Tensor]
        what it needs in memory, from the tensors of the file, by the ends of their names (`kernels/stored.py`);
        those it can use as they are it hands on as they are
    linear(x, prepared, spec, rows, columns) -> Tensor
        x (tokens, columns) in float32, bfloat16 or float16 -> (tokens, rows) in the same dtype

One more, where a call is so quick that finding the backend counts:

    bind(prepared, spec, rows, columns) -> call   call(x) of x (..., columns) gives (..., rows), or None where it cannot

Two more, where weights of one format that read the same input can be multiplied as one:

    join(weights) -> dict[str, Tensor]           what it needs for all, from what `prepare` made of each
    part(joined, first, last) -> dict[str, Tensor]   what it needs for some of the rows

The first of its device's `ORDER` that can do a case does it. `LLMCOMPRESS_BACKEND=NAME`, or `use("NAME")` in a program,
leaves that one alone; where it cannot, it says why.
"""

import os
from functools import lru_cache
from types import ModuleType, TracebackType

import torch

from llmcompress.errors import InputError
from llmcompress.plugins import available, find
from llmcompress.spec import LinearSpec

VARIABLE = "LLMCOMPRESS_BACKEND"
ORDER = {"cpu": ("native_cpu", "torch_cpu", "reference"), "cuda": ("triton", "reference")}
ANYWHERE = ("reference",)


class use:
    """Only this backend from now on, or with None again the best; in a `with`, until its end.

    Raises InputError for a name that no backend has.
    """

    def __init__(self, name: str | None) -> None:
        self._before = os.environ.get(VARIABLE)
        if name is not None:
            find(__name__, name)
        self._set(name)

    @staticmethod
    def _set(name: str | None) -> None:
        if name is None:
            os.environ.pop(VARIABLE, None)
        else:
            os.environ[VARIABLE] = name

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._set(self._before)


@lru_cache(maxsize=1024)
def spec_of(form: str) -> LinearSpec:
    """The format that a spec's JSON stands for: what an operator is given."""
    return LinearSpec.parse(form, "format")


def named(name: str) -> ModuleType:
    """The backend of that name."""
    return find(__name__, name)


def forced() -> str | None:
    """The backend that a user asks for, where one does."""
    return os.environ.get(VARIABLE)


def choose(form: str, rows: int, columns: int, x: torch.Tensor) -> ModuleType:
    """The backend that multiplies `x` (..., columns) with a weight (rows, columns) of a format, given as JSON.

    Raises InputError with the reason where the one that was asked for cannot.
    """
    return _choose(forced(), form, (rows, columns, x.numel() // columns), x.dtype, x.device.type)


@lru_cache(maxsize=8192)
def _choose(only: str | None, form: str, size: tuple[int, int, int], dtype: torch.dtype, device: str) -> ModuleType:
    rows, columns, tokens = size
    spec = spec_of(form)
    names = available(__name__)
    wanted = (only,) if only else [n for n in ORDER.get(device, ANYWHERE) if n in names]
    for name in wanted:
        backend = find(__name__, name)
        reason = backend.why_not(spec, rows, columns, tokens=tokens, dtype=dtype, device=device)
        if reason is None:
            return backend
    raise InputError(
        f"backend {wanted[-1]} cannot do this: {reason}",
        f"unset {VARIABLE}, or choose one of: {', '.join(names)}",
    )
