"""What removing blocks costs: KL divergence and rise of the loss of the model without them, many sets in one pass."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.compress.measuring import sequence_dnll, sequence_kld
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import BlockCall, BlockStream

FLOAT_BYTES = 4


@dataclass(frozen=True)
class RemovalDamage:
    """Of each set of removed blocks, by sequence: float64 `(sets, sequences)`, nats per token."""

    kld: Tensor
    dnll: Tensor


def removal_damage(
    skeleton: Skeleton, removals: Sequence[frozenset[int]], batches: Sequence[Tensor], *, memory_bytes: int = 2 << 30
) -> RemovalDamage:
    """Damage of removing each set of blocks, against the whole model.

    batches       token batches, int64 `(batch, tokens)`
    memory_bytes  what hidden states of models without blocks may take; more passes are made where it does not do
    """
    tokens = sum(batch.numel() for batch in batches)
    width = int(skeleton.config.get_text_config().hidden_size)
    at_once = max(int(memory_bytes // max(tokens * width * FLOAT_BYTES, 1)), 1)
    parts = [_pass(skeleton, removals[i : i + at_once], batches) for i in range(0, len(removals), at_once)]
    return RemovalDamage(torch.cat([part.kld for part in parts]), torch.cat([part.dnll for part in parts]))


@torch.no_grad()
def _pass(skeleton: Skeleton, removals: Sequence[frozenset[int]], batches: Sequence[Tensor]) -> RemovalDamage:
    """One walk through the blocks. A model without blocks shares the whole model's states up to the first of them."""
    stream = BlockStream(skeleton)
    whole, calls = stream.start(batches)
    skeleton.free_rest()
    without: list[list[Tensor] | None] = [None for _ in removals]
    for index in range(len(skeleton.blocks)):
        skeleton.load_block(index)
        for place, removed in enumerate(removals):
            states = without[place]
            if index in removed:
                without[place] = list(whole) if states is None else states
            elif states is not None:
                without[place] = [_run(stream, index, *pair) for pair in zip(states, calls, strict=True)]
        whole = [_run(stream, index, *pair) for pair in zip(whole, calls, strict=True)]
        skeleton.free(skeleton.blocks[index])
    skeleton.load_rest()
    klds: list[list[Tensor]] = [[] for _ in removals]
    dnlls: list[list[Tensor]] = [[] for _ in removals]
    for number, tokens in enumerate(batches):
        p = torch.log_softmax(stream.leave(tokens, whole[number]), -1)
        for place, states in enumerate(without):
            q = p if states is None else torch.log_softmax(stream.leave(tokens, states[number]), -1)
            klds[place].append(sequence_kld(p, q).cpu())
            dnlls[place].append(sequence_dnll(p, q, tokens).cpu())
    skeleton.free_rest()
    return RemovalDamage(torch.stack([torch.cat(x) for x in klds]), torch.stack([torch.cat(x) for x in dnlls]))


def _run(stream: BlockStream, index: int, states: Tensor, calls: Sequence[BlockCall]) -> Tensor:
    return stream.run_block(index, states, calls[index])


@torch.no_grad()
def logits_without(skeleton: Skeleton, removed: frozenset[int], tokens: Tensor) -> Tensor:
    """Logits `(batch, tokens, vocabulary)` of the model when some blocks are passed over."""
    stream = BlockStream(skeleton)
    (hidden,), (calls,) = stream.start([tokens])
    for index in range(len(skeleton.blocks)):
        if index not in removed:
            skeleton.load_block(index)
            hidden = stream.run_block(index, hidden, calls[index])
        skeleton.free(skeleton.blocks[index])
    skeleton.load_rest()
    logits = stream.leave(tokens, hidden)
    skeleton.free_rest()
    return logits
