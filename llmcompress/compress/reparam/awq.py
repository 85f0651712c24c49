"""AWQ (arXiv 2306.00978): scale up columns that read large activations, by what leaves least error after rounding.

For each group of linears that read one tensor the factors are `mean|x|^ratio`; the ratio is searched on the output of
the module that holds the group (attention, MLP), with its weights rounded.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.compress.grid import find_scale, group_size_for, round_weight
from llmcompress.compress.rewriting.edits import divide_gain, matrix
from llmcompress.compress.rewriting.samples import input_samples
from llmcompress.compress.rewriting.sites import (
    Link,
    NormSite,
    common_parent,
    inputs_of,
    links,
    mixing_rows,
    norm_sites,
    rescale,
)
from llmcompress.compress.rewriting.work import Call, Rewritten, Rounding, Subject, working
from llmcompress.model.stream import hidden_of
from llmcompress.options import AwqOptions, ReparamOptions
from llmcompress.types import LinearSpec

SCOPE = "block"
CLIP_STEPS = 10  # shrink factors 1, .95, ... .55
CLIP_STEP = 0.05


def factor_of(magnitude: Tensor, ratio: float, weights: Tensor | None = None) -> Tensor:
    """The factor of each channel, `a^ratio` centred so that the largest times the smallest is 1.

    magnitude  (channels,)  mean |x|
    weights    (channels,)  mean |w| over its group's largest, for the variant that divides by its `(1 - ratio)`th power
    """
    factor = magnitude.clamp_min(1e-4).pow(ratio)
    if weights is not None:
        factor = factor / (weights.pow(1 - ratio) + 1e-4)
    factor = factor.clamp_min(1e-4)
    middle: Tensor = (factor.max() * factor.min()).sqrt()
    return factor / middle


def search_ratio(candidates: Sequence[Tensor], loss: Callable[[Tensor], float]) -> tuple[Tensor, float]:
    """The candidate factors of least loss, the first among equals, and that loss."""
    losses = [loss(candidate) for candidate in candidates]
    best = min(range(len(losses)), key=losses.__getitem__)
    return candidates[best], losses[best]


def find_limits(weight: Tensor, inputs: Tensor, rounding: Callable[[Tensor], Tensor], group_size: int) -> Tensor:
    """Largest magnitude to clamp each group of a weight to before rounding, for least error of its part of the output.

    weight    (rows, columns)
    inputs    (tokens, columns)
    rounding  weight -> rounded weight
    returns   (rows, columns / group_size)
    """
    groups = _grouped(weight, group_size)
    peak = groups.abs().amax(-1)
    parts = _grouped(inputs, group_size).transpose(0, 1)  # (groups, tokens, group size)
    grams = parts.transpose(1, 2) @ parts
    limits, lowest = peak.clone(), torch.full_like(peak, torch.inf)
    for step in range(CLIP_STEPS):
        limit = peak * (1 - CLIP_STEP * step)
        clamped = groups.clamp(-limit[..., None], limit[..., None]).flatten(1)
        error = _grouped(rounding(clamped), group_size) - groups
        loss = torch.einsum("rgi,gij,rgj->rg", error, grams, error)
        better = loss < lowest
        limits, lowest = torch.where(better, limit, limits), torch.where(better, loss, lowest)
    return limits


def _grouped(given: Tensor, size: int) -> Tensor:
    """`(rows, groups, size)` of `(rows, columns)`."""
    return given.reshape(len(given), -1, size)


def rewrite(subject: Subject, options: ReparamOptions) -> Rewritten:
    """Scale every norm's readers and every link of a block; with `clip`, find limits for the weights that result.

    All factors are searched first: scaling rows by a link commutes with rounding along columns, and neither changes
    what another site reads, so the order does not matter.
    """
    block, asked = subject.module, options.awq
    rounding = subject.rounding or _default_rounding(asked)
    with working(subject) as work:
        sites, found = norm_sites(block, work.probe), links(block, work.probe)
    linked = found if asked.links else ()
    names = [*(site.readers[0] for site in sites), *(link.target for link in linked)]
    seen = input_samples(block, subject.calls, names, tokens=options.tokens, skip_first=options.skip_first)
    search = _Search(block, subject.calls, rounding, asked)
    with torch.no_grad():
        by_norm = [search.factor(site.readers, seen[site.readers[0]], _inspected(site), None) for site in sites]
        by_link = [search.factor((link.target,), seen[link.target], link.target, link) for link in linked]
    with working(subject) as work:
        for site, factor in zip(sites, by_norm, strict=True):
            norm, readers = block.get_submodule(site.norm), [block.get_submodule(name) for name in site.readers]
            parts = [*norm.modules(), *readers]
            work.attempt(site.norm, parts, partial(divide_gain, norm, readers, factor.double()))
        for link, factor in zip(linked, by_link, strict=True):
            source, target = block.get_submodule(link.source), block.get_submodule(link.target)
            rows = torch.ones(len(matrix(source)), dtype=torch.float64, device=factor.device)
            rows[link.rows] = factor.double()
            edit = partial(rescale, block, link, rows)
            work.attempt(f"{link.source} -> {link.target}", [source, target], edit)
    return work.result(limits=_limits(subject, options, rounding, found) if asked.clip else {})


def _inspected(site: NormSite) -> str:
    """The module whose output is compared: the one that holds the readers, or the reader itself in a bare block."""
    return common_parent(site.readers) or site.readers[0]


@dataclass(frozen=True)
class _Search:
    """What a search over one block needs; weights are rounded by `rounding`."""

    block: nn.Module
    calls: Sequence[Call]
    rounding: Rounding
    options: AwqOptions

    def factor(self, names: Sequence[str], inputs: Tensor, inspected: str, link: Link | None) -> Tensor:
        """The best factor of every channel the named linears read; of every linked row, where a link is given.

        inputs  (tokens, columns)  what the linears read
        """
        linears = {name: self.block.get_submodule(name) for name in names}
        kept = {name: matrix(linear).clone() for name, linear in linears.items()}
        runs = _recorded(self.block, self.block.get_submodule(inspected), self.calls)

        def loss(factor: Tensor) -> float:
            wide = factor if link is None else _spread(factor, link)
            for name, linear in linears.items():
                matrix(linear).copy_(self.rounding(name, kept[name] * wide) / wide)
            module = self.block.get_submodule(inspected)
            return sum(float((run.run(module) - goal).square().sum()) for run, goal in runs)

        magnitude, weights = inputs.abs().mean(0), None
        if self.options.duo:
            weights = _relative_size(list(kept.values()), self.options.assumed[1])
        if link is not None:
            size = int(link.rows.max()) + 1
            magnitude = link.reduce(magnitude, size)[link.rows]
            weights = None if weights is None else link.reduce(weights, size)[link.rows]
        ratios = [step / self.options.ratios for step in range(self.options.ratios)]
        candidates = [torch.ones_like(magnitude), *(factor_of(magnitude, ratio, weights) for ratio in ratios)]
        try:
            return search_ratio(candidates, loss)[0]
        finally:
            for name, linear in linears.items():
                matrix(linear).copy_(kept[name])


def _spread(factor: Tensor, link: Link) -> Tensor:
    """One value per column from one per linked row; 1 for columns that follow none."""
    rows = torch.ones(int(link.rows.max()) + 1, dtype=factor.dtype, device=factor.device)
    rows[link.rows] = factor
    return link.gather(rows, 1.0)


def _relative_size(weights: Sequence[Tensor], group_size: int) -> Tensor:
    """Mean over rows of |w| over the largest of its group, `(columns,)`."""
    stacked = torch.cat(list(weights)).abs()
    size = group_size_for(stacked.shape[1], group_size) or stacked.shape[1]
    groups = _grouped(stacked, size)
    return (groups / groups.amax(-1, keepdim=True).clamp_min(1e-12)).flatten(1).mean(0)


def _recorded(block: nn.Module, module: nn.Module, calls: Sequence[Call]) -> list[tuple[Call, Tensor]]:
    """The calls a module inside a block receives, with what it returned."""
    seen: list[tuple[Call, Tensor]] = []

    def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        seen.append((Call(args, dict(kwargs)), hidden_of(output).clone()))

    handle = module.register_forward_hook(after, with_kwargs=True)
    try:
        for call in calls:
            call.run(block)
    finally:
        handle.remove()
    return seen


def _default_rounding(options: AwqOptions) -> Rounding:
    """Rounding to the assumed format, in one group per row where its groups do not divide the row."""

    def rounding(_: str, weight: Tensor) -> Tensor:
        bits, group_size = options.assumed
        spec = LinearSpec(bits=bits, group_size=group_size_for(weight.shape[1], group_size) or weight.shape[1])
        scale = find_scale(weight.float(), spec, torch.float32, clip=False)
        return round_weight(weight.float(), scale, spec).dequantize().to(weight.dtype)

    return rounding


def _limits(subject: Subject, options: ReparamOptions, rounding: Rounding, linked: Sequence[Link]) -> dict[str, Tensor]:
    """Limits of every linear's groups; rows of queries and keys keep theirs at the largest weight."""
    block = subject.module
    with working(subject) as work:
        names = list(inputs_of(block, work.probe))
        readers = [name for site in norm_sites(block, work.probe) for name in site.readers]
        mixing = {name: mixing_rows(block, work.probe, name, linked) for name in readers}
    tokens = options.awq.clip_tokens
    seen = input_samples(block, subject.calls, names, tokens=tokens, skip_first=options.skip_first)
    limits = {}
    for name in names:
        weight = matrix(block.get_submodule(name))
        size = group_size_for(weight.shape[1], options.awq.assumed[1]) or weight.shape[1]
        found = find_limits(weight, seen[name].to(weight.dtype), partial(rounding, name), size)
        whole = _grouped(weight, size).abs().amax(-1)
        fixed = mixing.get(name, torch.zeros(len(weight), dtype=torch.bool)).to(weight.device)
        limits[name] = torch.where(fixed[:, None], whole, found)
    return limits
