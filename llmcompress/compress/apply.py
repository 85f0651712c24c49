"""Carry out a plan: rewrite the model a block at a time, each step durable before the next begins.

Law: advance with what was stored. The next block sees exactly the weights a reader of the file will see.
"""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
from safetensors import safe_open
from torch import Tensor

from llmcompress.compress.attention import attention_stems
from llmcompress.compress.chain import ApplyJob, Chain, start_chain
from llmcompress.compress.formats import exporter_for
from llmcompress.compress.group import LEFT, Rounded, round_head
from llmcompress.compress.head import head_input
from llmcompress.compress.journal import CommitRecord, Journal
from llmcompress.compress.overflow import OVERFLOWS, overflow
from llmcompress.compress.rounds import BlockRounds
from llmcompress.compress.shards import write_shard
from llmcompress.errors import InputError
from llmcompress.model.checkpoint import DTYPE_NAMES
from llmcompress.model.shares import Share
from llmcompress.model.stream import BlockStream
from llmcompress.preflight.header import TensorEntry
from llmcompress.runtime.attention import tensors_of
from llmcompress.types import (
    BlockOutcome,
    BlockTrace,
    Fallback,
    LinearInfo,
    LinearOutcome,
    LinearSpec,
)

ATTENTION = "attention"  # among packed tensors, those that are no linear's

UNSTABLE = f"what leaves its block is NaN or infinite once it is rounded: {LEFT}"


def apply(job: ApplyJob, journal: Journal) -> Iterator[BlockOutcome]:
    """Carry out `job.plan`. Yields one outcome per block, and one for a quantized head; safe to kill and call again.

    Finished steps are not repeated: their outcomes are yielded marked `resumed`.
    """
    done: list[CommitRecord] = job.crew.first(lambda: _found(journal), CommitRecord)
    previous = done[-1].digest() if done else ""
    if not done:
        previous = job.crew.first(lambda: _commit_rest(job, journal))
    for record in done[1:]:
        if record.outcome is not None:
            yield record.outcome.model_copy(update={"resumed": True})
    first = max(len(done) - 1, 0)
    if first == len(job.parts):
        return
    chain = start_chain(job)
    if first:
        chain.hidden = [chain.stream.keep(x) for x in _resumed(job, chain.share, journal, first)]
        if chain.full:
            chain.catch_up(job.trace.blocks[:first])
    for step, part in enumerate(job.parts[first:], first + 1):
        if isinstance(part, BlockTrace):
            outcome, shard_digest = quantize_block(job, chain, part, journal)
        else:
            outcome, shard_digest = quantize_head(job, chain, part, journal)
        states = [*chain.share.gathered(chain.hidden[:-1]), chain.hidden[-1]]
        hidden_digest = job.crew.first(partial(save_hidden, journal, step, states))
        del states
        record = CommitRecord(
            step=step,
            shard=outcome.shard,
            shard_digest=shard_digest,
            hidden_digest=hidden_digest,
            previous=previous,
            outcome=outcome,
        )
        job.crew.first(partial(journal.commit, record))
        previous = record.digest()
        yield outcome


def _found(journal: Journal) -> list[CommitRecord]:
    """What an unfinished run has left, once temporary files are gone."""
    done = journal.committed()
    journal.prepare()
    return done


def _resumed(job: ApplyJob, share: Share, journal: Journal, step: int) -> Iterator[Tensor]:
    """The hidden states kept with a step, of this process's batches and the probe; process 0 has the file."""
    states = _regrouped(journal, step, job) if job.crew.rank == 0 else None
    for place in range(share.count + 1):
        own = {} if states is None else {"state": next(states)}
        state = job.crew.spread(own)["state"]
        if place == share.count or place in share.places:
            yield state


