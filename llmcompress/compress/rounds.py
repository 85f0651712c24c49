"""Quantize the linears of one block, group by group, each on what it will really read.

Shared by everything that carries a plan out, for good or on trial.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.compress.learning import Learned, Lesson, learn_block
from llmcompress.compress.observe import DriftSums, GroupWatch, groups_of, install_weight, weight_of
from llmcompress.compress.rounding import Quantized, Request, Seen
from llmcompress.compress.targets import Targets
from llmcompress.model.stream import BlockCall, hidden_of
from llmcompress.types import BlockTrace, LinearInfo, LinearSpec, QuantizerOptions

Learner = Callable[..., Learned]
Look = tuple[Seen, dict[str, Tensor]]  # of one group: its input, and the residual term of each linear that has one


@dataclass(frozen=True)
class Method:
    """How to round: the quantizer, what it is told, the dtype of stored scales, and whether blocks are learned."""

    quantizer: ModuleType
    options: QuantizerOptions
    dtype: torch.dtype
    learns: bool = False

    @property
    def compares(self) -> bool:
        """Whether the full-precision model has to run beside the one that will be stored."""
        aims = self.options.target != "layer" and self.options.alpha != 0
        return bool(self.quantizer.NEEDS_HESSIAN and (aims or self.learner))

    @property
    def learner(self) -> Learner | None:
        """What the quantizer learns with once a whole block is rounded, where it does and is to."""
        found: Learner | None = getattr(self.quantizer, "learn", None)
        return found if self.learns else None


@dataclass
class Streams:
    """Calibration text on its way through the blocks, a batch each.

    stored  hidden states `(batch, tokens, hidden)` under everything stored so far
    full    the same under the full-precision model; None where it is not needed
    calls   how the model calls the block at hand
    """

    stored: Sequence[Tensor]
    full: Sequence[Tensor] | None
    calls: Sequence[BlockCall]


@dataclass(frozen=True)
class Rounded:
    """One linear, the weight that was asked for, what was made of it, and what was seen of its input."""

    linear: LinearInfo
    wanted: Tensor
    result: Quantized
    seen: Seen | None


def call_block(block: nn.Module, hidden: Tensor, call: BlockCall) -> Tensor:
    """Hidden states leaving a block."""
    return hidden_of(block(hidden, *call.args, **call.kwargs))


def round_block(
    method: Method, block: nn.Module, info: BlockTrace, specs: Mapping[str, LinearSpec], streams: Streams
) -> Iterator[Rounded]:
    """Quantize the linears of a loaded block that have a format, and install what a reader of the file will see."""
    groups = [[x for x in members if x.name in specs] for members in groups_of(info).values()]
    groups = [members for members in groups if members]
    looks = method.quantizer.NEEDS_HESSIAN and streams.stored
    twin = copy.deepcopy(block) if looks and streams.full is not None else None
    known: dict[int, Look] = {}
    rounded: list[Rounded] = []
    if looks and not method.options.true_sequential:
        known = {members[0].shared_input: _look(block, twin, info, members, streams) for members in groups}
    for members in groups:
        look = known.pop(members[0].shared_input, None)
        if looks and look is None:
            look = _look(block, twin, info, members, streams)
        found = _round_group(method, block, info, members=[(x, specs[x.name]) for x in members], look=look)
        if method.learner is None:
            yield from found
        rounded += found
    if method.learner is not None and twin is not None:
        yield from _learn(method, block, twin, info, rounded=rounded, streams=streams)


def _look(
    block: nn.Module, twin: nn.Module | None, info: BlockTrace, members: Sequence[LinearInfo], streams: Streams
) -> Look:
    """What the linears of a group read, in both models where both are run."""
    watch, sums = GroupWatch(info, members), DriftSums()
    for place, call in enumerate(streams.calls):

        def run(module: nn.Module, hidden: Tensor, call: BlockCall = call) -> Any:
            return call_block(module, hidden, call)

        full = None
        if twin is not None and streams.full is not None:
            full = watch.read(twin, streams.full[place], run)
        sums.add(watch.read(block, streams.stored[place], run), full)
    return sums.means()


def _round_group(
    method: Method,
    block: nn.Module,
    info: BlockTrace,
    *,
    members: Sequence[tuple[LinearInfo, LinearSpec]],
    look: Look | None,
) -> list[Rounded]:
    wanted, seen = [weight_of(block, info, linear).contiguous() for linear, _ in members], None
    if look is not None:
        seen, residuals = look
        wanted, seen = aim(method.options, seen, wanted, [residuals.get(linear.name) for linear, _ in members])
    requests = [Request(weight, spec) for weight, (_, spec) in zip(wanted, members, strict=True)]
    results = method.quantizer.quantize(requests, seen, options=method.options, dtype=method.dtype)
    found = []
    for (linear, _), weight, result in zip(members, wanted, results, strict=True):
        install_weight(block, info, linear, result.codes.dequantize())
        found.append(Rounded(linear, weight, result, seen))
    return found


def _learn(
    method: Method, block: nn.Module, twin: nn.Module, info: BlockTrace, *, rounded: list[Rounded], streams: Streams
) -> Iterator[Rounded]:
    """Learn the rounding of a block from what was found linear by linear."""
    if method.learner is None or streams.full is None:
        return
    with torch.no_grad():
        pairs = zip(streams.full, streams.calls, strict=True)
        outputs = [call_block(twin, hidden, call) for hidden, call in pairs]
    lesson = Lesson(block, info, streams.stored, outputs, streams.calls)
    learned = {
        x.linear.name: (x.linear, method.learner(x.wanted, x.result.codes, options=method.options)) for x in rounded
    }
    best, _ = learn_block(lesson, learned, options=method.options, dtype=method.dtype)
    for x in rounded:
        install_weight(block, info, x.linear, best[x.linear.name].dequantize())
        yield replace(x, result=replace(x.result, codes=best[x.linear.name]))


def round_head(method: Method, head: LinearInfo, weight: Tensor, spec: LinearSpec, seen: Seen | None) -> Rounded:
    """Quantize the head's weight `(rows, columns)`; nothing is installed."""
    wanted = weight
    if seen is not None:
        (wanted,), seen = aim(method.options, seen, [weight], [None])
    (result,) = method.quantizer.quantize([Request(wanted, spec)], seen, options=method.options, dtype=method.dtype)
    return Rounded(head, wanted, result, seen)


def aim(
    options: QuantizerOptions, seen: Seen, weights: Sequence[Tensor], residuals: Sequence[Tensor | None]
) -> tuple[list[Tensor], Seen]:
    """The weights to round in place of the original ones, and what is left for the quantizer to know."""
    if seen.drift is None or options.target in ("layer", "gptaq"):
        return list(weights), seen
    targets = Targets(seen, options.damp, options.alpha)
    terms = residuals if options.target == "residual" else [None] * len(weights)
    found = [targets.of(weight, term) for weight, term in zip(weights, terms, strict=True)]
    return found, replace(seen, drift=None)
