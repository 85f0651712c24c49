"""Carry allocations out without writing anything, and measure what they really cost.

All allocations share one pass over the checkpoint: each block is quantized once per allocation, and
each keeps its own chain of hidden states, because the next block must see what came before it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.compress.head import HeadView, logits_reader
from llmcompress.compress.measuring import MeasureJob, Text, sequence_dnll, sequence_kld
from llmcompress.compress.rounds import BlockRounds, Streams
from llmcompress.model.stream import BlockCall, BlockStream
from llmcompress.types import BitAllocation, LinearSpec


@dataclass(frozen=True)
class Damage:
    """Of each allocation on each sequence, nats per token, float64 `(allocations, sequences)`.

    `kld` is the KL divergence from the full-precision model, `dnll` the rise of the negative log-likelihood.
    """

    kld: Tensor
    dnll: Tensor


def measure_allocations(job: MeasureJob, allocations: Sequence[BitAllocation], text: Text) -> Damage:
    """Carry allocations out and compare them with the full-precision model.

    Hessians come from `text.calibration` alone; sequences are those of `text.judging`.
    """
    stream = BlockStream(job.skeleton)
    full, calls = stream.start([*text.calibration, *text.judging])
    job.skeleton.free_rest()
    cut, compares = len(text.calibration), job.method.compares
    chains = [list(full) for _ in allocations]
    tables = [{a.linear: a.spec for a in allocation.assigned} for allocation in allocations]
    for info in job.trace.blocks:
        here = [call[info.index] for call in calls[:cut]]
        logits = None
        if job.method.learners and info is job.trace.blocks[-1]:
            job.skeleton.load_rest()
            logits = logits_reader(stream, text.calibration)
        for specs, hidden in zip(tables, chains, strict=True):
            block = job.skeleton.load_block(info.index)
            streams = Streams(hidden[:cut], full[:cut] if compares else None, here, logits=logits)
            rounds = BlockRounds(job.method, block, info, specs, streams)
            for _ in rounds.rounded():
                pass
            hidden[:cut] = [rounds.leave_stored(place, call) for place, call in enumerate(here)]
            _advance(stream, info.index, hidden, calls, cut)
            rounds.close()
        job.skeleton.load_block(info.index)
        if compares:
            full[:cut] = [rounds.leave_full(place) for place in range(cut)]
        _advance(stream, info.index, full, calls, cut)
        job.skeleton.free(job.skeleton.blocks[info.index])
    job.skeleton.load_rest()
    pairs = [
        _damage(job, stream, text, reference=full, hidden=hidden, specs=specs)
        for specs, hidden in zip(tables, chains, strict=True)
    ]
    job.skeleton.free_rest()
    return Damage(torch.stack([kld for kld, _ in pairs]), torch.stack([dnll for _, dnll in pairs]))


@torch.no_grad()
def _advance(
    stream: BlockStream, index: int, hidden: list[Tensor], calls: list[list[BlockCall]], first: int = 0
) -> None:
    for place in range(first, len(calls)):
        hidden[place] = stream.run_block(index, hidden[place], calls[place][index])


@torch.no_grad()
def _damage(
    job: MeasureJob,
    stream: BlockStream,
    text: Text,
    *,
    reference: list[Tensor],
    hidden: list[Tensor],
    specs: Mapping[str, LinearSpec],
) -> tuple[Tensor, Tensor]:
    cut = len(text.calibration)
    compared = reference[:cut] if job.method.compares else None
    head = HeadView(job, stream, text.calibration, hidden[:cut], compared)
    klds, dnlls = [], []
    for tokens, left, right in zip(text.judging, reference[cut:], hidden[cut:], strict=True):
        p = torch.log_softmax(stream.leave(tokens, left), -1)
        with head.as_in(specs):
            q = torch.log_softmax(stream.leave(tokens, right), -1)
        klds.append(sequence_kld(p, q).cpu())
        dnlls.append(sequence_dnll(p, q, tokens).cpu())
    return torch.cat(klds), torch.cat(dnlls)
