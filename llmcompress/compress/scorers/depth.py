"""How a model uses its depth (arXiv 2505.13898): what each block adds, and what skipping it does to the rest.

Contributions: sizes and directions of what attention and MLP add, against the residual stream they add to.
Skip effect of block s on a later block l: `|D_l - D_l'| / |D_l|` per token, `D_l` what block l adds and `D_l'`
what it adds when s is bypassed at every position but the first. In the future variant s is bypassed up to
position t only and what is added after t is compared (t a quarter, half and three quarters of the text):
what later tokens get to see through attention. Output effect: `|p - p'|_2` and the KL divergence of the
next-token distributions.

The importance of a linear is that of its block: option `depth.effect` `output` (`|p - p'|_2`), `current`, or
`future` (mean over the blocks after it). The last block has none after it: its current and future effects are
0, and it is given the importance of the block before it. `depth.statistic`: `mean` or `max` over tokens and
later blocks. `depth.samples` and `depth.tokens`: how much of the calibration text is seen, in a pass of its
own which holds up to four copies of the hidden states for every block.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.compress.observe import groups_of, local_name
from llmcompress.compress.overflow import checked
from llmcompress.compress.scoring import Measured, ScoreJob, layers_from_blocks
from llmcompress.model.stream import BlockStream, hidden_of
from llmcompress.types import BlockTrace, Series, Unit

UNIT: Unit = "unitless"
NEEDS_DATA = True
FIGURES = ("attention size", "mlp size", "block size", "attention cosine", "mlp cosine", "block cosine")


@dataclass(frozen=True)
class Places:
    """Where to look in a block. `attention` is its attention module.

    `mlp_norm` is the norm whose input the MLP's contribution is added to, None where no traced norm feeds the MLP.
    `parallel` says that attention and MLP read the same tensor.
    """

    attention: str
    mlp_norm: str | None
    parallel: bool


def find_places(info: BlockTrace) -> Places | None:
    """Tell attention from MLP by what the trace saw; None where the block's linears lie in no sub-modules.

    The first linear to be called is attention's; the MLP's group is the first after it, fed by a norm, of which
    no linear lies in the same sub-module.
    """
    if not info.linears or "." not in local_name(info, info.linears[0]):
        return None
    attention = local_name(info, info.linears[0]).partition(".")[0]
    groups = groups_of(info)
    outside = [
        number
        for number, members in sorted(groups.items())
        if not any(local_name(info, linear).startswith(attention + ".") for linear in members)
    ]
    norms = {feed.shared_input: feed.norm for feed in info.norms}
    shared = any(
        not local_name(info, linear).startswith(attention + ".") for linear in groups[info.linears[0].shared_input]
    )
    return Places(attention, next((norms[number] for number in outside if number in norms), None), shared)


@dataclass(frozen=True)
class Middle:
    """What attention added to the residual stream, and the stream that the MLP read, `(batch, tokens, hidden)`."""

    attention: Tensor
    reads: Tensor


class MiddleWatch:
    """Finds the middle of a block's residual stream while the block runs.

    The input of the norm that feeds the MLP is `h + a` in blocks that add attention before the MLP reads. Where
    it is the block's own input, and where no norm is known, attention's contribution is what its module returned.
    """

    def __init__(self, places: Places) -> None:
        self.places = places
        self._norm_input: Tensor | None = None
        self._reads_entering = False
        self._output: Tensor | None = None

    @contextmanager
    def watching(self, block: nn.Module, entering: Tensor) -> Iterator[None]:
        """Hooks for one run of `block` on `entering`."""

        def before(_: nn.Module, args: tuple[Any, ...]) -> None:
            self._reads_entering = args[0].data_ptr() == entering.data_ptr()
            self._norm_input = args[0].detach().clone().view_as(entering)

        def after(_: nn.Module, __: Any, output: Any) -> None:
            self._output = hidden_of(output).detach().clone().view_as(entering)

        handles = [block.get_submodule(self.places.attention).register_forward_hook(after)]
        if self.places.mlp_norm is not None:
            handles.append(block.get_submodule(self.places.mlp_norm).register_forward_pre_hook(before))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def middle(self, entering: Tensor) -> Middle | None:
        """What the run showed; None where neither was called."""
        if self._norm_input is not None and not self._reads_entering:
            return Middle(self._norm_input - entering, self._norm_input)
        if self._output is None:
            return None
        parallel = self.places.parallel or self._reads_entering
        return Middle(self._output, entering if parallel else entering + self._output)


def relative(change: Tensor, size: Tensor) -> Tensor:
    """Norm of `change` `(..., hidden)` over `size` `(...)`, 0 where there is nothing to compare with.

    The stream is all zeros where the embedding of a padding token enters.
    """
    return torch.where(size > 0, change.norm(dim=-1) / size, 0.0)


def contribution_figures(entering: Tensor, leaving: Tensor, middle: Middle) -> Tensor:
    """The six `FIGURES` of each token, `(6, batch, tokens)`, from hidden states `(batch, tokens, hidden)`.

    Whatever is not attention's is the MLP's, so that both always sum to what the block adds.
    """
    added = leaving - entering
    pairs = [(middle.attention, entering), (added - middle.attention, middle.reads), (added, entering)]
    sizes = [relative(change, stream.norm(dim=-1)) for change, stream in pairs]
    cosines = [torch.cosine_similarity(change, stream, dim=-1) for change, stream in pairs]
    return torch.stack([*sizes, *cosines])


@dataclass(frozen=True)
class Span:
    """Bypass positions `1 .. stop - 1`, compare positions from `start` on."""

    stop: int
    start: int


def current_span(tokens: int) -> Span:
    """Bypass every position but the first and compare the same ones."""
    return Span(stop=tokens, start=1)


def future_spans(tokens: int) -> tuple[Span, ...]:
    """Bypass up to a quarter, half and three quarters of the positions, compare those after."""
    cuts = sorted({tokens // 4, tokens // 2, 3 * tokens // 4})
    return tuple(Span(stop=cut + 1, start=cut + 1) for cut in cuts if 1 <= cut < tokens - 1)


@dataclass
class Chain:
    """Hidden states `(batch, tokens, hidden)` of the model with block `skipped` bypassed over a span."""

    skipped: int
    span: Span
    hidden: Tensor
    effects: list[Tensor] = field(default_factory=list)  # of each later block, (batch, compared tokens)


class SkipChains:
    """One batch on its way through the blocks, beside it one chain for every block passed and every span."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self.spans = tuple(spans)
        self.chains: list[Chain] = []
        self._passed = 0

    def advance(self, run: Callable[[Tensor], Tensor], entering: Tensor) -> Tensor:
        """Send the batch and all chains through the next block; `run` maps hidden states to hidden states."""
        leaving = run(entering)
        added = leaving - entering
        size = added.norm(dim=-1)
        for chain in self.chains:
            after = run(chain.hidden)
            effect = relative(added - (after - chain.hidden), size)
            chain.effects.append(effect[:, chain.span.start :])
            chain.hidden = after
        for span in self.spans:
            hidden = leaving.clone()
            hidden[:, 1 : span.stop] = entering[:, 1 : span.stop]
            self.chains.append(Chain(self._passed, span, hidden))
        self._passed += 1
        return leaving


