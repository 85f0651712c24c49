"""Measure many small changes of one model, a block at a time, on common tokens.

A *base* is an assignment of formats, possibly empty (the full-precision model). Each *variant* changes a few
linears of it. All variants share one pass over the blocks: a variant has no hidden states of its own before
the first block it changes, and afterwards runs through the base's weights. So differences between two
variants are differences of the change alone, on the very same tokens.

As many variants go at once as `memory_bytes` of hidden states allow; the rest take further passes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from llmcompress.compress.head import HeadView
from llmcompress.compress.measuring import Change, Changes, MeasureJob, Text, changed_weight, sequence_kld
from llmcompress.compress.observe import collect_hessians, install_weight, weight_of
from llmcompress.compress.overflow import checked
from llmcompress.compress.rounding import Seen
from llmcompress.model.stream import BlockCall, BlockStream
from llmcompress.types import BlockTrace, LinearInfo

FLOAT_BYTES = 4


class Judge(Protocol):
    """Looks at the log-probabilities of every variant; what it found of variant `i` is row `i` of its table."""

    table: Tensor

    def see(self, variant: int, place: int, p: Tensor, q: Tensor) -> None:
        """Batch `place` `(batch, tokens, vocabulary)` at full precision and under a variant; variant 0 is the base."""


class KldJudge:
    """Keeps the mean KL divergence of every sequence."""

    def __init__(self, variants: int, batches: Sequence[Tensor]) -> None:
        self._starts = [0]
        for tokens in batches:
            self._starts.append(self._starts[-1] + len(tokens))
        self.table = torch.zeros(variants, self._starts[-1], dtype=torch.float64)

    def see(self, variant: int, place: int, p: Tensor, q: Tensor) -> None:
        """Add one batch of one variant."""
        self.table[variant, self._starts[place] : self._starts[place + 1]] = sequence_kld(p, q).cpu()


@dataclass
class _Chain:
    """One variant and its hidden states, one tensor per judging batch; None before it differs from the base."""

    number: int
    changes: Changes
    hidden: list[Tensor] | None = None


@dataclass
class _Standing:
    """Weights of the linears of one block under the base, and what is needed to change them."""

    block: nn.Module
    info: BlockTrace
    known: dict[int, Seen]
    original: dict[str, Tensor]
    weights: dict[str, Tensor]
    cache: dict[tuple[str, Change], Tensor] = field(default_factory=dict)


def measure_swaps(
    job: MeasureJob, base: Changes, variants: Sequence[Changes], *, text: Text, memory_bytes: int
) -> Tensor:
    """KL divergence from the full-precision model, float64 `(1 + variants, sequences)`; row 0 is the base."""
    judge = KldJudge(1 + len(variants), text.judging)
    run_swaps(job, base, variants, text=text, memory_bytes=memory_bytes, judge=judge)
    return judge.table


def run_swaps(
    job: MeasureJob, base: Changes, variants: Sequence[Changes], *, text: Text, memory_bytes: int, judge: Judge
) -> None:
    """Show `judge` the base and every variant. Processes take variants in turn, and the tables of all become one."""
    place = {linear.name: info.index for info in job.trace.blocks for linear in info.linears}
    blocks = len(job.trace.blocks)

    def first(number: int) -> int:
        return min((place.get(name, blocks) for name in variants[number]), default=blocks)

    crew = job.skeleton.crew
    every = sorted(range(len(variants)), key=first)
    order = every[crew.rank :: crew.size]
    width = int(job.skeleton.config.get_text_config().hidden_size)
    each = sum(tokens.numel() for tokens in text.judging) * width * FLOAT_BYTES
    size = max(memory_bytes // max(each, 1) - 2, 1)
    for start in range(0, max(len(order), 1), size):
        chains = [_Chain(number + 1, variants[number]) for number in order[start : start + size]]
        if start == 0:
            chains.insert(0, _Chain(0, {}))
        _Pass(job, base, chains, text).run(judge)
    for rank in range(crew.size if crew.size > 1 else 0):
        rows = [0] * (rank == 0) + [number + 1 for number in every[rank :: crew.size]]
        judge.table[rows] = crew.spread({"rows": judge.table[rows]}, rank)["rows"]


class _Pass:
    """One pass over the blocks with a few chains."""

    def __init__(self, job: MeasureJob, base: Changes, chains: list[_Chain], text: Text) -> None:
        self.job, self.base, self.chains, self.text = job, base, chains, text
        self.stream = BlockStream(job.skeleton)
        entered, self.calls = self.stream.start([*text.calibration, *text.judging])
        job.skeleton.free_rest()
        cut = len(text.calibration)
        self.calibration, self.hidden = entered[:cut], entered[cut:]  # under the base
        self.reference = list(self.hidden) if base else self.hidden  # the same list: the base is the reference
        self.judging_calls = self.calls[cut:]

    def run(self, judge: Judge) -> None:
        """Every block, then the logits."""
        for info in self.job.trace.blocks:
            block = self.job.skeleton.load_block(info.index)
            if self.base:
                self._advance(info, self.reference, self.judging_calls)
            self._through(self._standing(block, info))
            for hidden in self.reference:
                checked(info, hidden)
            self.job.skeleton.free(block)
        self._judge(judge)

    @torch.no_grad()
    def _advance(self, info: BlockTrace, hidden: list[Tensor], calls: list[list[BlockCall]]) -> None:
        for place, call in enumerate(calls):
            hidden[place] = self.stream.keep(self.stream.run_block(info.index, hidden[place], call[info.index]))

    def _standing(self, block: nn.Module, info: BlockTrace) -> _Standing:
        touched = [x for x in info.linears if x.name in self.base or any(x.name in c.changes for c in self.chains)]
        known: dict[int, Seen] = {}
        if touched and self.job.quantizer.NEEDS_HESSIAN and self.calibration:
            runs = [
                partial(self.stream.run_block, info.index, hidden, call[info.index])
                for hidden, call in zip(self.calibration, self.calls, strict=False)
            ]
            known = collect_hessians(block, info, runs)
        original = {x.name: weight_of(block, info, x).clone() for x in touched}
        standing = _Standing(block, info, known, original, dict(original))
        for linear in touched:
            if linear.name in self.base:
                standing.weights[linear.name] = self._changed(standing, linear, self.base[linear.name])
                install_weight(block, info, linear, standing.weights[linear.name])
        return standing

    def _changed(self, standing: _Standing, linear: LinearInfo, change: Change) -> Tensor:
        key = (linear.name, change)
        if key not in standing.cache:
            seen = standing.known.get(linear.shared_input)
            standing.cache[key] = changed_weight(self.job, standing.original[linear.name], seen, change)
        return standing.cache[key]

    def _through(self, standing: _Standing) -> None:
        """Every chain through one block, then the base itself."""
        info = standing.info
        linears = {x.name: x for x in info.linears}
        for chain in self.chains:
            here = [linears[name] for name in chain.changes if name in linears]
            if here and chain.hidden is None:
                chain.hidden = list(self.hidden)
            if chain.hidden is None:
                continue
            for linear in here:
                weight = self._changed(standing, linear, chain.changes[linear.name])
                install_weight(standing.block, info, linear, weight)
            self._advance(info, chain.hidden, self.judging_calls)
            for linear in here:
                install_weight(standing.block, info, linear, standing.weights[linear.name])
        if self.base or self.job.quantizer.NEEDS_HESSIAN:
            self._advance(info, self.calibration, self.calls[: len(self.calibration)])
        self._advance(info, self.hidden, self.judging_calls)

    @torch.no_grad()
    def _judge(self, judge: Judge) -> None:
        self.job.skeleton.load_exit()
        head = HeadView(self.job, self.stream, self.text.calibration, self.calibration)
        for place, tokens in enumerate(self.text.judging):
            p = torch.log_softmax(self.stream.leave(tokens, self.reference[place]), -1)
            for chain in self.chains:
                hidden = self.hidden if chain.hidden is None else chain.hidden
                with head.as_in({**self.base, **chain.changes}):
                    logits = self.stream.leave(tokens, hidden[place])
                judge.see(chain.number, place, p, torch.log_softmax(logits, -1))
        self.job.skeleton.free_rest()
