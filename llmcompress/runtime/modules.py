"""A linear that keeps its weight as the file stores it, and multiplies with it through one operator."""

from collections.abc import Callable, Mapping
from typing import Self

import torch
from torch import Tensor, nn

from llmcompress.kernels import backends, ops
from llmcompress.spec import LinearSpec


def buffer_name(part: str) -> str:
    """What a module calls the tensor whose name in the file ends with `part`: `.weight.absmax` is `weight_absmax`."""
    return part.lstrip(".").replace(".", "_")


class PackedLinear(nn.Module):
    """`x Wᵀ + bias` with W in codes; takes the place of `nn.Linear` and of `Conv1D`.

    Its buffers are the tensors of the file, in the dtypes of the file: `.to(dtype)`, `.half()` and the like change the
    bias alone. On accelerators a backend may need another layout; then that is what lies on the device, and the
    buffers stay on the host, so that they can be saved. There are gradients for inputs, not for weights.
    """

    bias: nn.Parameter | None

    def __init__(
        self, spec: LinearSpec, tensors: Mapping[str, Tensor], size: tuple[int, int], bias: nn.Parameter | None = None
    ) -> None:
        super().__init__()
        self.spec = spec
        self.out_features, self.in_features = self._size = size
        self._form = spec.model_dump_json()
        self._names = ops.names_of(ops.FILE, tuple(tensors))
        self._buffer_names = tuple(buffer_name(part) for part in tensors)
        self._settled: tuple[str, list[Tensor]] | None = None
        for part, tensor in tensors.items():
            self.register_buffer(buffer_name(part), tensor)
        self.register_parameter("bias", bias)

    def _working(self) -> tuple[str, list[Tensor]]:
        """What the operator gets: names and tensors."""
        return self._settled or (self._names, [getattr(self, name) for name in self._buffer_names])

    def settle(self, x: Tensor) -> None:
        """Keep only what the backend for one such token needs on the device, and the buffers on the host."""
        names, tensors = self._working()
        form, parts = self._form, names.partition(":")[2].split(",")
        backend = backends.choose(form, self.out_features, self.in_features, x.reshape(-1, self.in_features)[:1])
        prepared = backend.prepare(dict(zip(parts, tensors, strict=True)), self.spec)
        if all(any(mine is known for known in tensors) for mine in prepared.values()):
            return
        name = backend.__name__.rpartition(".")[2]
        self._settled = (ops.names_of(name, tuple(prepared)), list(prepared.values()))
        for buffer in self._buffer_names:
            self._buffers[buffer] = getattr(self, buffer).cpu()

    def forward(self, x: Tensor) -> Tensor:
        """Inputs `(..., in_features)` to outputs `(..., out_features)` of the same dtype."""
        if torch.compiler.is_compiling() or type(x) is not Tensor or x.requires_grad:
            out: Tensor = torch.ops.llmcompress.linear(
                x, self._working()[1], self._working()[0], self._form, self._size
            )
        else:
            if self._settled is None and x.device.type != "cpu":
                self.settle(x)
            stored = self._buffers
            names, tensors = self._settled or (
                self._names,
                [t for name in self._buffer_names if (t := stored[name]) is not None],
            )
            out = ops.run(x, tensors, names, self._form, self._size)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def dequantize(self) -> Tensor:
        """The weight it stands for, float32 `(out_features, in_features)`."""
        names, tensors = self._working()
        return ops.weight_of(tensors, names, self._form, self._size)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        stored = {id(self._buffers[name]) for name in self._buffers}
        self._settled = None

        def moved(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            return found if id(tensor) not in stored or found.dtype == tensor.dtype else tensor.to(found.device)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self

    def extra_repr(self) -> str:
        """Sizes and format, for `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.spec.label}"