def output_effects(logits: Tensor, skipped: Tensor) -> Tensor:
    """`|p - p'|_2` and the KL divergence of `p` from `p'` of each token: `(2, batch, tokens)`, from logits."""
    before, after = torch.log_softmax(logits.float(), -1), torch.log_softmax(skipped.float(), -1)
    chances = before.exp()
    distance = (chances - after.exp()).norm(dim=-1)
    return torch.stack([distance, (chances * (before - after)).sum(-1).clamp_min(0)])


def _reduced(parts: Sequence[Tensor], statistic: str) -> float:
    """Mean or maximum over everything in `parts`, 0 for nothing."""
    values = torch.cat([part.flatten() for part in parts]) if parts else torch.zeros(0)
    if not values.numel():
        return 0.0
    return float(values.max() if statistic == "max" else values.double().mean())


@dataclass
class _Found:
    """What the pass collects, in the order of the blocks."""

    figures: list[list[Tensor]] = field(default_factory=list)  # per block and batch, (6, batch, tokens)
    chains: list[SkipChains] = field(default_factory=list)  # per batch
    outputs: dict[int, list[Tensor]] = field(default_factory=dict)  # per skipped block and batch, (2, batch, tokens)


@torch.no_grad()
def _observe(job: ScoreJob) -> _Found:
    """Stream a few short samples once, with and without each block."""
    options, stream = job.options.depth, BlockStream(job.skeleton)
    batches = torch.split(job.batches.tokens[: options.samples, : options.tokens], job.batch_size)
    hidden, calls = stream.start(batches)
    job.skeleton.free_rest()
    length = batches[0].shape[1]
    found = _Found(chains=[SkipChains((current_span(length), *future_spans(length))) for _ in batches])
    for info in job.trace.blocks:
        block = job.skeleton.load_block(info.index)
        found.figures.append([])
        for place, call in enumerate(calls):
            run = partial(_run, stream, info.index, call[info.index])
            figures = _figures(block, info, hidden[place], run)
            if figures is not None:
                found.figures[-1].append(figures)
            hidden[place] = checked(info, found.chains[place].advance(run, hidden[place]))
        job.skeleton.free(block)
    for tokens, state, chains in zip(batches, hidden, found.chains, strict=True):
        logits = stream.leave(tokens, state)
        for chain in chains.chains:
            if chain.span == chains.spans[0]:
                effects = output_effects(logits, stream.leave(tokens, chain.hidden))
                found.outputs.setdefault(chain.skipped, []).append(effects[..., 1:])
            chain.hidden = torch.empty(0)
    job.skeleton.free_rest()
    return found


