"""One operator for every format: `llmcompress::linear`, known to torch, so that it compiles, exports and has gradients.

    linear(Tensor x, Tensor[] tensors, str names, str form, int[] size) -> Tensor

    x        (..., columns)   float32, bfloat16 or float16
    tensors  those of one linear in a file, or what a backend made of them; `names` says which: `layout:name,name,...`,
             where the layout is `file` or the name of that backend
    form     the format, as the JSON of its `LinearSpec`
    size     rows, columns
    returns  (..., rows)      in the dtype of x

Which backend does it is decided at each call (`backends.choose`); what it prepared is kept with the first tensor.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from llmcompress.kernels import backends, stored
from llmcompress.kernels.backends import spec_of
from llmcompress.plugins import find

FILE = "file"
DERIVED = "_llmcompress_derived"  # attribute of the first tensor of a linear


@dataclass
class Derived:
    """What a backend made of the tensors of one linear. Copies of the tensors, pickled ones too, have None of it."""

    prepared: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    bound: tuple[str | None, Any] | None = None

    def __deepcopy__(self, _: object) -> None:
        return None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


LIBRARY = torch.library.Library("llmcompress", "DEF")  # type: ignore[no-untyped-call]
SCHEMA = "(Tensor x, Tensor[] tensors, str names, str form, int[] size) -> Tensor"


@lru_cache(maxsize=1024)
def _parts(names: str) -> tuple[str, tuple[str, ...]]:
    layout, _, listed = names.partition(":")
    return layout, tuple(listed.split(","))


def names_of(layout: str, parts: Sequence[str]) -> str:
    """What the operator is told about its tensors."""
    return f"{layout}:{','.join(parts)}"


def _derived(tensors: Sequence[Tensor]) -> Derived:
    found: Derived | None = getattr(tensors[0], DERIVED, None)
    if found is None:
        found = Derived()
        setattr(tensors[0], DERIVED, found)
    return found


def forget(tensors: Sequence[Tensor]) -> None:
    """Forget what was made of the tensors of a linear: they hold something else now."""
    setattr(tensors[0], DERIVED, None)


def prepared_by(backend: ModuleType, tensors: Sequence[Tensor], parts: Sequence[str], form: str) -> dict[str, Tensor]:
    """What a backend needs of the tensors of a file, made once."""
    kept = _derived(tensors).prepared
    if backend.__name__ not in kept:
        kept[backend.__name__] = backend.prepare(dict(zip(parts, tensors, strict=True)), spec_of(form))
    return kept[backend.__name__]


def run(x: Tensor, tensors: Sequence[Tensor], names: str, form: str, size: Sequence[int]) -> Tensor:
    """The operator without torch's dispatcher, which costs as much as a small linear. Knows no gradients."""
    derived: Derived | None = getattr(tensors[0], DERIVED, None)
    bound = None if derived is None else derived.bound
    if bound is not None and bound[0] == backends.forced() and (ready := bound[1](x)) is not None:
        return ready  # type: ignore[no-any-return]
    (rows, columns), (layout, parts) = size, _parts(names)
    if layout == FILE:
        backend = backends.choose(form, rows, columns, x)
        prepared = prepared_by(backend, tensors, parts, form)
        if hasattr(backend, "bind"):
            _derived(tensors).bound = (backends.forced(), backend.bind(prepared, spec_of(form), rows, columns))
    else:
        backend = find(backends.__name__, layout)
        prepared = dict(zip(parts, tensors, strict=True))
    out: Tensor = backend.linear(x.detach().reshape(-1, columns), prepared, spec_of(form), rows, columns)
    return out.view(*x.shape[:-1], rows)


def weight_of(tensors: Sequence[Tensor], names: str, form: str, size: Sequence[int]) -> Tensor:
    """The weights that the tensors of a linear stand for, float32 `(rows, columns)`."""
    layout, parts = _parts(names)
    if layout == FILE:
        by_name = dict(zip(parts, tensors, strict=True))
        return stored.codes_of("", spec_of(form), lambda name: by_name[name]).dequantize()
    return run(torch.eye(size[1], device=tensors[0].device), tensors, names, form, size).T


def _fake(x: Tensor, tensors: Sequence[Tensor], names: str, form: str, size: Sequence[int]) -> Tensor:
    return x.new_empty((*x.shape[:-1], size[0]))


def _back(grad: Tensor, tensors: Sequence[Tensor], names: str, form: str, size: Sequence[int]) -> Tensor:
    """Gradient of the input, from that of the output."""
    weight = weight_of(tensors, names, form, size)
    return (grad.reshape(-1, size[0]).to(torch.float32) @ weight).to(grad.dtype).view(*grad.shape[:-1], size[1])


def _fake_back(grad: Tensor, tensors: Sequence[Tensor], names: str, form: str, size: Sequence[int]) -> Tensor:
    return grad.new_empty((*grad.shape[:-1], size[1]))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, tensors, *ctx.rest = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    tensors = list(ctx.saved_tensors)
    found = torch.ops.llmcompress.linear_back(grad, tensors, *ctx.rest)
    return found, [None] * len(tensors), None, None, None


LIBRARY.define(f"linear{SCHEMA}", tags=(torch.Tag.needs_fixed_stride_order,))  # type: ignore[no-untyped-call]
LIBRARY.define(f"linear_back{SCHEMA}", tags=(torch.Tag.needs_fixed_stride_order,))  # type: ignore[no-untyped-call]
LIBRARY.impl("linear", run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
LIBRARY.impl("linear_back", _back, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("llmcompress::linear", _fake, lib=LIBRARY)
torch.library.register_fake("llmcompress::linear_back", _fake_back, lib=LIBRARY)
torch.library.register_autograd("llmcompress::linear", _backward, setup_context=_remember, lib=LIBRARY)
