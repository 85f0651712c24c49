"""Watch the inputs of a block's linears while calibration runs through it.

Where a linear's output is to be brought close to the full-precision model's, two copies of the block run side by
side: one as it will be stored, fed with what the stored model gives it, and one as it was.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.compress.rounding import Seen
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

    def means(self) -> dict[int, Seen]:
        """Mean over all tokens seen."""
        return {n: Seen(total / self._tokens[n], self._tokens[n]) for n, total in self._sums.items()}


def collect_hessians(block: nn.Module, info: BlockTrace, runs: Sequence[Callable[[], Any]]) -> dict[int, Seen]:
    """Mean of `x x^T` over all tokens for each shared-input group; `runs` are forwards of the block, a batch each."""
    sums = HessianSums()
    with torch.no_grad(), watching_inputs(block, info, sums.add):
        for run in runs:
            run()
    return sums.means()


class Enough(Exception):  # not an error: it ends a forward early
    """Leaves a block's forward once what was looked for has been read."""


Run = Callable[[], Tensor]  # a block on the hidden states that enter it


@dataclass
class Reading:
    """What one forward showed: the input of a group `(tokens, columns)`, and the stream each writer adds to.

    `leaving` are the hidden states that left the block, where it was run to its end.
    """

    inputs: Tensor
    streams: dict[str, Tensor]
    leaving: Tensor | None = None


class GroupWatch:
    """Reads the input of one shared-input group and what its linears' outputs are added to, and no further.

    `until`: the `input` has been read, the `child` of the block that holds the group has finished, or the `end`.
    """

    def __init__(self, info: BlockTrace, members: Sequence[LinearInfo]) -> None:
        self._info = info
        self._first = local_name(info, members[0])
        names = {local_name(info, linear): linear.name for linear in members}
        self._writers = [(names[w.linear], w) for w in info.writers if w.linear in names]

    @torch.no_grad()
    def read(self, block: nn.Module, hidden: Tensor, run: Run, *, until: str = "input") -> Reading:
        """Run a block on `hidden` as far as need be."""
        seen: dict[str, Tensor] = {"": hidden}
        found: list[Tensor] = []
        leaving = None
        with self._hooks(block, seen, found, until), suppress(Enough):
            leaving = run()
        streams = {name: seen[w.norm] + sum(seen[n] for n in w.after) for name, w in self._writers}
        flat = {name: stream.flatten(0, -2).float() for name, stream in streams.items()}
        return Reading(found[0].flatten(0, -2).float(), flat, leaving)

    @contextmanager
    def _hooks(self, block: nn.Module, seen: dict[str, Tensor], found: list[Tensor], until: str) -> Iterator[None]:
        def reads(name: str) -> Callable[..., None]:
            return lambda _, args: seen.update({name: args[0]})

        def wrote(name: str) -> Callable[..., None]:
            return lambda _, __, output: seen.update({name: output})

        def enough(*_: Any) -> None:
            raise Enough

        linears = linear_modules(block)
        norms = {w.norm for _, w in self._writers if w.norm}
        before = {name for _, w in self._writers for name in w.after}
        handles = [block.get_submodule(name).register_forward_pre_hook(reads(name)) for name in norms]
        handles += [linears[name].register_forward_hook(wrote(name)) for name in before]
        first = linears[self._first]
        handles.append(first.register_forward_pre_hook(lambda _, args: found.append(args[0])))
        if until == "input":
            handles.append(first.register_forward_pre_hook(enough))
        elif until == "child":
            handles.append(block.get_submodule(self._first.partition(".")[0]).register_forward_hook(enough))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class DriftSums:
    """Running sums over tokens of everything that is asked about one group."""

    def __init__(self) -> None:
        self.tokens = 0
        self._hessian: Tensor | None = None
        self._drift: Tensor | None = None
        self._residuals: dict[str, Tensor] = {}

    def add(self, stored: Reading, full: Reading | None = None) -> None:
        """One batch, in the stored model and, where it is run, in the full-precision one."""
        x = stored.inputs
        self.tokens += len(x)
        self._hessian = _grown(self._hessian, x, x)
        if full is None:
            return
        self._drift = _grown(self._drift, full.inputs - x, x)
        for name, stream in stored.streams.items():
            self._residuals[name] = _grown(self._residuals.get(name), full.streams[name] - stream, x)

    def means(self) -> tuple[Seen, dict[str, Tensor]]:
        """What was seen, and the residual term `(rows, columns)` of every linear that writes to a stream."""
        if self._hessian is None:
            raise ValueError("nothing was added")
        count = self.tokens
        drift = None if self._drift is None else self._drift / count
        residuals = {name: total / count for name, total in self._residuals.items()}
        return Seen(self._hessian / count, count, drift), residuals


def _grown(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    return left.T @ right if total is None else total.addmm_(left.T, right)
