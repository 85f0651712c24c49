"""Carry allocations out without writing anything, and measure what they really cost.

All allocations share one pass over the checkpoint: each block is quantized once per allocation, and
each keeps its own chain of hidden states, because the next block must see what came before it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from llmcompress.compress.head import HeadView
from llmcompress.compress.measuring import MeasureJob, Text, changed_weight, sequence_dnll, sequence_kld
from llmcompress.compress.observe import collect_hessians, install_weight, weight_of
from llmcompress.model.stream import BlockCall, BlockStream
from llmcompress.types import BitAllocation, BlockTrace, LinearSpec


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
    entered, calls = stream.start([*text.calibration, *text.judging])
    job.skeleton.free_rest()
    cut = len(text.calibration)
    chains = [list(entered) for _ in allocations]
    reference = entered[cut:]
    tables = [{a.linear: a.spec for a in allocation.assigned} for allocation in allocations]
    for info in job.trace.blocks:
        for specs, hidden in zip(tables, chains, strict=True):
            block = job.skeleton.load_block(info.index)
            runs = [partial(stream.run_block, info.index, hidden[p], calls[p][info.index]) for p in range(cut)]
            hessians = collect_hessians(block, info, runs)[0] if job.quantizer.NEEDS_HESSIAN else {}
            _quantize(job, block, info, specs=specs, hessians=hessians)
            _advance(stream, info.index, hidden, calls)
        job.skeleton.load_block(info.index)
        _advance(stream, info.index, reference, calls[cut:])
        job.skeleton.free(job.skeleton.blocks[info.index])
    job.skeleton.load_rest()
    pairs = [
        _damage(job, stream, text, reference=reference, hidden=hidden, specs=specs)
        for specs, hidden in zip(tables, chains, strict=True)
    ]
    job.skeleton.free_rest()
    return Damage(torch.stack([kld for kld, _ in pairs]), torch.stack([dnll for _, dnll in pairs]))


def _quantize(
    job: MeasureJob, block: nn.Module, info: BlockTrace, *, specs: Mapping[str, LinearSpec], hessians: dict[int, Tensor]
) -> None:
    for linear in info.linears:
        if linear.name in specs:
            weight = weight_of(block, info, linear).contiguous()
            stored = changed_weight(job, weight, hessians.get(linear.shared_input), specs[linear.name])
            install_weight(block, info, linear, stored)


@torch.no_grad()
def _advance(stream: BlockStream, index: int, hidden: list[Tensor], calls: list[list[BlockCall]]) -> None:
    for place, call in enumerate(calls):
        hidden[place] = stream.run_block(index, hidden[place], call[index])


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
    head = HeadView(job, stream, text.calibration, hidden[:cut])
    klds, dnlls = [], []
    for tokens, left, right in zip(text.judging, reference, hidden[cut:], strict=True):
        p = torch.log_softmax(stream.leave(tokens, left), -1)
        with head.as_in(specs):
            q = torch.log_softmax(stream.leave(tokens, right), -1)
        klds.append(sequence_kld(p, q).cpu())
        dnlls.append(sequence_dnll(p, q, tokens).cpu())
    return torch.cat(klds), torch.cat(dnlls)