def _run(stream: BlockStream, index: int, call: Any, hidden: Tensor) -> Tensor:
    return stream.run_block(index, hidden, call)


def _figures(block: nn.Module, info: BlockTrace, entering: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor | None:
    """The contributions of one block to one batch; None where attention cannot be told from the rest."""
    places = find_places(info)
    if places is None:
        return None
    watch = MiddleWatch(places)
    with watch.watching(block, entering):
        leaving = run(entering)
    middle = watch.middle(entering)
    return None if middle is None else contribution_figures(entering, leaving, middle)


def skip_effects(chains: Sequence[SkipChains], blocks: int, *, future: bool, statistic: str) -> list[float]:
    """The effect of skipping each block on those after it, mean or maximum over them; 0 for the last block."""
    found = []
    for skipped in range(blocks):
        mine = [
            chain
            for batch in chains
            for chain in batch.chains
            if chain.skipped == skipped and (chain.span != batch.spans[0]) == future
        ]
        later = range(blocks - 1 - skipped)
        values = [_reduced([chain.effects[place] for chain in mine], statistic) for place in later]
        found.append((max(values) if statistic == "max" else statistics.fmean(values)) if values else 0.0)
    return found


def _with_last(effects: Sequence[float]) -> list[float]:
    """Effects on later blocks as importances: the last block, which has none after it, counts as the one before."""
    return [*effects[:-1], effects[-2]] if len(effects) > 1 else [1.0]


def score(job: ScoreJob) -> Measured:
    """Score every linear by what skipping its block does to the full-precision model."""
    options, found, blocks = job.options.depth, _observe(job), len(job.trace.blocks)
    current, future = (
        skip_effects(found.chains, blocks, future=later, statistic=options.statistic) for later in (False, True)
    )
    outputs, divergences = (
        [_reduced([part[which] for part in found.outputs[index]], options.statistic) for index in range(blocks)]
        for which in (0, 1)
    )
    importance = {"output": outputs, "current": _with_last(current), "future": _with_last(future)}[options.effect]
    table = {"skip effect": current, "skip effect future": future, "skip output": outputs, "skip kl": divergences}
    if all(found.figures):
        means = [torch.cat([part.flatten(1) for part in parts], 1).double().mean(1) for parts in found.figures]
        table |= {name: [float(mean[place]) for mean in means] for place, name in enumerate(FIGURES)}
    series = tuple(Series(name=name, values=tuple(values)) for name, values in table.items())
    return Measured(layers_from_blocks(job, importance), series)
