"""The output head while something is measured: its Hessian, and its weight under a change."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llmcompress.compress.learning import Logits
from llmcompress.compress.measuring import Change, Changes, MeasureJob, changed_weight
from llmcompress.compress.observe import InputSums, Reading
from llmcompress.compress.rounding import Seen
from llmcompress.compress.targets import aim
from llmcompress.model.shares import Share
from llmcompress.model.stream import BlockStream

LOGITS = 1 << 24  # of one batch at a time, while the last block is learned


def head_input(
    head: nn.Module,
    stream: BlockStream,
    tokens: Sequence[Tensor],
    hidden: Sequence[Tensor],
    full: Sequence[Tensor] | None = None,
    *,
    share: Share | None = None,
) -> Seen | None:
    """What the head reads; None without tokens. The rest of the model must be loaded.

    With a `share`, the rest are those of this process's batches, and what is read is that of all.

    `hidden` are the states `(batch, tokens, hidden)` that left the last block, `full` those of the full-precision
    model, where the two are to be compared.
    """
    share = share or Share(len(tokens))
    sums = InputSums(share)
    read: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, args: read.append(args[0].detach().flatten(0, -2).float()))
    try:
        for place, batch in enumerate(tokens):
            stream.leave(batch, hidden[place])
            if full is not None:
                stream.leave(batch, full[place])
            sums.add(*(Reading(inputs, {}) for inputs in read))
            read.clear()
    finally:
        handle.remove()
    return sums.means()[0] if share.count else None


def logits_reader(stream: BlockStream, tokens: Sequence[Tensor]) -> Logits:
    """From hidden states of a batch that left the last block to logits, at positions evenly spaced.

    At all of them where they are at most `LOGITS` numbers. The rest of the model must be loaded.
    """
    vocabulary = int(stream.skeleton.config.get_text_config().vocab_size)

    def read(place: int, hidden: Tensor) -> Tensor:
        every = min(math.ceil(tokens[place].numel() * vocabulary / LOGITS), tokens[place].shape[1])
        return stream.logits_of(tokens[place][:, every - 1 :: every], hidden[:, every - 1 :: every])

    return read


class HeadView:
    """Shows the head as it would be under a change; the loaded weight is put back afterwards."""

    def __init__(
        self,
        job: MeasureJob,
        stream: BlockStream,
        tokens: Sequence[Tensor],
        hidden: Sequence[Tensor],
        full: Sequence[Tensor] | None = None,
        *,
        share: Share | None = None,
    ) -> None:
        self._job, self._stream, self._tokens, self._hidden, self._full = job, stream, tokens, hidden, full
        self._share = share
        self._cache: dict[Change, Tensor] = {}
        self._seen: Seen | None = None
        self._looked = False

    def look(self, changes: Changes) -> None:
        """See what the head reads, where a change will ask for it: every process at the same time."""
        info = self._job.trace.head
        change = None if info is None else changes.get(info.name)
        if info is not None and change is not None:
            self._weight(self._job.skeleton.model.get_submodule(info.name), change)

    def _weight(self, head: nn.Module, change: Change) -> Tensor:
        if change not in self._cache:
            if self._job.quantizer.NEEDS_HESSIAN and not self._looked:
                self._seen = head_input(head, self._stream, self._tokens, self._hidden, self._full, share=self._share)
                self._looked = True
            weight: Tensor = head.weight.detach().clone()  # type: ignore[operator]
            seen = self._seen
            if seen is not None:
                (weight,), seen = aim(self._job.options, seen, [weight], [None])
            self._cache[change] = changed_weight(self._job, weight, seen, change)
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
