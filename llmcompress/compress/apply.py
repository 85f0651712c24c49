"""Carry out a plan: rewrite the model a block at a time, each step durable before the next begins.

Law: advance with what was stored. The next block sees exactly the weights a reader of the file will see.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from safetensors import safe_open
from torch import Tensor

from llmcompress.compress.attention import attention_stems
from llmcompress.compress.formats import exporter_for
from llmcompress.compress.head import head_input, logits_reader
from llmcompress.compress.journal import CommitRecord, Journal
from llmcompress.compress.rewriting.hints import Hints
from llmcompress.compress.rounds import BlockRounds, Method, Rounded, Streams, round_head
from llmcompress.compress.shards import ShardMap, write_shard
from llmcompress.errors import InputError
from llmcompress.model.checkpoint import DTYPE_NAMES, TORCH_DTYPES
from llmcompress.model.crew import ALONE, Crew
from llmcompress.model.shares import Share
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import BlockCall, BlockStream
from llmcompress.plugins import find
from llmcompress.preflight.header import TensorEntry
from llmcompress.runtime.attention import tensors_of
from llmcompress.types import BlockOutcome, BlockTrace, Fallback, LinearInfo, LinearOutcome, ModelTrace, Plan

QUANTIZERS = "llmcompress.compress.quantizers"
ATTENTION = "attention"  # among packed tensors, those that are no linear's

OVERFLOWS = "the model overflows: evaluate the original, or give it text it was made for with --calibration"


@dataclass(frozen=True)
class ApplyJob:
    """Everything a plan needs to be carried out.

    `batches` are the calibration tokens, int64 `(batch, tokens)` each, empty where the quantizer needs
    none; `probe` is one short batch whose logits at the end are what `verify` compares with.
    """

    plan: Plan
    trace: ModelTrace
    skeleton: Skeleton
    shards: ShardMap
    batches: list[Tensor]
    probe: Tensor
    hints: Hints = field(default_factory=Hints)

    @property
    def crew(self) -> Crew:
        """The processes that carry it out."""
        return self.skeleton.crew

    @property
    def share(self) -> Share:
        """This process's part of the batches. Learning goes from one batch to another, and needs them all."""
        return Share(len(self.batches), ALONE if self.method.learners else self.crew)

    @property
    def method(self) -> Method:
        """How the plan rounds."""
        dtype = TORCH_DTYPES[self.shards.scale_dtype]
        return Method(find(QUANTIZERS, self.plan.quantizer), self.plan.options, dtype, learns=True, hints=self.hints)

    @property
    def parts(self) -> tuple[BlockTrace | LinearInfo, ...]:
        """What is quantized, a step each: the blocks, then the head where it is to be."""
        head = self.shards.head
        return self.trace.blocks if head is None else (*self.trace.blocks, head)


@dataclass
class Chain:
    """Hidden states of every batch of this process, the probe last, and how the model calls its blocks with them.

    `tokens` are its batches, of all of which they are a `share`. `full` are the batches' hidden states under the
    full-precision model, empty where it does not run beside.
    """

    stream: BlockStream
    share: Share
    tokens: list[Tensor]
    hidden: list[Tensor]
    full: list[Tensor]
    calls: list[list[BlockCall]]

    @torch.no_grad()
    def advance(self, index: int, rounds: BlockRounds) -> None:
        """Every batch through block `index` as it will be stored, and as it was where that runs beside."""
        if rounds.streams.leads:
            for place in range(len(self.full)):
                self.full[place] = rounds.leave_full(place)
            for place, call in enumerate(rounds.streams.calls):
                self.hidden[place] = rounds.leave_stored(place, call)
        else:
            self.end()
        self.hidden[-1] = self.stream.run_block(index, self.hidden[-1], self.calls[-1][index])
        finite = all(bool(x.abs().amax().isfinite()) for x in (*self.hidden, *self.full) if x.numel())
        if not self.share.crew.agreed(finite):
            raise InputError(f"{rounds.info.name}: what leaves it is NaN or infinite on calibration text", OVERFLOWS)

    @torch.no_grad()
    def catch_up(self, done: Sequence[BlockTrace]) -> None:
        """Run the full-precision model through blocks that are finished."""
        for info in done:
            block = self.stream.skeleton.load_block(info.index)
            for place, hidden in enumerate(self.full):
                left = self.stream.run_block(info.index, hidden, self.calls[place][info.index])
                self.full[place] = self.stream.keep(left)
            self.stream.skeleton.free(block)

    def end(self) -> None:
        """Nothing reads the batches any more; the probe goes on."""
        self.hidden[:-1], self.full = [torch.empty(0) for _ in self.hidden[:-1]], []

    def streams(self, index: int, job: ApplyJob) -> Streams:
        """The batches as they enter block `index`."""
        batches = len(self.calls) - 1
        calls = [call[index] for call in self.calls[:batches]]
        learns, last = bool(job.method.learners), index + 1 == len(job.trace.blocks)
        logits = logits_reader(self.stream, self.tokens) if learns and last else None
        leads = learns or index + 1 < len(job.parts)
        full = list(self.full) if job.method.compares else None
        return Streams(self.hidden[:batches], full, calls, leads, logits, self.stream.keep, self.share)


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


