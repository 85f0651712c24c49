"""Plain torch on any device: unpack, dequantize to float32, multiply. Every format; the oracle, and the last resort."""

from collections.abc import Mapping

import torch
from torch import Tensor

from llmcompress.kernels import stored
from llmcompress.spec import LinearSpec


def why_not(spec: LinearSpec, rows: int, columns: int, *, tokens: int, dtype: torch.dtype, device: str) -> str | None:
    """Only dtypes that are not floating point are refused."""
    return None if dtype.is_floating_point else f"inputs are {dtype}"


def prepare(tensors: Mapping[str, Tensor], spec: LinearSpec) -> dict[str, Tensor]:
    """The tensors of the file as they are."""
    return dict(tensors)


def linear(x: Tensor, prepared: Mapping[str, Tensor], spec: LinearSpec, rows: int, columns: int) -> Tensor:
    """Inputs `(tokens, columns)` times the weight, `(tokens, rows)`, summed in float32."""
    weight = stored.codes_of("", spec, lambda name: prepared[name]).dequantize()
    return (x.to(torch.float32) @ weight.to(x.device).T).to(x.dtype)
