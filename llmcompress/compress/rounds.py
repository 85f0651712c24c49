"""Quantize the linears of one block, group by group, each on what it will really read.

Shared by everything that carries a plan out, for good or on trial.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from llmcompress.compress.attention import round_attention
from llmcompress.compress.group import Look, Method, Rounded, round_group
from llmcompress.compress.learning import Lesson, Logits, learn_block
from llmcompress.compress.observe import (
    GroupWatch,
    InputSums,
    Reading,
    groups_of,
    install_weight,
    local_name,
    module_of,
)
from llmcompress.compress.online import mix_inputs
from llmcompress.compress.ranges import InputRanges
from llmcompress.compress.replay import Replay, in_memory
from llmcompress.compress.routed import Routed, rows_of
from llmcompress.kernels.inputs import InputQuantizer
from llmcompress.model.shares import Share
from llmcompress.model.shelf import Keep, Tray
from llmcompress.model.stream import BlockCall, call_block
from llmcompress.runtime.attention import AttentionRounding, attention_modules, forget
from llmcompress.runtime.inputs import attach, attach_stored, detach
from llmcompress.types import BlockTrace, Fallback, LinearSpec

FEWEST_BATCHES = 2


@dataclass
class Streams:
    """Calibration text on its way through the blocks, a batch each.

    stored  hidden states `(batch, tokens, hidden)` under everything stored so far
    full    the same under the full-precision model; None where it is not needed
    calls   how the model calls the block at hand
    leads   whether anything reads what leaves the block at hand
    logits  what they become, where the block at hand is the last and is to be learned
    keep    where they wait, see `BlockStream.keep`
    share   of which batches these are this process's part; None where they are all
    """

    stored: Sequence[Tensor]
    full: Sequence[Tensor] | None
    calls: Sequence[BlockCall]
    leads: bool = True
    logits: Logits | None = None
    keep: Keep = in_memory
    share: Share | None = None


class BlockRounds:
    """One block, its formats, and the text on its way through it."""

    def __init__(
        self, method: Method, block: nn.Module, info: BlockTrace, specs: Mapping[str, LinearSpec], streams: Streams
    ) -> None:
        self.method, self.info, self.specs, self.streams = method, info, specs, streams
        groups = [[x for x in members if x.name in specs] for members in groups_of(info).values()]
        self.groups = [members for members in groups if members]
        self.share = streams.share or Share(len(streams.calls))
        self.looks = bool(method.quantizer.NEEDS_HESSIAN and self.share.count)
        mix_inputs(block, info, specs)
        self.stored = Replay(block, info, streams.keep)
        compares = self.looks and streams.full is not None
        self.full = Replay(copied(block, streams.keep), info, streams.keep) if compares else None
        self.routed = Routed(block, info, streams.keep)
        self.full_routed = None if self.full is None else Routed(self.full.block, info, streams.keep)
        self._keep, self._keep_full = Tray(streams.keep), Tray(streams.keep)
        self.leaving: list[Tensor | None] = [None] * len(streams.full or ())
        self.quantizers: dict[str, InputQuantizer] = {}
        self.attention: dict[str, AttentionRounding] = {}  # by the attention's name inside the block
        self.refused: list[Fallback] = []

    def rounded(self) -> Iterator[Rounded]:
        """Quantize the linears that have a format, and install what a reader of the file will see.

        Those in `refused` stay as they are instead.
        """
        known: dict[int, Look | None] = {}
        if not self.method.options.true_sequential:
            self._round_attention()
            known = {place: self._look(place) for place in range(len(self.groups))}
        rounded: list[Rounded] = []
        for place, members in enumerate(self.groups):
            pairs = [(x, self.specs[x.name]) for x in members]
            looks, crew = [known.pop(place) if place in known else self._look(place)], self.share.crew
            found = self._installed(
                round_group(self.method, self.stored.block, self.info, members=pairs, looks=looks, crew=crew)
            )
            if not self.method.learners:
                found = [x.settled(measure=self.method.learns) for x in found]
            rounded += found
            del found
            if not self.attention:  # keys and values are read from here on
                self._round_attention()
        if not self.groups:
            self._round_attention()
        if self.method.learners and self.full is not None and rounded:
            zeros = [x for x in rounded if not x.wanted.any()]
            rounded = [*zeros, *_learn(self.method, self, [x for x in rounded if x.wanted.any()])]
        for x in rounded:
            codes = replace(x.result.codes, inputs=self.quantizers.get(x.linear.name))
            attach_stored(module_of(self.stored.block, self.info, x.linear), codes)
            yield replace(x, result=replace(x.result, codes=codes))

    def _installed(self, found: list[Rounded]) -> list[Rounded]:
        """Put the weights of a group in place; returns those of units of which nothing is refused.

        The others read what they always did.
        """
        refused = {x.linear.unit: x.result.fallbacks for x in found if x.refused}
        for x in found:
            if x.linear.unit not in refused:
                install_weight(self.stored.block, self.info, x.linear, x.result.codes.dequantize())
                continue
            self.refused += [Fallback(where=x.linear.name, reason=note) for note in refused[x.linear.unit]]
            self.quantizers.pop(x.linear.name, None)
            detach(module_of(self.stored.block, self.info, x.linear))
        return [x for x in found if x.linear.unit not in refused]

    def close(self) -> None:
        """Leave the block without anything that rounds inputs, for whoever loads other weights into it."""
        detach(self.stored.block)
        forget(attention_modules(self.stored.block).values())

    def _round_inputs(self, group: int) -> None:
        """From here on the linears of a group read what their format makes of their inputs."""
        members = self.groups[group]
        spec = self.specs[members[0].name].inputs
        if spec is None:
            return
        ranges = InputRanges(self.method.options, self.method.dtype, self.method.hints.quantizers, self.share)
        found = ranges.find(spec, members[0].name, self._inputs(group))
        for linear in members:
            self.quantizers[linear.name] = found
            attach(module_of(self.stored.block, self.info, linear), found)

    def _round_attention(self) -> None:
        """From here on the block's attention rounds what it is to."""
        options, block, streams = self.method.options, self.stored.block, self.streams
        if options.rounds_attention:
            pairs = zip(streams.stored, streams.calls, strict=True)
            runs = [partial(call_block, block, hidden, call) for hidden, call in pairs]
            self.attention = round_attention(block, runs, options=options, dtype=self.method.dtype, share=self.share)

    def _inputs(self, group: int) -> Iterator[Tensor]:
        """What the linears of a group read in the stored model, `(tokens, columns)` of each batch."""
        watch, final = GroupWatch(self.info, self.groups[group], whole=False), self._final(group)
        for place, call in enumerate(self.streams.calls):
            with self.stored.on(place, final):
                run = partial(call_block, self.stored.block, self.streams.stored[place], call)
                yield watch.read(self.stored.block, self.streams.stored[place], run).inputs

    def _look(self, group: int) -> Look | None:
        """What the linears of a group read, in both models where both are run."""
        self._round_inputs(group)
        if not self.looks:
            return None
        if self.groups[group][0].expert is not None:
            return self._look_routed(group)
        whole = self.full is not None and self.method.options.target == "residual"
        watch = GroupWatch(self.info, self.groups[group], whole=whole)
        sums, streams = InputSums(self.share, whole=watch.whole), self.streams
        coming = {x.name for members in self.groups[group + 1 :] for x in members}
        final = self._final(group)
        settled = self._settled(group + 1)
        until = "input" if self.stored.children[self._child(group)] & coming else "child"
        if not coming:
            until = "end" if streams.leads else "input"
        for place, call in enumerate(streams.calls):
            full = None
            if self.full is not None and streams.full is not None:
                with self.full.on(place, settled):
                    run = partial(call_block, self.full.block, streams.full[place], call)
                    full = watch.read(self.full.block, streams.full[place], run, until=until)
                if full.leaving is not None:
                    self.leaving[place] = self._keep_full(full.leaving)
                    full.leaving = None
                    self.full.drop(place)
            with self.stored.on(place, final):
                run = partial(call_block, self.stored.block, streams.stored[place], call)
                sums.add(watch.read(self.stored.block, streams.stored[place], run), full)
        seen, terms = sums.means()
        return seen.waiting(streams.keep), terms

    def _look_routed(self, group: int) -> Look:
        """What the linears of an expert read of the tokens that the stored model routes to it."""
        linear, sums, streams = self.groups[group][0], InputSums(self.share), self.streams
        for place, call in enumerate(streams.calls):
            with self.stored.on(place, self._final(group)):
                run = partial(call_block, self.stored.block, streams.stored[place], call)
                arrival = self.routed.arrival(place, linear, run)
            rows, full = rows_of(linear, arrival), None
            if self.full is not None and self.full_routed is not None and streams.full is not None:
                with self.full.on(place, self._settled(group)):
                    run = partial(call_block, self.full.block, streams.full[place], call)
                    beside = self.full_routed.arrival(place, linear, run)
                full = Reading(self.full_routed.read(linear, beside, rows), {})
            sums.add(Reading(self.routed.read(linear, arrival, rows), {}), full)
        seen, terms = sums.means()
        return seen.steadied().waiting(streams.keep), terms

    def _child(self, group: int) -> str:
        return local_name(self.info, self.groups[group][0]).partition(".")[0]

    def _final(self, group: int) -> set[str]:
        """Linears that are as they will be stored when a group is looked at."""
        if not self.method.options.true_sequential:
            return set()
        return self._settled(group)

    def _settled(self, group: int) -> set[str]:
        """Linears that are rounded before a group is, or not at all."""
        left = {x.name for members in self.groups[group:] for x in members}
        return {x.name for x in self.info.linears} - left

    @torch.no_grad()
    def leave_stored(self, place: int, call: BlockCall) -> Tensor:
        """Hidden states of batch `place` leaving the block as it will be stored."""
        with self.stored.on(place, self._settled(len(self.groups)), keep=False):
            return self._keep(call_block(self.stored.block, self.streams.stored[place], call))

    @torch.no_grad()
    def leave_full(self, place: int) -> Tensor:
        """Hidden states of batch `place` leaving the full-precision block."""
        found = self.leaving[place]
        if found is None and self.full is not None and self.streams.full is not None:
            left = call_block(self.full.block, self.streams.full[place], self.streams.calls[place])
            found = self._keep_full(left)
            self.leaving[place] = found
        if found is None:
            raise ValueError("the full-precision model was not run")
        return found


