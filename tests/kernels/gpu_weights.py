"""Weights for the kernels in CUDA C++ on a GPU, where there is one."""

import pytest
import torch
import triton_cases
from torch import Tensor

from llmcompress.kernels import stored
from llmcompress.kernels.triton import layout
from llmcompress.spec import LinearSpec

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def on_gpu(spec: LinearSpec, rows: int, columns: int) -> tuple[dict[str, Tensor], layout.Packing, Tensor]:
    """A random weight as kernels read it, how it lies there, and its values."""
    codes = triton_cases.random_codes(spec, rows, columns)
    prepared = {name: part.cuda() for name, part in layout.prepare(stored.tensors_of("", codes), spec).items()}
    return prepared, layout.packing_of(spec, columns), codes.dequantize().double()