def start_chain(job: ApplyJob) -> Chain:
    """Enter the model with every batch and the probe."""
    stream, share = BlockStream(job.skeleton), job.share
    tokens = share.of(job.batches)
    hidden, calls = stream.start([*tokens, job.probe])
    job.skeleton.free_rest()
    job.skeleton.free(job.skeleton.blocks[0])
    full = list(hidden[:-1]) if job.method.compares else []
    return Chain(stream, share, tokens, hidden, full, calls)


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
    """Quantize the linears of one block, write its shard and advance the chain through what was stored."""
    began = time.monotonic()
    block = job.skeleton.load_block(info.index)
    outcomes, fallbacks, packed = [], [], {}
    streams = chain.streams(info.index, job)
    if streams.logits is not None:
        job.skeleton.load_exit()
    rounds = BlockRounds(job.method, block, info, job.plan.specs, streams)
    exporter = exporter_for(job.plan, job.trace)
    for rounded in rounds.rounded():
        linear, result = rounded.linear, rounded.result
        packed[linear.tensor] = exporter.packed_tensors(linear, result.codes)
        outcomes.append(_outcome(rounded))
        fallbacks += [Fallback(where=linear.name, reason=note) for note in result.fallbacks]
    chain.advance(info.index, rounds)
    if streams.logits is not None:
        job.skeleton.free_rest()
    packed[ATTENTION] = {}
    for name, stem in attention_stems(block, info).items() if rounds.attention else ():
        packed[ATTENTION] |= tensors_of(stem, rounds.attention[name], job.method.dtype)
    rounds.close()
    job.skeleton.free(block)
    shard, digest = job.crew.first(partial(_write_shard, job, info.index + 1, packed, journal))
    seconds = time.monotonic() - began
    return (
        BlockOutcome(
            block=info.index, shard=shard, linears=tuple(outcomes), fallbacks=tuple(fallbacks), seconds=seconds
        ),
        digest,
    )


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
    target.copy_(codes.dequantize())
    probe = chain.stream.leave(job.probe, chain.hidden[-1])
    chain.end()
    chain.hidden[-1] = probe
    job.skeleton.free_rest()
    step = len(job.parts)
    packed = {head.tensor: exporter_for(job.plan, job.trace).packed_tensors(head, codes)}
    shard, digest = job.crew.first(partial(_write_shard, job, step, packed, journal))
    fallbacks = tuple(Fallback(where=head.name, reason=note) for note in rounded.result.fallbacks)
    seconds = time.monotonic() - began
    outcome = BlockOutcome(
        block=step - 1, shard=shard, linears=(_outcome(rounded),), fallbacks=fallbacks, seconds=seconds
    )
    return outcome, digest


def _outcome(rounded: Rounded) -> LinearOutcome:
    """What one linear cost, against the weight that was to be rounded."""
    loss, whole = rounded.errors()
    bits = rounded.result.codes.spec.bits
    if not math.isfinite(loss) or not math.isfinite(whole):
        raise InputError(f"{rounded.linear.name}: what it reads or makes of it is NaN or infinite", OVERFLOWS)
    return LinearOutcome(
        linear=rounded.linear.name,
        bits=bits,
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
    digest = write_shard(journal.partial / shard, job.shards.layout(place, job.plan.specs), tensors)
    return shard, digest
