"""Watch the inputs of a block's linears while calibration runs through it."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.model.stream import linear_modules
from llmcompress.types import BlockTrace, LinearInfo


def local_name(block: BlockTrace, linear: LinearInfo) -> str:
    """Name of a linear inside its block."""
    return linear.name.removeprefix(block.name + ".")


def module_of(block: nn.Module, info: BlockTrace, linear: LinearInfo) -> nn.Module:
    """The module of a traced linear."""
    return linear_modules(block)[local_name(info, linear)]


def weight_of(block: nn.Module, info: BlockTrace, linear: LinearInfo) -> Tensor:
    """The weight of a traced linear as `(rows, columns)`, whatever way round the module keeps it."""
    weight: Tensor = module_of(block, info, linear).weight  # type: ignore[assignment]
    return weight.detach().T if linear.transposed else weight.detach()


@torch.no_grad()
def install_weight(block: nn.Module, info: BlockTrace, linear: LinearInfo, weight: Tensor) -> None:
    """Put a `(rows, columns)` weight into the module of a traced linear."""
    target: Tensor = module_of(block, info, linear).weight  # type: ignore[assignment]
    target.copy_(weight.T if linear.transposed else weight)


def groups_of(info: BlockTrace) -> dict[int, list[LinearInfo]]:
    """The linears of a block by the tensor they read, in call order."""
    groups: dict[int, list[LinearInfo]] = {}
    for linear in info.linears:
        groups.setdefault(linear.shared_input, []).append(linear)
    return groups


@contextmanager
def watching_inputs(block: nn.Module, info: BlockTrace, see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call `see(group, inputs)` with the input `(tokens, columns)` of each shared-input group as it is read."""
    handles = []
    for number, members in groups_of(info).items():

        def before(_: nn.Module, args: tuple[Any, ...], number: int = number) -> None:
            see(number, args[0].detach().flatten(0, -2))

        handles.append(module_of(block, info, members[0]).register_forward_pre_hook(before))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class HessianSums:
    """Running sums of `x x^T`, float32 `(columns, columns)`, of each shared-input group."""

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}
        self._tokens: dict[int, int] = {}

    def add(self, number: int, inputs: Tensor) -> None:
        """Add the inputs `(tokens, columns)` of group `number`."""
        found = inputs.float()
        if number in self._sums:
            self._sums[number].addmm_(found.T, found)
        else:
            self._sums[number] = found.T @ found
        self._tokens[number] = self._tokens.get(number, 0) + len(found)

    def means(self) -> dict[int, Tensor]:
        """Mean over all tokens seen."""
        return {number: total / self._tokens[number] for number, total in self._sums.items()}


def collect_hessians(
    block: nn.Module, info: BlockTrace, runs: Sequence[Callable[[], Any]]
) -> tuple[dict[int, Tensor], list[Any]]:
    """Mean of `x x^T` over all tokens, float32 `(columns, columns)`, of each shared-input group.

    `runs` are the forwards of the block, one per batch; what they return is returned as well.
    """
    sums = HessianSums()
    with torch.no_grad(), watching_inputs(block, info, sums.add):
        outputs = [run() for run in runs]
    return sums.means(), outputs
