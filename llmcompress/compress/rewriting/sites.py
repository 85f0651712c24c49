"""Where a block can be rewritten, found by running it: no table of families.

A *norm site* is a norm and the linears that read the very tensor it returned. A *link* is a linear whose output rows
reach the input columns of a later linear in proportion (v -> o, up -> down): its rows are scaled, and the columns must
follow. Everything here runs in float64 (`working`).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.compress.rewriting.edits import scale_columns, scale_rows
from llmcompress.compress.rewriting.work import Call
from llmcompress.model.stream import linear_modules, steady_linears
from llmcompress.model.trace import watch

CLOSE = 1e-9  # relative, in float64
FACTORS = (0.5, 2.0)


@dataclass(frozen=True)
class NormSite:
    """A norm of a block and the linears that read its output, by name inside the block."""

    norm: str
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Link:
    """Rows of `source` that reach columns of `target` in proportion.

    row_of  (columns of target,) int64: the row each column follows; -1 where the probe never showed a value. Under
            grouped heads several columns follow one row.
    """

    source: str
    target: str
    row_of: Tensor

    @property
    def rows(self) -> Tensor:
        """The rows that are followed, ascending, `(linked,)` int64."""
        found: Tensor = torch.unique(self.row_of[self.row_of >= 0])
        return found

    def gather(self, values: Tensor, fill: float) -> Tensor:
        """One value per column from one value per row; `fill` for columns that follow none."""
        found = values[self.row_of.clamp_min(0)]
        return torch.where(self.row_of >= 0, found, torch.full_like(found, fill))

    def reduce(self, values: Tensor, rows: int) -> Tensor:
        """The largest value over the columns that follow each row, `(rows,)`; 0 for a row without any."""
        known = self.row_of >= 0
        start = torch.zeros(rows, dtype=values.dtype, device=values.device)
        return start.scatter_reduce(0, self.row_of[known], values[known], "amax")


def norm_sites(block: nn.Module, call: Call) -> tuple[NormSite, ...]:
    """The norms of a block that feed linears, in call order."""
    with torch.no_grad():
        seen = watch(block, partial(call.run, block))
    sites = []
    for norm, output in seen.norms:
        readers = tuple(name for name, tensor in seen.inputs if tensor is output)
        if readers:
            sites.append(NormSite(norm, readers))
    return tuple(sites)


@contextmanager
def reading(block: nn.Module, see: Callable[[str, Tensor], None], names: Sequence[str] | None = None) -> Iterator[None]:
    """Call `see(linear, input)` for every linear of a block as it is called, or for those of `names`; no expert's."""
    handles = []
    for name, module in steady_linears(block).items():
        if names is None or name in names:

            def before(_: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                see(name, args[0].detach())

            handles.append(module.register_forward_pre_hook(before))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def inputs_of(block: nn.Module, call: Call) -> dict[str, Tensor]:
    """The input `(tokens, columns)` of every linear in one call, in call order."""
    found: dict[str, Tensor] = {}

    def see(name: str, tensor: Tensor) -> None:
        found[name] = tensor.flatten(0, -2)

    with reading(block, see):
        call.run(block)
    return found


def inputs_when(block: nn.Module, call: Call, source: str, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """`inputs_of` while the output of `source` is changed."""
    module = linear_modules(block)[source]
    handle = module.register_forward_hook(lambda _, __, output: change(output))
    try:
        return inputs_of(block, call)
    finally:
        handle.remove()


def links(block: nn.Module, call: Call) -> tuple[Link, ...]:
    """Every pair of linears of a block that can be rescaled against each other, in call order."""
    plain = inputs_of(block, call)
    order, modules = list(plain), linear_modules(block)
    found = []
    for place, source in enumerate(order):
        later = {name: plain[name] for name in order[place + 1 :] if not torch.equal(plain[name], plain[source])}
        found += _links_of(block, call, source, _rows(modules[source]), targets=later)
    return tuple(found)


def _rows(linear: nn.Module) -> int:
    weight: Tensor = linear.weight  # type: ignore[assignment]
    return int(weight.shape[0] if isinstance(linear, nn.Linear) else weight.shape[1])


def _links_of(block: nn.Module, call: Call, source: str, rows: int, *, targets: dict[str, Tensor]) -> list[Link]:
    """Scale sets of rows by distinct factors, and see which targets' columns follow them one by one."""
    generator = torch.Generator().manual_seed(0)
    low, high = FACTORS
    spread = low * (high / low) ** ((torch.arange(rows, dtype=torch.float64) + 0.25) / rows)
    factors = spread[torch.randperm(rows, generator=generator)]
    splits = {name: _splits(rows, tensor.shape[1]) for name, tensor in targets.items()}
    found: dict[str, Link] = {}
    for split in dict.fromkeys(split for name in targets for split in splits[name]):
        waiting = [name for name in targets if name not in found and split in splits[name]]
        if not waiting:
            continue
        linked, parts = split
        chosen = torch.arange(rows).view(parts, -1)[:, -(linked // parts) :].flatten()
        factor = torch.ones_like(factors)
        factor[chosen] = factors[chosen]
        factor, chosen = (part.to(targets[waiting[0]].device) for part in (factor, chosen))
        after = inputs_when(block, call, source, partial(torch.mul, factor))
        for name in waiting:
            row_of = _followed(targets[name], after[name], factor, chosen)
            if row_of is not None:
                found[name] = Link(source, name, row_of)
    return list(found.values())


def _splits(rows: int, columns: int) -> list[tuple[int, int]]:
    """Rows that may be the linked ones, as `(linked, parts)`: the last `linked / parts` of each of `parts` equal runs.

    All rows; or in a fused linear the last rows (q, k, v or gate, up stacked), or the last of each head (interleaved).
    Under grouped heads a fused linear has `columns + 2 m` rows, `m` of them values.
    """
    if rows <= columns:
        return [(rows, 1)]
    wanted = dict.fromkeys((columns, (rows - columns) // 2))
    return [
        (linked, parts) for linked in wanted for parts in range(1, linked + 1) if not (linked % parts or rows % parts)
    ]


def _followed(before: Tensor, after: Tensor, factor: Tensor, chosen: Tensor) -> Tensor | None:
    """The row each column follows, -1 for columns without values; None unless every column follows one."""
    energy = before.square().sum(0)
    alive = energy > 1e-24 * energy.max().clamp_min(1e-300)
    ratio = (before * after).sum(0) / energy.clamp_min(1e-300)
    stray = (after - before * ratio).abs().amax(0) > CLOSE * before.abs().amax(0)
    if not bool(alive.any()) or bool((stray & alive).any()):
        return None
    values, order = factor[chosen].sort()
    above = torch.searchsorted(values, ratio.contiguous()).clamp_max(len(values) - 1)
    below = (above - 1).clamp_min(0)
    near = torch.where((values[above] - ratio).abs() < (values[below] - ratio).abs(), above, below)
    if bool(((values[near] - ratio).abs() > CLOSE)[alive].any()):
        return None
    row_of = chosen[order[near]]
    return torch.where(alive, row_of, torch.full_like(row_of, -1))


def rescale(block: nn.Module, link: Link, factor: Tensor) -> None:
    """Divide the source's rows by `factor` `(rows,)`, 1 where a row is not linked, and multiply the columns."""
    scale_rows(block.get_submodule(link.source), 1 / factor)
    scale_columns(block.get_submodule(link.target), link.gather(factor, 1.0))


def mixing_rows(block: nn.Module, call: Call, source: str, linked: Sequence[Link]) -> Tensor:
    """Rows of a linear `(rows,)` bool that do not reach the next linear one by one: queries and keys, not gates.

    Half of the rows that are no link's are changed: behind a gate half of the columns change, behind a dot product
    of queries and keys all of them.
    """
    rows = _rows(linear_modules(block)[source])
    free = torch.ones(rows, dtype=torch.bool)
    for link in linked:
        if link.source == source:
            free[link.rows.cpu()] = False
    plain = inputs_of(block, call)
    order = list(plain)
    later = [name for name in order[order.index(source) + 1 :] if not torch.equal(plain[name], plain[source])]
    if not later or not bool(free.any()):
        return torch.zeros(rows, dtype=torch.bool)
    places = torch.nonzero(free).flatten()[::2]
    factor = torch.ones(rows, dtype=torch.float64, device=plain[source].device)
    factor[places] = 1.5
    after = inputs_when(block, call, source, partial(torch.mul, factor))[later[0]]
    changed = (after - plain[later[0]]).abs().amax(0) > CLOSE * plain[later[0]].abs().max()
    return free if float(changed.double().mean()) > 0.75 else torch.zeros_like(free)


def head_size(block: nn.Module, call: Call, link: Link) -> int:
    """The largest number of consecutive linked rows that the block treats alike, so that they may be mixed; 1 for none.

    Found by mixing the source's outputs with random orthogonal matrices and looking at the target's inputs.
    """
    rows = link.rows
    if bool((link.row_of < 0).any()) or len(link.row_of) % len(rows):
        return 1
    before = inputs_of(block, call)[link.target]
    position = torch.searchsorted(rows, link.row_of)
    for size in sorted((s for s in range(2, len(rows) + 1) if len(rows) % s == 0), reverse=True):
        if not _whole_heads(position, size):
            continue
        generator = torch.Generator().manual_seed(size)
        random = torch.randn(size, size, generator=generator, dtype=torch.float64).to(before.device)
        turn = torch.linalg.qr(random)[0]

        def change(output: Tensor, turn: Tensor = turn) -> Tensor:
            changed = output.clone()
            changed[..., rows] = _turned(output[..., rows], turn)
            return changed

        after = inputs_when(block, call, link.source, change)[link.target]
        expected = _turned(before, turn)
        if float((after - expected).abs().max()) <= CLOSE * float(before.abs().max()):
            return size
    return 1


def _turned(values: Tensor, turn: Tensor) -> Tensor:
    """Every run of channels times `turn`."""
    return (values.reshape(*values.shape[:-1], -1, len(turn)) @ turn).flatten(-2)


def _whole_heads(position: Tensor, size: int) -> bool:
    """Whether consecutive runs of `size` columns follow whole runs of rows, in order."""
    runs = position.view(-1, size)
    return bool((runs - runs[:, :1] == torch.arange(size, device=runs.device)).all() and (runs[:, 0] % size == 0).all())


def common_parent(names: Sequence[str]) -> str:
    """The module that holds all the named ones, "" for the block itself."""
    parts = [name.split(".")[:-1] for name in names]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)
