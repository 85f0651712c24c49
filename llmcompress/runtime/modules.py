"""A linear that keeps its weight as the file stores it, and multiplies with it through one operator."""

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from llmcompress.kernels import backends, ops, stored
from llmcompress.kernels.inputs import InputQuantizer
from llmcompress.kernels.integers import IntegerWeight
from llmcompress.runtime.siblings import Siblings
from llmcompress.spec import LinearSpec


def buffer_name(part: str) -> str:
    """What a module calls the tensor whose name in the file ends with `part`: `.weight.absmax` is `weight_absmax`."""
    return part.lstrip(".").replace(".", "_")


UP, DOWN = buffer_name(stored.UP), buffer_name(stored.DOWN)


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
        weights = [part for part in tensors if part not in stored.BESIDE]
        self.form = spec.plain.model_dump_json()  # inputs are rounded, and the correction is added, here
        self.siblings: Siblings | None = None
        self._names = ops.names_of(ops.FILE, tuple(weights))
        self._buffer_names = tuple(buffer_name(part) for part in weights)
        self._sums: Tensor | None = None  # of each row of 8-bit integers, once they were needed
        self._settled: tuple[str, list[Tensor]] | None = None
        for part, tensor in tensors.items():
            self.register_buffer(buffer_name(part), tensor)
        self.register_parameter("bias", bias)

    @property
    def qweight(self) -> Tensor:
        """The first tensor of the weight, by which libraries of adapters tell the device."""
        found: Tensor = getattr(self, self._buffer_names[0])
        return found

    def _working(self) -> tuple[str, list[Tensor]]:
        """What the operator gets: names and tensors."""
        if self.siblings is not None and self.siblings.settled:
            return self.siblings.part(self)
        return self._settled or (self._names, [getattr(self, name) for name in self._buffer_names])

    def stand_alone(self) -> None:
        """Give empty buffers a place of their own: in a file they begin where others do, which torch.save refuses."""
        for name, tensor in self._buffers.items():
            if tensor is not None and not tensor.numel():
                self._buffers[name] = tensor.clone()

    def of_file(self) -> dict[str, Tensor]:
        """The tensors of the weight as in the file, by the ends of their names."""
        parts = self._names.partition(":")[2].split(",")
        return {part: getattr(self, name) for part, name in zip(parts, self._buffer_names, strict=True)}

    def leave_on_host(self) -> None:
        """Keep the buffers in the memory of the host: something else is multiplied with."""
        for buffer in self._buffer_names:
            self._buffers[buffer] = getattr(self, buffer).cpu()

    def settle(self, x: Tensor) -> None:
        """Keep only what the backend for one such token needs on the device, and the buffers on the host."""
        if self.siblings is not None and self.siblings.settle(x):
            return
        backend = backends.choose(self.form, self.out_features, self.in_features, x.reshape(-1, self.in_features)[:1])
        tensors = {part: tensor.to(x.device) for part, tensor in self.of_file().items()}
        prepared = backend.prepare(tensors, self.spec.plain)
        if all(any(mine is known for known in tensors.values()) for mine in prepared.values()):
            self._buffers.update(zip(self._buffer_names, tensors.values(), strict=True))
            return
        name = backend.__name__.rpartition(".")[2]
        self._settled = (ops.names_of(name, tuple(prepared)), list(prepared.values()))
        self.leave_on_host()

    def forward(self, x: Tensor) -> Tensor:
        """Inputs `(..., in_features)` to outputs `(..., out_features)` of the same dtype."""
        if self.spec.inputs is not None:
            quantizer = InputQuantizer(
                self.spec.inputs, self._input(stored.INPUT_SCALE), self._input(stored.INPUT_ZERO)
            )
            if self.spec.integer and not x.requires_grad:
                return self._complete(x, self._integers().multiply(x, quantizer)).to(x.dtype)
            x = quantizer(x)
        if self.siblings is not None and self.siblings.settled and not x.requires_grad:
            out: Tensor = self.siblings.product(self, x)
        elif torch.compiler.is_compiling() or type(x) is not Tensor or x.requires_grad:
            out = torch.ops.llmcompress.linear(x, self._working()[1], self._working()[0], self.form, self._size)
        else:
            if self._settled is None and x.device.type != "cpu":
                self.settle(x)
                if self.siblings is not None and self.siblings.settled:
                    return self._complete(x, self.siblings.product(self, x))
            own = self._buffers
            names, tensors = self._settled or (
                self._names,
                [t for name in self._buffer_names if (t := own[name]) is not None],
            )
            out = ops.run(x, tensors, names, self.form, self._size)
        return self._complete(x, out)

    def _factors(self) -> tuple[Tensor, Tensor] | None:
        up, down = self._buffers.get(UP), self._buffers.get(DOWN)
        return None if up is None or down is None else (up, down)

    def _complete(self, x: Tensor, out: Tensor) -> Tensor:
        """A product with the codes, and the correction and the bias added to it."""
        if (factors := self._factors()) is not None:
            up, down = (factor.to(x.dtype) for factor in factors)
            out = out + (x @ down.T) @ up.T
        bias = self._parameters["bias"]  # without the search that `self.bias` is
        return out if bias is None else out + bias.to(out.dtype)

    def _input(self, part: str) -> Tensor | None:
        return self._buffers.get(buffer_name(part))

    def _integers(self) -> IntegerWeight:
        """The weight as 8-bit integers: the buffers themselves, and the sums of rows."""
        codes = self.get_buffer(buffer_name(stored.WEIGHT)).view(self._size)
        scale = self.get_buffer(buffer_name(stored.SCALE))
        if self._sums is None:
            self._sums = codes.sum(1, dtype=torch.int64)
        return IntegerWeight(codes, scale.float().flatten(), self._sums)

    def dequantize(self) -> Tensor:
        """The weight it stands for, float32 `(out_features, in_features)`."""
        names, tensors = self._working()
        weight, factors = ops.weight_of(tensors, names, self.form, self._size), self._factors()
        return weight if factors is None else weight + factors[0].float() @ factors[1].float()

    def _release(self) -> None:
        """Forget what is on the device, and what was computed of the weight."""
        self._settled = self._sums = None
        if self.siblings is not None:
            self.siblings.release()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        known = {id(self._buffers[name]) for name in self._buffers}
        self._release()

        def moved(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            return found if id(tensor) not in known or found.dtype == tensor.dtype else tensor.to(found.device)

        super()._apply(moved, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Other codes come into the buffers: what a backend or a device has of those before is forgotten."""
        super()._load_from_state_dict(*args, **kwargs)
        self._release()
        ops.forget([*self.of_file().values()])

    def extra_repr(self) -> str:
        """Sizes and format, for `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.spec.label}"
