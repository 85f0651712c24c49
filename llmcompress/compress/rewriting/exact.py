"""Float64 throughout: the precision in which a rewrite is made and checked.

Models ask for float32 in the middle of their code (norms, softmax), which would hide a wrong rewrite behind
rounding of 1e-7. While `exact()` is active such a request is answered with float64.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def _grouped_product(left: Tensor, right: Tensor, *, offs: Tensor, **_: Any) -> Tensor:
    """Rows of `left` `(tokens, k)` up to each offset times the matrix of that group `(groups, k, n)`: experts' kernel.

    torch has it for narrower floats only.
    """
    ends = offs.tolist()
    runs = zip([0, *ends], ends, right, strict=False)
    return torch.cat([left[start:end] @ one for start, end, one in runs])


REPLACED: dict[Any, Callable[..., Any]] = {Tensor.float: Tensor.double, torch._grouped_mm: _grouped_product}


class exact(TorchFunctionMode):  # a context manager, named like one
    """Answers every request for float32 with float64."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call `func` with float64 in the place of float32."""
        wide = tuple(torch.float64 if value is torch.float32 else value for value in args)
        named = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        chosen: Callable[..., Any] = REPLACED.get(func, func)
        return chosen(*wide, **named)


def as_double(value: Any) -> Any:
    """Floating-point tensors as float64, wherever they are inside tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, (tuple, list)):
        return type(value)(as_double(item) for item in value)
    if isinstance(value, dict):
        return {key: as_double(item) for key, item in value.items()}
    return value


@contextmanager
def in_float64(module: nn.Module) -> Iterator[None]:
    """Hold a module's parameters and buffers in float64; afterwards each returns to its own dtype.

    Parameters keep their identity, so tied ones stay tied. One that was added meanwhile gets the dtype of the first.
    """
    kept = {id(tensor): tensor.dtype for tensor in module.parameters() if tensor.is_floating_point()}
    first = next(iter(kept.values()), torch.float32)
    buffers = {name: tensor.dtype for name, tensor in module.named_buffers() if tensor.is_floating_point()}
    module.double()
    try:
        yield
    finally:
        for tensor in module.parameters():
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(kept.get(id(tensor), first))
        for name, buffer in list(module.named_buffers()):
            if name in buffers:
                owner, _, leaf = name.rpartition(".")
                module.get_submodule(owner)._buffers[leaf] = buffer.to(buffers[name])


def relative_difference(found: Tensor, reference: Tensor) -> float:
    """Largest absolute difference over the largest absolute value of the reference; NaN where either has one."""
    return float((found - reference).abs().max() / reference.abs().max().clamp_min(1e-300))
