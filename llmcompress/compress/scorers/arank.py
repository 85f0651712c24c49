"""Rank of attention maps (gamma-MoD, arXiv 2410.13859): a block whose heads attend alike to everything is redundant.

Each head's causal softmax attention `(tokens, tokens)` with its diagonal set to 0 (with it, every such map
has full rank), its rank, mean over heads and samples. Option `arank.rank`: `effective`, the exponential of the
entropy of the normalised singular values, which needs no tolerance; or `exact`, in float32. `arank.samples`
and `arank.tokens`: how much of the calibration text is seen. The importance of a linear is the mean rank of
its block; a block whose tokens attend to nothing but themselves has rank 0. Takes a pass of its own with the
plain ("eager") attention, the only one that shows its weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.compress.overflow import checked
from llmcompress.compress.scoring import Measured, ScoreJob, layers_from_blocks
from llmcompress.errors import InputError
from llmcompress.model.stream import BlockStream
from llmcompress.types import Series, Unit

UNIT: Unit = "unitless"
NEEDS_DATA = True


def without_diagonal(attention: Tensor) -> Tensor:
    """A float32 copy of `(..., tokens, tokens)` with zeros on the diagonal."""
    found = attention.detach().float().clone()
    found.diagonal(dim1=-2, dim2=-1).zero_()
    return found


def exact_rank(attention: Tensor) -> Tensor:
    """Rank of each `(tokens, tokens)` map in float32 with torch's own tolerance; `(...)` float32."""
    rank: Tensor = torch.linalg.matrix_rank(attention.float())
    return rank.float()


def effective_rank(attention: Tensor) -> Tensor:
    """`exp(-sum p ln p)` with `p` the singular values over their sum: in [1, tokens], 0 for a map of zeros.

    attention  (..., tokens, tokens)
    returns    (...)  float32
    """
    values = torch.linalg.svdvals(attention.float())
    total = values.sum(-1)
    share = values / total.clamp_min(torch.finfo(values.dtype).tiny).unsqueeze(-1)
    rank = torch.special.entr(share).sum(-1).exp()
    return torch.where(total > 0, rank, 0.0)


RANKS = {"effective": effective_rank, "exact": exact_rank}


def _maps_in(output: Any, tokens: int) -> list[Tensor]:
    """The attention weights `(batch, heads, tokens, tokens)` among what a module returned beside its output."""
    others = output[1:] if isinstance(output, tuple) else ()
    square = (tokens, tokens)
    return [x for x in others if isinstance(x, Tensor) and x.ndim == 4 and tuple(x.shape[-2:]) == square]


@contextmanager
def watching_attention(block: nn.Module, tokens: int, found: list[Tensor]) -> Iterator[None]:
    """Append the attention weights that any module inside `block` returns, each once."""

    def after(_: nn.Module, __: Any, output: Any) -> None:
        for weights in _maps_in(output, tokens):
            if not any(weights is seen for seen in found):
                found.append(weights)

    handles = [module.register_forward_hook(after) for module in block.modules() if module is not block]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def eager_attention(model: Any) -> Iterator[None]:
    """A transformers model with its plain attention; what it had before is put back, errors or not."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def block_ranks(job: ScoreJob) -> list[float]:
    """Mean rank of the attention maps of each block.

    Raises InputError where a block's attention does not return its weights.
    """
    options, stream = job.options.arank, BlockStream(job.skeleton)
    rank = RANKS[options.rank]
    batches = torch.split(job.batches.tokens[: options.samples, : options.tokens], job.batch_size)
    hidden, calls = stream.start(batches)
    job.skeleton.free_rest()
    ranks = []
    for info in job.trace.blocks:
        block = job.skeleton.load_block(info.index)
        found = []
        for place, call in enumerate(calls):
            maps: list[Tensor] = []
            with watching_attention(block, hidden[place].shape[1], maps):
                hidden[place] = checked(info, stream.run_block(info.index, hidden[place], call[info.index]))
            found += [rank(without_diagonal(each)).flatten() for each in maps]
        job.skeleton.free(block)
        if not found:
            raise InputError(
                f"{info.name}: its attention does not return its weights, so their rank cannot be measured",
                f"use another scorer than arank for {job.trace.model_type} models",
            )
        ranks.append(float(torch.cat(found).mean()))
    return ranks


def score(job: ScoreJob) -> Measured:
    """Score every linear by the rank of its block's attention, measured on the full-precision model."""
    with eager_attention(job.skeleton.model):
        ranks = block_ranks(job)
    return Measured(layers_from_blocks(job, ranks), (Series(name="arank", values=tuple(ranks)),))
