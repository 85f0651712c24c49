"""Run a block again and again without computing twice what can no longer change."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from llmcompress.compress.observe import local_name
from llmcompress.model.stream import BlockCall, hidden_of
from llmcompress.types import BlockTrace


def call_block(block: nn.Module, hidden: Tensor, call: BlockCall) -> Tensor:
    """Hidden states leaving a block."""
    return hidden_of(block(hidden, *call.args, **call.kwargs))


class Replay:
    """One copy of a block, and outputs of its children (attention, MLP) on batches it has already seen.

    A child's output is kept once the caller says its weights are final. Later runs on the same batch take it from
    here, as long as what enters the block is the same. A child that is looked into from outside (what a linear's
    output is added to is made in there) always runs.
    """

    def __init__(self, block: nn.Module, info: BlockTrace) -> None:
        self.block = block
        self.children: dict[str, set[str]] = {}
        for linear in info.linears:
            self.children.setdefault(local_name(info, linear).partition(".")[0], set()).add(linear.name)
        inside = {name.partition(".")[0] for w in info.writers for name in (w.norm, *w.after)}
        self._keepable = set(self.children) - inside
        self._kept: dict[tuple[str, int], Any] = {}

    @contextmanager
    def on(self, place: int, final: Collection[str], *, keep: bool = True) -> Iterator[None]:
        """Runs inside are on batch `place`; the children named in `final` have their last weights."""
        handles, replaced = [], []
        for name in self._keepable & set(final):
            child = self.block.get_submodule(name)
            if (name, place) in self._kept:
                child.forward = self._again(name, place)
                replaced.append(child)
            elif keep:
                handles.append(child.register_forward_hook(self._keeping(name, place)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for child in replaced:
                del child.forward  # the instance attribute; the class's own forward shows again

    def _again(self, name: str, place: int) -> Any:
        return lambda *_, **__: self._kept[name, place]

    def _keeping(self, name: str, place: int) -> Any:
        def after(_: nn.Module, __: Any, output: Any) -> None:
            self._kept[name, place] = output

        return after

    def drop(self, place: int) -> None:
        """Forget one batch."""
        for name in self.children:
            self._kept.pop((name, place), None)

    def forget(self) -> None:
        """Forget everything: the weights have changed after all."""
        self._kept.clear()
