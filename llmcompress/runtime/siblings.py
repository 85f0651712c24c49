"""Linears that read the same input, multiplied in one go: q, k and v; gate and up.

Their modules keep their names, their buffers and their outputs, so that adapters and `save_pretrained` see nothing of
it: the first of them that is called computes all, and the others take what is there for them. On accelerators only,
where a call costs as much as a small product.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llmcompress.kernels import backends, ops
from llmcompress.spec import LinearSpec


class Member(Protocol):
    """What is needed of a packed linear (`modules.PackedLinear`)."""

    spec: LinearSpec
    form: str
    in_features: int
    out_features: int
    siblings: "Siblings | None"

    def of_file(self) -> dict[str, Tensor]:
        """The tensors of the file."""

    def leave_on_host(self) -> None:
        """Keep them in the memory of the host."""


# What they are called in one parent; a wrong guess costs time, never a result: the input is compared at every call.
NAMES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("w1", "w3"))


class Siblings:
    """Some packed linears of one format and one number of columns."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.members = list(members)
        self.ends = [sum(m.out_features for m in self.members[: place + 1]) for place in range(len(self.members))]
        self._names, self._backend = "", ""
        self._tensors: list[Tensor] = []
        self._last: tuple[Tensor, list[Tensor | None]] | None = None  # an input, and what nobody has asked for yet

    @property
    def settled(self) -> bool:
        """Whether the device has their weights as one."""
        return self._names != ""

    def _place(self, member: Member) -> int:
        return next(place for place, known in enumerate(self.members) if known is member)

    def settle(self, x: Tensor) -> bool:
        """Join their weights for the backend that multiplies one such token, where it can; otherwise False."""
        if self.settled:
            return True
        first = self.members[0]
        files = [member.of_file() for member in self.members]
        if any(tensor.device != x.device for tensors in files for tensor in tensors.values()):
            return False
        backend = backends.choose(first.form, self.ends[-1], first.in_features, x.reshape(-1, first.in_features)[:1])
        if not hasattr(backend, "join"):
            return False
        joined: dict[str, Tensor] = backend.join([backend.prepare(tensors, first.spec.plain) for tensors in files])
        self._backend = backend.__name__.rpartition(".")[2]
        self._names, self._tensors = ops.names_of(self._backend, tuple(joined)), list(joined.values())
        for member in self.members:
            member.leave_on_host()
        return True

    def part(self, member: Member) -> tuple[str, list[Tensor]]:
        """Names and tensors of one member, as the operator takes them."""
        joined = dict(zip(self._names.partition(":")[2].split(","), self._tensors, strict=True))
        last = self.ends[self._place(member)]
        found: dict[str, Tensor] = backends.named(self._backend).part(joined, last - member.out_features, last)
        return ops.names_of(self._backend, tuple(found)), list(found.values())

    def product(self, member: Member, x: Tensor) -> Tensor:
        """What a member makes of `x`, without its bias."""
        place, last = self._place(member), self._last  # read once: other threads have inputs of their own
        left = last[1] if last is not None and last[0] is x else None
        found = None if left is None else left[place]
        if left is None or found is None:
            run = torch.ops.llmcompress.linear if torch.compiler.is_compiling() else ops.run
            out = run(x, self._tensors, self._names, member.form, (self.ends[-1], member.in_features))
            starts = [0, *self.ends[:-1]]
            outputs: list[Tensor] = [out[..., a:b] for a, b in zip(starts, self.ends, strict=True)]
            left, found = [*outputs], outputs[place]
            self._last = (x, left)
        left[place] = None
        if all(output is None for output in left):
            self._last = None
        return found

    def release(self) -> None:
        """Forget what is on the device."""
        self._names, self._tensors, self._last = "", [], None


def introduce(model: nn.Module) -> None:
    """Tell the packed linears of a model of their siblings."""
    for members in _families(model):
        together = Siblings(members)
        for member in members:
            member.siblings = together


def _families(model: nn.Module) -> Iterator[list[Any]]:
    for parent in model.modules():
        children: dict[str, Any] = dict(parent.named_children())
        for names in NAMES:
            found = [children[name] for name in names if name in children]
            if len(found) == len(names) and len({_kind(child) for child in found}) == 1 and _kind(found[0]):
                yield found


def _kind(module: Any) -> tuple[str, int] | None:
    """What linears must have in common; None for any other module, and where inputs are rounded."""
    form = getattr(module, "form", None)
    return (form, module.in_features) if form is not None and module.spec.inputs is None else None
