"""What every scorer is given, the one pass that many of them share, and the arithmetic they have in common.

A scorer is a file with `UNIT`, `NEEDS_DATA` and one of two functions. `observer(job)` returns an Observer,
which watches the full-precision model go by once, together with every other observer asked for.
`score(job)` does its own passes: gradients, measured swaps, anything that is more than watching.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor, nn

from llmcompress.compress.candidates import candidates_for as candidates_for
from llmcompress.compress.dealing import dealt
from llmcompress.compress.grid import gaussian_distortion
from llmcompress.compress.overflow import checked
from llmcompress.compress.rounding import Request, Seen
from llmcompress.model.shares import Share
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import BlockStream
from llmcompress.model.text import Batches
from llmcompress.options import ScorerOptions
from llmcompress.plugins import find
from llmcompress.types import (
    BlockTrace,
    Candidate,
    LayerScore,
    LinearInfo,
    LinearSpec,
    ModelTrace,
    QuantizerOptions,
    Series,
)

SCORERS = "llmcompress.compress.scorers"


@dataclass(frozen=True)
class ScoreJob:
    """One model, one calibration text, and the formats each linear could get."""

    skeleton: Skeleton
    trace: ModelTrace
    batches: Batches
    candidates: Mapping[str, tuple[LinearSpec, ...]]  # by linear name; linears that fit no group size are absent
    scale_dtype: torch.dtype
    quantizer: ModuleType
    rounding: QuantizerOptions = field(default_factory=QuantizerOptions)
    options: ScorerOptions = field(default_factory=ScorerOptions)
    batch_size: int = 8
    seed: int = 0
    working_bits: int | None = None  # the width nearest to the budget, where there is one

    @property
    def in_turn(self) -> bool:
        """Whether memory is limited, so that what need not be there at once should not be."""
        return self.skeleton.shelf.everything

    def stream(self) -> tuple[BlockStream, list[Tensor]]:
        """A fresh stream and the token batches to send through it: all of them, in every process."""
        return BlockStream(self.skeleton), self.batches.split(self.batch_size)

    def shared(self) -> tuple[BlockStream, list[Tensor], Share]:
        """A fresh stream, this process's part of the batches, and which part that is."""
        stream, tokens = self.stream()
        share = Share(len(tokens), self.skeleton.crew)
        return stream, share.of(tokens), share


@dataclass(frozen=True)
class Measured:
    """What a scorer found: a score for every linear that has candidates, in trace order, and figures per block."""

    layers: tuple[LayerScore, ...]
    series: tuple[Series, ...] = ()


class Observer:
    """Watches one pass over the blocks. Every method may be left as it is.

    For each block, in order: `open` before it runs (put hooks there, or look at its weights), `see` for every
    batch with the hidden states `(batch, tokens, hidden)` around the block, `close` after the last batch.
    Data-free observers get `open` and `close` only.

    SHARES  whether it can put together what it sees in several processes; then `share` says of which batches that is
    """

    SHARES = False

    def __init__(self, job: ScoreJob) -> None:
        self.job = job
        self.share = Share(len(job.batches.split(job.batch_size)))

    def open(self, block: nn.Module, info: BlockTrace) -> AbstractContextManager[object]:
        """Enter a loaded block; the context is left after its last batch."""
        return nullcontext()

    def see(self, info: BlockTrace, entering: Tensor, leaving: Tensor) -> None:
        """One batch went through the block."""

    def close(self, block: nn.Module, info: BlockTrace) -> None:
        """Every batch went through the block, which is still loaded."""

    def finish(self) -> Measured:
        """What was found. Called once, after the last block."""
        return Measured(())


def run_scorers(names: Sequence[str], job: ScoreJob) -> dict[str, Measured]:
    """Run scorers by name; all that only watch share one pass. Raises InputError for an unknown name."""
    plugins = {name: find(SCORERS, name) for name in dict.fromkeys(names)}
    watching = {name: plugin.observer(job) for name, plugin in plugins.items() if hasattr(plugin, "observer")}
    if watching:
        data = any(plugins[name].NEEDS_DATA for name in watching)
        _watch(job, [(watching[name], plugins[name].NEEDS_DATA) for name in watching], data=data)
    return {
        name: watching[name].finish() if name in watching else plugin.score(job) for name, plugin in plugins.items()
    }


