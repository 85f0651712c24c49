"""What it costs to change some blocks or to do without them: KL divergence and rise of the loss, many at a time."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llmcompress.compress.measuring import DamageSums, slices
from llmcompress.compress.prune.halves import Half, Halves, Removal, whole
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import BlockCall, BlockStream

FLOAT_BYTES = 4
NO_HALVES = Halves({}, {})


@dataclass(frozen=True)
class Damage:
    """Of each variant of a model, by sequence: float64 `(variants, sequences)`, nats per token."""

    kld: Tensor
    dnll: Tensor


class Variant(Protocol):
    """A model that differs from the whole one in some of its blocks."""

    def changes(self, index: int) -> bool:
        """Whether block `index` is another, or none."""

    def passes_over(self, index: int) -> bool:
        """Whether there is no block `index`."""

    def changed(self, skeleton: Skeleton, index: int) -> AbstractContextManager[None]:
        """While inside, the loaded block `index` computes as in this model."""


@dataclass(frozen=True)
class Without:
    """The model without some blocks, and without halves of others that are among `halves`."""

    removed: Removal
    halves: Halves

    def changes(self, index: int) -> bool:
        """Whether the block or a half of it is removed."""
        return any(_block(unit) == index for unit in self.removed)

    def passes_over(self, index: int) -> bool:
        """Whether all of it is."""
        return index in self.removed

    def changed(self, skeleton: Skeleton, index: int) -> AbstractContextManager[None]:
        """The block without its halves."""
        return self.halves.without(skeleton, index, self.removed)


def removal_damage(
    skeleton: Skeleton,
    removals: Sequence[Removal],
    batches: Sequence[Tensor],
    *,
    memory_bytes: int = 2 << 30,
    halves: Halves = NO_HALVES,
) -> Damage:
    """Damage of removing each set of blocks, and of halves that are among `halves`, against the whole model."""
    variants = [Without(whole(removal), halves) for removal in removals]
    return damage_of(skeleton, variants, batches, memory_bytes=memory_bytes)


def damage_of(
    skeleton: Skeleton, variants: Sequence[Variant], batches: Sequence[Tensor], *, memory_bytes: int = 2 << 30
) -> Damage:
    """Damage of each variant against the whole model.

    batches       token batches, int64 `(batch, tokens)`
    memory_bytes  what hidden states of the variants may take; more passes are made where it does not do
    """
    tokens = sum(batch.numel() for batch in batches)
    width = int(skeleton.config.get_text_config().hidden_size)
    at_once = max(int(memory_bytes // max(tokens * width * FLOAT_BYTES, 1)), 1)
    parts = [_pass(skeleton, variants[i : i + at_once], batches) for i in range(0, len(variants), at_once)]
    return Damage(torch.cat([part.kld for part in parts]), torch.cat([part.dnll for part in parts]))


@torch.no_grad()
def _pass(skeleton: Skeleton, variants: Sequence[Variant], batches: Sequence[Tensor]) -> Damage:
    """One walk through the blocks. A variant shares the whole model's states up to the first block it changes."""
    stream = BlockStream(skeleton)
    full, calls = stream.start(batches)
    skeleton.free_rest()
    own: list[list[Tensor] | None] = [None for _ in variants]
    for index in range(len(skeleton.blocks)):
        skeleton.load_block(index)
        for place, variant in enumerate(variants):
            states = own[place]
            if states is None and not variant.changes(index):
                continue
            states = list(full) if states is None else states
            with variant.changed(skeleton, index):
                own[place] = states if variant.passes_over(index) else _through(stream, index, states, calls)
        full = _through(stream, index, full, calls)
        skeleton.free(skeleton.blocks[index])
    skeleton.load_exit()
    vocabulary = int(skeleton.config.get_text_config().vocab_size)
    sums = [[DamageSums(tokens) for tokens in batches] for _ in variants]
    for number, tokens in enumerate(batches):
        for part in slices(tokens, vocabulary):
            p = torch.log_softmax(stream.leave(tokens[:, part], full[number][:, part]), -1)
            for found, states in zip(sums, own, strict=True):
                logits = None if states is None else stream.leave(tokens[:, part], states[number][:, part])
                found[number].add(part, p, p if logits is None else torch.log_softmax(logits, -1))
    skeleton.free_rest()
    klds = torch.stack([torch.cat([each.kld for each in found]) for found in sums])
    return Damage(klds, torch.stack([torch.cat([each.dnll for each in found]) for found in sums]))


def _through(
    stream: BlockStream, index: int, states: Sequence[Tensor], calls: Sequence[Sequence[BlockCall]]
) -> list[Tensor]:
    return [stream.keep(stream.run_block(index, state, call[index])) for state, call in zip(states, calls, strict=True)]


def _block(unit: int | Half) -> int:
    return unit if isinstance(unit, int) else unit.block


def logits_without(skeleton: Skeleton, removed: Removal, tokens: Tensor, halves: Halves = NO_HALVES) -> Tensor:
    """Logits `(batch, tokens, vocabulary)` of the model when some blocks and halves are passed over."""
    return logits_of(skeleton, Without(removed, halves), tokens)


@torch.no_grad()
def logits_of(skeleton: Skeleton, variant: Variant, tokens: Tensor) -> Tensor:
    """Logits `(batch, tokens, vocabulary)` of a variant of the model."""
    stream = BlockStream(skeleton)
    (hidden,), (calls,) = stream.start([tokens])
    for index in range(len(skeleton.blocks)):
        if not variant.passes_over(index):
            skeleton.load_block(index)
            with variant.changed(skeleton, index):
                hidden = stream.run_block(index, hidden, calls[index])
        skeleton.free(skeleton.blocks[index])
    skeleton.load_exit()
    logits = stream.leave(tokens, hidden)
    skeleton.free_rest()
    return logits
