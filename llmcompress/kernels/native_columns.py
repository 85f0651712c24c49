"""Rounding with feedback and coordinate descent for symmetric integers by the C library, a tile of rows at a time.

What a row becomes depends neither on the rows given beside it nor on the number of threads. Everything here gives None
where it is not for the library (another device or dtype, no compiler, no room, a number that is none), and whoever asks
does it in torch, where sums have another order: single codes differ where two are nearly as good.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.kernels import compiled
from llmcompress.kernels.codes import Codes
from llmcompress.kernels.native_grid import BEST, DTYPES
from llmcompress.types import LinearSpec

JOB = struct.Struct("@18q")  # the fields of `Columns` in native/columns.c, in their order


@dataclass(frozen=True)
class Feedback:
    """How columns are rounded; groups follow whole on one another in `order` where scales are looked for on the way.

    order       (columns,)          int64, which column comes next
    upper       (columns, columns)  float32, upper Cholesky factor of the inverse Hessian, in that order
    importance  (columns,)          float32, of each column's squared error in the search for a scale, none negative
    shrinks     ranges to try, falling; empty: scales are given
    """

    order: Tensor
    upper: Tensor
    importance: Tensor
    shrinks: Sequence[float] = ()


@dataclass(frozen=True)
class Descent:
    """So many passes over codes and scales, by a symmetric float32 matrix `(columns, columns)`."""

    metric: Tensor
    sweeps: int


def rounded(
    weight: Tensor,
    spec: LinearSpec,
    scale: Tensor,
    feedback: Feedback,
    descent: Descent | None = None,
    *,
    level: int = BEST,
) -> Codes | None:
    """Codes of a weight `(rows, columns)`, float32; `scale` `(rows, groups)` is only read where none are looked for."""
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    return _run(weight, Codes(codes, scale.clone(), spec), feedback, descent, level=level)


def descended(weight: Tensor, codes: Codes, descent: Descent, *, level: int = BEST) -> Codes | None:
    """`codes`, or others that lose less against `weight` `(rows, columns)`, float32."""
    return _run(weight, Codes(codes.codes.clone(), codes.scale.clone(), codes.spec), None, descent, level=level)


def _run(
    weight: Tensor, found: Codes, feedback: Feedback | None, descent: Descent | None, *, level: int
) -> Codes | None:
    """`found`, contiguous, with what it holds written over."""
    library, _ = compiled.library()
    floats = [weight] + ([] if feedback is None else [feedback.upper, feedback.importance])
    floats += [] if descent is None else [descent.metric]
    usable = all(x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() for x in floats)
    codes, scale, spec = found.codes.contiguous(), found.scale.contiguous(), found.spec
    if library is None or not usable or scale.dtype not in DTYPES or weight.shape[1] % spec.group_size:
        return None
    floats = [x.contiguous() for x in floats]  # kept until the library has read them
    upper, importance = (floats[1], floats[2]) if feedback is not None else (None, None)
    order = None if feedback is None else feedback.order.contiguous()
    shrink = torch.tensor(() if feedback is None else feedback.shrinks, dtype=torch.float32)
    job = JOB.pack(
        *weight.shape, spec.group_size, spec.bits, floats[0].data_ptr(), _at(order), _at(upper),
        0 if descent is None else floats[-1].data_ptr(), 0 if descent is None else descent.sweeps,
        _at(importance), shrink.data_ptr(), len(shrink), scale.data_ptr(), DTYPES[scale.dtype], codes.data_ptr(),
        torch.get_num_threads(), level, compiled.team(),
    )  # fmt: skip
    return None if library.llmcompress_columns(job) else Codes(codes, scale, spec)


def _at(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