def _watch(job: ScoreJob, observers: list[tuple[Observer, bool]], *, data: bool) -> None:
    """Send the batches through the blocks once, under the eyes of all observers."""
    seeing = [observer for observer, wants in observers if wants]
    stream, tokens = job.stream()
    if all(observer.SHARES for observer in seeing):
        stream, tokens, share = job.shared()
        for observer in seeing:
            observer.share = share
    hidden, calls = stream.start(tokens) if data else ([], [])
    job.skeleton.free_rest()
    for info in job.trace.blocks:
        block = job.skeleton.load_block(info.index)
        with ExitStack() as stack:
            for observer, _ in observers:
                stack.enter_context(observer.open(block, info))
            for place, call in enumerate(calls):
                with torch.no_grad():
                    leaving = checked(info, stream.run_block(info.index, hidden[place], call[info.index]))
                _show(seeing, info, hidden[place], leaving)
                hidden[place] = stream.keep(leaving)
        for observer, _ in observers:
            observer.close(block, info)
        job.skeleton.free(block)


@torch.no_grad()
def _show(observers: list[Observer], info: BlockTrace, entering: Tensor, leaving: Tensor) -> None:
    for observer in observers:
        observer.see(info, entering, leaving)


def rounding_errors(
    job: ScoreJob, weights: Mapping[str, Tensor], seen: Seen | None = None
) -> Iterator[tuple[str, LinearSpec, Tensor]]:
    """`(linear, spec, dW)` for every candidate of linears that read one input: what the quantizer does to them.

    One that needs a Hessian does without where none is at hand: most round to nearest then.
    """
    asked = [(name, spec) for name in weights for spec in job.candidates[name]]
    requests = [Request(weights[name], spec) for name, spec in asked]
    crew = job.skeleton.crew
    results = dealt(crew, job.quantizer, requests, seen, options=job.rounding, dtype=job.scale_dtype)
    for (name, spec), result in zip(asked, results, strict=True):
        yield name, spec, result.codes.dequantize().sub_(weights[name])


def layer_score(
    linear: str, rows: Iterable[tuple[LinearSpec, float, float | None]], *, importance: float | None = None
) -> LayerScore:
    """The score of a linear: its formats with damage and standard error, those left out that are not finite.

    Without any it counts as not scored: it gets the widest of its formats that the budget has room for.
    """
    candidates = tuple(
        Candidate(spec=spec, damage=damage, standard_error=error)
        for spec, damage, error in rows
        if math.isfinite(damage) and (error is None or math.isfinite(error))
    )
    known = importance if importance is not None and math.isfinite(importance) else None
    return LayerScore(linear=linear, importance=known, candidates=candidates)


def layers_from_importance(job: ScoreJob, importance: Callable[[LinearInfo], float]) -> tuple[LayerScore, ...]:
    """Turn a unitless importance of each linear into damage: times the distortion of Gaussian weights at each width.

    `importance(linear)` must not be negative. The table, not the weights, gives the shape over the widths, so
    that a measure which costs nothing does not cost a rounding of every linear at every width. The experts of a block
    count together as one linear for each projection: a token reads some of them.
    """
    layers, share = [], _expert_shares(job.trace)
    for linear in job.trace.linears:
        if linear.name in job.candidates:
            value = importance(linear)
            each = value * share[linear.name]
            rows = ((spec, each * gaussian_distortion(spec), None) for spec in job.candidates[linear.name])
            layers.append(layer_score(linear.name, rows, importance=value))
    return tuple(layers)


def _expert_shares(trace: ModelTrace) -> dict[str, float]:
    """Of each linear: one, and of an expert's one over the number of experts in its block."""
    shares: dict[str, float] = {}
    for info in trace.blocks:
        count = len({x.expert for x in info.linears if x.expert is not None})
        shares |= {x.name: 1.0 if x.expert is None else 1.0 / count for x in info.linears}
    return shares


def layers_from_blocks(job: ScoreJob, importance: Sequence[float]) -> tuple[LayerScore, ...]:
    """`layers_from_importance` where every linear has the importance of its block; `importance[i]` of block `i`."""
    block_of = {linear.name: info.index for info in job.trace.blocks for linear in info.linears}
    return layers_from_importance(job, lambda linear: importance[block_of[linear.name]])
