"""Matrix products with packed weights on NVIDIA GPUs, in Triton, which is imported when the first one is asked for.

`why_not` says whether a linear can be handled, `prepare` brings its tensors into the order that kernels read, `linear`
multiplies. Up to 256 tokens a kernel reads the codes themselves; beyond, rows become floating point in strips that
a library's matrix product takes. `docs/kernels.md` has the layouts and the arithmetic.
"""

import importlib.util
import os
from collections.abc import Mapping

import torch
from torch import Tensor

from llmcompress.kernels.triton.layout import join, packing_of, part, prepare
from llmcompress.spec import LinearSpec

__all__ = ["join", "linear", "part", "prepare", "rounds_columns", "why_not"]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
KINDS = ("int", "asymmetric", "nf4", "fp4", "codebook")
OLDEST = (8, 0)  # compute capability: bfloat16 in matrix instructions, packed multiply-add


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def why_not(spec: LinearSpec, rows: int, columns: int, *, tokens: int, dtype: torch.dtype, device: str) -> str | None:
    """Why these kernels cannot multiply `tokens` inputs with a `(rows, columns)` weight; None where they can."""
    if spec.kind not in KINDS:
        return f"the format is {spec.kind}"
    if spec.high_columns(columns):
        return "some columns have two bits more"
    if spec.kind != "codebook" and columns % spec.group_size:
        return f"rows of {columns} weights are not whole groups of {spec.group_size}"
    if dtype not in DTYPES:
        return f"inputs are {dtype}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return _no_device(device)


def _no_device(device: str) -> str | None:
    if interpreted():
        return None
    if not device.startswith("cuda"):
        return f"it is for NVIDIA GPUs, not {device}"
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU"
    return "the GPU is older than compute capability 8.0" if torch.cuda.get_device_capability(device) < OLDEST else None


def rounds_columns(where: Tensor) -> bool:
    """Whether the kernels of `columns` can be used for float32 tensors that lie where this one does."""
    there = importlib.util.find_spec("triton") is not None and _no_device(str(where.device)) is None
    return there and where.dtype == torch.float32


def linear(x: Tensor, prepared: Mapping[str, Tensor], spec: LinearSpec, rows: int, columns: int) -> Tensor:
    """`x @ weight.T` with sums in float32, without gradients.

    x         (M, columns)  float16, bfloat16 or float32
    prepared  what `prepare` returned
    returns   (M, rows)     in the dtype of `x`
    """
    from llmcompress.kernels.triton.ways import chosen, product  # lazy: triton is an extra

    x, packing = x.detach().contiguous(), packing_of(spec, columns)
    if not len(x):
        return x.new_empty((0, rows))
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        return product(x, prepared, packing, rows, chosen(x, prepared, packing, rows))
