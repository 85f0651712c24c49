"""Carry allocations out without writing anything, and measure what they really cost.

All allocations share one pass over the checkpoint: each block is quantized once per allocation, and
each keeps its own chain of hidden states, because the next block must see what came before it.
"""

from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
from torch import Tensor, nn

from llmcompress.compress.observe import collect_hessians, install_weight, weight_of
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import BlockCall, BlockStream
from llmcompress.types import BitAllocation, BlockTrace, LinearSpec, ModelTrace, QuantizerOptions


@dataclass(frozen=True)
class TrialJob:
    """The model and the quantizer to try; `dtype` is that of stored scales."""

    skeleton: Skeleton
    trace: ModelTrace
    quantizer: ModuleType
    options: QuantizerOptions
    dtype: torch.dtype


def measure_allocations(
    job: TrialJob, allocations: list[BitAllocation], calibration: list[Tensor], held_out: list[Tensor]
) -> list[float]:
    """Mean KL divergence from the full-precision model on `held_out`, nats per token, for each allocation.

    Token batches are int64 `(batch, tokens)`; Hessians come from `calibration` alone.
    """
    stream = BlockStream(job.skeleton)
    held_out = held_out or calibration
    entered, calls = stream.start([*calibration, *held_out])
    job.skeleton.free_rest()
    chains = [list(entered) for _ in allocations]
    reference = list(entered)
    tables = [{a.linear: a.spec for a in allocation.assigned} for allocation in allocations]
    for info in job.trace.blocks:
        for specs, hidden in zip(tables, chains, strict=True):
            block = job.skeleton.load_block(info.index)
            runs = [
                partial(stream.run_block, info.index, hidden[p], calls[p][info.index]) for p in range(len(calibration))
            ]
            hessians, _ = collect_hessians(block, info, runs)
            _quantize(job, block, info, specs=specs, hessians=hessians)
            _advance(stream, info.index, hidden, calls)
        job.skeleton.load_block(info.index)
        _advance(stream, info.index, reference, calls)
        job.skeleton.free(job.skeleton.blocks[info.index])
    job.skeleton.load_rest()
    first = len(calibration)
    measured = [_mean_kld(stream, held_out, reference[first:], hidden[first:]) for hidden in chains]
    job.skeleton.free_rest()
    return measured


def _quantize(
    job: TrialJob, block: nn.Module, info: BlockTrace, *, specs: dict[str, LinearSpec], hessians: dict[int, Tensor]
) -> None:
    for linear in info.linears:
        if linear.name in specs:
            weight = weight_of(block, info, linear).contiguous()
            hessian = hessians.get(linear.shared_input)
            result = job.quantizer.quantize(weight, hessian, specs[linear.name], options=job.options, dtype=job.dtype)
            install_weight(block, info, linear, result.codes.dequantize())


@torch.no_grad()
def _advance(stream: BlockStream, index: int, hidden: list[Tensor], calls: list[list[BlockCall]]) -> None:
    for place, call in enumerate(calls):
        hidden[place] = stream.run_block(index, hidden[place], call[index])


@torch.no_grad()
def _mean_kld(stream: BlockStream, batches: list[Tensor], reference: list[Tensor], hidden: list[Tensor]) -> float:
    total, count = 0.0, 0
    for tokens, left, right in zip(batches, reference, hidden, strict=True):
        p = torch.log_softmax(stream.leave(tokens, left), -1)
        q = torch.log_softmax(stream.leave(tokens, right), -1)
        total += float((p.exp() * (p - q)).sum(dtype=torch.float64))
        count += tokens.numel()
    return total / count