def finished_logits(job: ApplyJob, journal: Journal) -> Tensor:
    """Logits of the probe after the last step, float32 `(1, tokens, vocabulary)`."""
    (probe,) = load_hidden(journal, len(job.parts), job.skeleton.device, first=-1)
    if job.shards.head is not None:
        return probe
    stream = BlockStream(job.skeleton)
    stream.start([job.probe])  # learns what the blocks of this family return
    job.skeleton.free(job.skeleton.model)
    logits = stream.leave(job.probe, probe)
    job.skeleton.free_rest()
    return logits


def _commit_rest(job: ApplyJob, journal: Journal) -> str:
    """Step 0: everything outside the blocks, copied."""
    name = job.shards.name(0)
    tensors = {tensor: job.shards.entries[tensor] for tensor in job.shards.shards[0]}
    digest = write_shard(journal.partial / name, job.shards.layout(0, {}), tensors)
    record = CommitRecord(step=0, shard=name, shard_digest=digest, hidden_digest="", previous="", outcome=None)
    journal.commit(record)
    return record.digest()


def save_hidden(journal: Journal, step: int, hidden: list[Tensor]) -> str:
    """Keep the live hidden states, verbatim, beside the commit of a step; returns their digest."""
    tensors = {f"{place:06d}": tensor for place, tensor in enumerate(hidden)}
    layout = {name: (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}
    return write_shard(journal.hidden_path(step), layout, tensors)


def load_hidden(journal: Journal, step: int, device: torch.device, first: int = 0) -> Iterator[Tensor]:
    """The hidden states kept with a step, from batch `first` on."""
    with safe_open(journal.hidden_path(step), "pt") as found:
        for name in sorted(found.keys())[first:]:
            yield found.get_tensor(name).to(device)


def _regrouped(journal: Journal, step: int, job: ApplyJob) -> Iterator[Tensor]:
    """Hidden states kept with a step, in the batches of this run, where those of the run before were larger."""
    states = load_hidden(journal, step, job.skeleton.device)
    if _kept_states(journal, step) == len(job.batches) + 1:
        yield from states
        return
    *rows, probe = states
    if not rows[0].numel():
        yield from (torch.empty(0) for _ in job.batches)
    else:
        yield from torch.split(torch.cat(rows), [len(batch) for batch in job.batches])
    yield probe


def _kept_states(journal: Journal, step: int) -> int:
    with safe_open(journal.hidden_path(step), "pt") as found:
        return len(found.keys())


def quantize_block(job: ApplyJob, chain: Chain, info: BlockTrace, journal: Journal) -> tuple[BlockOutcome, str]:
    """Quantize the linears of one block, write its shard and advance the chain through what was stored.

    Where what leaves the block is not usable, it is made again with nothing rounded but experts, which cannot be left
    out one by one. Raises InputError where it is the model itself that overflows.
    """
    began = time.monotonic()
    specs = job.plan.specs
    found = _carried(job, chain, info, specs)
    if found is None:
        outside = [x.name for x in info.linears if x.name in specs and x.expert is None]
        refused = tuple(Fallback(where=name, reason=UNSTABLE) for name in outside)
        found = _carried(job, chain, info, {name: spec for name, spec in specs.items() if name not in outside}, refused)
    if found is None:
        raise overflow(info)
    outcomes, fallbacks, packed = found
    shard, digest = job.crew.first(partial(_write_shard, job, info.index + 1, packed, journal))
    seconds = time.monotonic() - began
    return BlockOutcome(block=info.index, shard=shard, linears=outcomes, fallbacks=fallbacks, seconds=seconds), digest


Carried = tuple[tuple[LinearOutcome, ...], tuple[Fallback, ...], dict[str, dict[str, Tensor]]]


def _carried(
    job: ApplyJob,
    chain: Chain,
    info: BlockTrace,
    specs: Mapping[str, LinearSpec],
    refused: tuple[Fallback, ...] = (),
) -> Carried | None:
    """The outcomes of one block and its packed tensors, the chain advanced through it; None where that cannot be."""
    block = job.skeleton.load_block(info.index)
    outcomes, fallbacks, packed = [], list(refused), {}
    streams = chain.streams(info.index, job)
    if streams.logits is not None:
        job.skeleton.load_exit()
    method = replace(job.method, curvatures=chain.curvatures)
    rounds = BlockRounds(method, block, info, specs, streams)
    exporter = exporter_for(job.plan, job.trace)
    for rounded in rounds.rounded():
        linear, result = rounded.linear, rounded.result
        packed[linear.tensor] = exporter.packed_tensors(linear, result.codes)
        outcomes.append(_outcome(rounded))
        fallbacks += [Fallback(where=linear.name, reason=note) for note in result.fallbacks]
    advanced = chain.advance(info.index, rounds)
    if streams.logits is not None:
        job.skeleton.free_rest()
    packed[ATTENTION] = {}
    for name, stem in attention_stems(block, info).items() if rounds.attention else ():
        packed[ATTENTION] |= tensors_of(stem, rounds.attention[name], job.method.dtype)
    rounds.close()
    job.skeleton.free(block)
    return (tuple(outcomes), (*fallbacks, *rounds.refused), packed) if advanced else None


@torch.no_grad()
def quantize_head(job: ApplyJob, chain: Chain, head: LinearInfo, journal: Journal) -> tuple[BlockOutcome, str]:
    """Quantize the head on what the quantized blocks give it to read, and write its shard, the last one.

    The chain ends here: what remains of its hidden states are the probe's logits under the stored head.
    """
    began = time.monotonic()
    job.skeleton.load_exit()
    module = job.skeleton.model.get_submodule(head.name)
    target = module.weight
    full = chain.full if job.method.compares else None
    seen = head_input(module, chain.stream, chain.tokens, chain.hidden[:-1], full, share=chain.share)
    rounded = round_head(job.method, head, target.detach(), job.plan.specs[head.name], seen)
    codes = rounded.result.codes
    if not rounded.refused:
        target.copy_(codes.dequantize())
    probe = chain.stream.leave(job.probe, chain.hidden[-1])
    chain.end()
    chain.hidden[-1] = probe
    job.skeleton.free_rest()
    step = len(job.parts)
    packed = {} if rounded.refused else {head.tensor: exporter_for(job.plan, job.trace).packed_tensors(head, codes)}
    shard, digest = job.crew.first(partial(_write_shard, job, step, packed, journal))
    fallbacks = tuple(Fallback(where=head.name, reason=note) for note in rounded.result.fallbacks)
    seconds = time.monotonic() - began
    made = () if rounded.refused else (_outcome(rounded),)
    outcome = BlockOutcome(block=step - 1, shard=shard, linears=made, fallbacks=fallbacks, seconds=seconds)
    return outcome, digest


def _outcome(rounded: Rounded) -> LinearOutcome:
    """What one linear cost, against the weight that was to be rounded."""
    loss, whole = rounded.errors()
    if not math.isfinite(loss) or not math.isfinite(whole):
        raise InputError(f"{rounded.linear.name}: what it reads or makes of it is NaN or infinite", OVERFLOWS)
    return LinearOutcome(
        linear=rounded.linear.name,
        bits=rounded.result.codes.spec.bits,
        proxy_loss=loss,
        relative_loss=loss / max(whole, 1e-30),
        tokens=rounded.tokens,
    )


def _write_shard(
    job: ApplyJob, place: int, packed: Mapping[str, dict[str, Tensor]], journal: Journal
) -> tuple[str, str]:
    """Write shard `place`: packed linears, everything else byte for byte; returns its file name and digest."""
    tensors: dict[str, Tensor | TensorEntry] = dict(packed.get(ATTENTION, {}))
    for name in job.shards.shards[place]:
        if name in packed:
            tensors |= packed[name]
        else:
            tensors[name] = job.shards.entries[name]
    shard = job.shards.name(place)
    left = {x.name for tensor, x in job.shards.linears.items() if tensor not in packed}
    digest = write_shard(journal.partial / shard, job.shards.layout(place, job.plan.specs, left), tensors)
    return shard, digest
