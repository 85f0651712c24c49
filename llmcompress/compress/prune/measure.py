"""What removing blocks or halves of blocks costs: KL divergence and rise of the loss, many sets in one pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.compress.measuring import sequence_dnll, sequence_kld
from llmcompress.compress.prune.halves import Half, Halves, Removal, whole
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import BlockCall, BlockStream

FLOAT_BYTES = 4
NO_HALVES = Halves({}, {})


@dataclass(frozen=True)
class RemovalDamage:
    """Of each set of what is removed, by sequence: float64 `(sets, sequences)`, nats per token."""

    kld: Tensor
    dnll: Tensor


def removal_damage(
    skeleton: Skeleton,
    removals: Sequence[Removal],
    batches: Sequence[Tensor],
    *,
    memory_bytes: int = 2 << 30,
    halves: Halves = NO_HALVES,
) -> RemovalDamage:
    """Damage of removing each set of blocks, and of halves that are among `halves`, against the whole model.

    batches       token batches, int64 `(batch, tokens)`
    memory_bytes  what hidden states of models without blocks may take; more passes are made where it does not do
    """
    tokens = sum(batch.numel() for batch in batches)
    width = int(skeleton.config.get_text_config().hidden_size)
    at_once = max(int(memory_bytes // max(tokens * width * FLOAT_BYTES, 1)), 1)
    parts = [_pass(skeleton, removals[i : i + at_once], batches, halves) for i in range(0, len(removals), at_once)]
    return RemovalDamage(torch.cat([part.kld for part in parts]), torch.cat([part.dnll for part in parts]))


@torch.no_grad()
def _pass(skeleton: Skeleton, removals: Sequence[Removal], batches: Sequence[Tensor], halves: Halves) -> RemovalDamage:
    """One walk through the blocks. A model without some shares the whole model's states up to the first of them."""
    stream = BlockStream(skeleton)
    full, calls = stream.start(batches)
    skeleton.free_rest()
    without: list[list[Tensor] | None] = [None for _ in removals]
    for index in range(len(skeleton.blocks)):
        skeleton.load_block(index)
        for place, removed in enumerate(map(whole, removals)):
            states = without[place]
            if states is None and not any(_block(unit) == index for unit in removed):
                continue
            states = list(full) if states is None else states
            with halves.without(skeleton, index, removed):
                without[place] = states if index in removed else _through(stream, index, states, calls)
        full = _through(stream, index, full, calls)
        skeleton.free(skeleton.blocks[index])
    skeleton.load_rest()
    klds: list[list[Tensor]] = [[] for _ in removals]
    dnlls: list[list[Tensor]] = [[] for _ in removals]
    for number, tokens in enumerate(batches):
        p = torch.log_softmax(stream.leave(tokens, full[number]), -1)
        for place, states in enumerate(without):
            q = p if states is None else torch.log_softmax(stream.leave(tokens, states[number]), -1)
            klds[place].append(sequence_kld(p, q).cpu())
            dnlls[place].append(sequence_dnll(p, q, tokens).cpu())
    skeleton.free_rest()
    return RemovalDamage(torch.stack([torch.cat(x) for x in klds]), torch.stack([torch.cat(x) for x in dnlls]))


def _through(
    stream: BlockStream, index: int, states: Sequence[Tensor], calls: Sequence[Sequence[BlockCall]]
) -> list[Tensor]:
    return [stream.keep(stream.run_block(index, state, call[index])) for state, call in zip(states, calls, strict=True)]


def _block(unit: int | Half) -> int:
    return unit if isinstance(unit, int) else unit.block


@torch.no_grad()
def logits_without(skeleton: Skeleton, removed: Removal, tokens: Tensor, halves: Halves = NO_HALVES) -> Tensor:
    """Logits `(batch, tokens, vocabulary)` of the model when some blocks and halves are passed over."""
    stream = BlockStream(skeleton)
    (hidden,), (calls,) = stream.start([tokens])
    for index in range(len(skeleton.blocks)):
        if index not in removed:
            skeleton.load_block(index)
            with halves.without(skeleton, index, removed):
                hidden = stream.run_block(index, hidden, calls[index])
        skeleton.free(skeleton.blocks[index])
    skeleton.load_rest()
    logits = stream.leave(tokens, hidden)
    skeleton.free_rest()
    return logits
