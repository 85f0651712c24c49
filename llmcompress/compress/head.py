"""The output head while something is measured: its Hessian, and its weight under a change."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.compress.measuring import Change, Changes, MeasureJob, changed_weight
from llmcompress.compress.observe import HessianSums
from llmcompress.model.stream import BlockStream


def head_hessian(
    head: nn.Module, stream: BlockStream, tokens: Sequence[Tensor], hidden: Sequence[Tensor]
) -> Tensor | None:
    """Mean of `x x^T` over what the head reads, `(columns, columns)`; None without tokens.

    `hidden` are the states `(batch, tokens, hidden)` that left the last block, the rest of the model is loaded.
    """
    sums = HessianSums()

    def before(_: nn.Module, args: tuple[Any, ...]) -> None:
        sums.add(0, args[0].detach().flatten(0, -2))

    handle = head.register_forward_pre_hook(before)
    try:
        for batch, state in zip(tokens, hidden, strict=True):
            stream.leave(batch, state)
    finally:
        handle.remove()
    return sums.means().get(0)


class HeadView:
    """Shows the head as it would be under a change; the loaded weight is put back afterwards."""

    def __init__(
        self, job: MeasureJob, stream: BlockStream, tokens: Sequence[Tensor], hidden: Sequence[Tensor]
    ) -> None:
        self._job, self._stream, self._tokens, self._hidden = job, stream, tokens, hidden
        self._cache: dict[Change, Tensor] = {}
        self._hessian: Tensor | None = None
        self._looked = False

    def _weight(self, head: nn.Module, change: Change) -> Tensor:
        if change not in self._cache:
            if self._job.quantizer.NEEDS_HESSIAN and not self._looked:
                self._hessian, self._looked = head_hessian(head, self._stream, self._tokens, self._hidden), True
            weight: Tensor = head.weight  # type: ignore[assignment]
            self._cache[change] = changed_weight(self._job, weight.detach().clone(), self._hessian, change)
        return self._cache[change]

    @contextmanager
    def as_in(self, changes: Changes) -> Iterator[None]:
        """The head as `changes` have it."""
        info = self._job.trace.head
        change = None if info is None else changes.get(info.name)
        if info is None or change is None:
            yield
            return
        head = self._job.skeleton.model.get_submodule(info.name)
        target: Tensor = head.weight
        kept = target.detach().clone()
        weight = self._weight(head, change)
        try:
            with torch.no_grad():
                target.copy_(weight)
            yield
        finally:
            with torch.no_grad():
                target.copy_(kept)