def copied(block: nn.Module, keep: Keep) -> nn.Module:
    """A copy of a block for reading alone, its parameters where hidden states wait."""
    parts = [(p, keep(p.detach())) for p in block.parameters()]
    own = {id(p): nn.Parameter(kept, requires_grad=False) for p, kept in parts if kept.data_ptr() != p.data_ptr()}
    return copy.deepcopy(block, own)


def _learn(method: Method, rounds: BlockRounds, rounded: list[Rounded]) -> Iterator[Rounded]:
    """Learn the rounding of a block from what was found linear by linear; of several ways the best is kept."""
    streams, block, info = rounds.streams, rounds.stored.block, rounds.info
    if len(streams.calls) < FEWEST_BATCHES:
        note = f"{FEWEST_BATCHES} batches of calibration text are needed to learn and to hold some out: not learned"
        yield from (replace(x, result=replace(x.result, fallbacks=(*x.result.fallbacks, note))) for x in rounded)
        return
    outputs = [rounds.leave_full(place) for place in range(len(streams.calls))]
    lesson = Lesson(block, info, streams.stored, outputs, streams.calls, streams.logits)
    found = []
    for learner in method.learners:
        learned = {x.linear.name: (x.linear, learner(x.wanted, x.result.codes, method.options)) for x in rounded}
        found.append(learn_block(lesson, learned, options=method.options, dtype=method.dtype))
    best, _ = min(found, key=lambda one: one[1].after)
    rounds.stored.forget()
    for x in rounded:
        install_weight(block, info, x.linear, best[x.linear.name].dequantize())
        yield replace(x, result=replace(x.result, codes=best[x.linear.name]))
