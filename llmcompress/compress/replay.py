"""Run a block again and again without computing twice what can no longer change."""

from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from llmcompress.compress.observe import local_name
from llmcompress.model.shelf import Keep, Tray
from llmcompress.types import BlockTrace

INPUT_BYTES = 1 << 30  # of inputs of last linears kept at a time: they can be several times as wide as hidden states


def in_memory(hidden: Tensor) -> Tensor:
    """Hidden states where they are."""
    return hidden


class Replay:
    """One copy of a block, and what its children (attention, MLP) did with batches they have already seen.

    A child's output is kept once the caller says its weights are final, and taken from here when the same batch
    comes again. Before that, where only the linear is left whose output the child returns as it is, that linear's
    input is kept, and the next run of the child is that linear alone. What enters the block must be the same. A
    child that is looked into from outside (what a linear's output is added to is made in there) always runs.
    """

    def __init__(self, block: nn.Module, info: BlockTrace, keep: Keep = in_memory) -> None:
        self.block = block
        self._trays: defaultdict[str, Tray] = defaultdict(lambda: Tray(keep))
        self.children: dict[str, set[str]] = {}
        for linear in info.linears:
            self.children.setdefault(local_name(info, linear).partition(".")[0], set()).add(linear.name)
        inside = {name.partition(".")[0] for w in info.writers for name in (w.norm, *w.after)}
        self._keepable = [name for name in self.children if name not in inside]
        self._ends = {end.child: end for end in info.ends if end.child in self._keepable}
        self._last = {end.child: f"{info.name}.{end.linear}" for end in self._ends.values()}
        self._outputs: dict[tuple[str, int], Any] = {}
        self._inputs: dict[tuple[str, int], Tensor] = {}
        self._room = INPUT_BYTES

    @contextmanager
    def on(self, place: int, final: Collection[str], *, keep: bool = True) -> Iterator[None]:
        """Runs inside are on batch `place`; the linears named in `final` have their last weights."""
        handles, replaced = [], []
        for name in self._keepable:
            key, child, left = (name, place), self.block.get_submodule(name), self.children[name].difference(final)
            if not left and (key in self._outputs or key in self._inputs):
                child.forward = self._again(key, keep)
                replaced.append(child)
            elif not left and keep:
                handles.append(child.register_forward_hook(self._keeping(key)))
            elif keep and left == {self._last.get(name)}:
                last = self.block.get_submodule(self._ends[name].linear)
                before = self._keeping_input(key)  # as it was given: what changes inputs does it again
                handles.append(last.register_forward_pre_hook(before, prepend=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for child in replaced:
                del child.forward  # the instance attribute; the class's own forward shows again

    def _again(self, key: tuple[str, int], keep: bool) -> Any:
        def forward(*_: Any, **__: Any) -> Any:
            if key in self._outputs:
                return self._outputs[key]
            end = self._ends[key[0]]
            output: Any = self.block.get_submodule(end.linear)(self._take(key))
            if end.beside:
                output = (output, *[None] * end.beside)
            if keep:
                self._outputs[key] = self._kept(key[0], output)
            return output

        return forward

    def _kept(self, name: str, output: Any) -> Any:
        if isinstance(output, tuple):
            return tuple(self._kept(f"{name}[{place}]", part) for place, part in enumerate(output))
        return self._trays[name](output) if isinstance(output, Tensor) else output

    def _take(self, key: tuple[str, int]) -> Tensor:
        found = self._inputs.pop(key)
        self._room += found.nbytes
        return found

    def _keeping(self, key: tuple[str, int]) -> Any:
        def after(_: nn.Module, __: Any, output: Any) -> None:
            self._outputs[key] = self._kept(key[0], output)

        return after

    def _keeping_input(self, key: tuple[str, int]) -> Any:
        def before(_: nn.Module, args: Any) -> None:
            if key in self._inputs:
                self._take(key)
            if args[0].nbytes <= self._room:
                self._inputs[key] = self._trays[f"{key[0]} reads"](args[0])
                self._room -= args[0].nbytes

        return before

    def drop(self, place: int) -> None:
        """Forget one batch."""
        for key in [key for key in self._inputs if key[1] == place]:
            self._take(key)
        for name in self.children:
            self._outputs.pop((name, place), None)

    def forget(self) -> None:
        """Forget everything: the weights have changed after all."""
        self._outputs.clear()
        self._inputs.clear()
        self._room = INPUT_BYTES
