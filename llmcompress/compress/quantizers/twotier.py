"""Two widths inside a linear: the columns that matter most get two bits more (after arXiv 2511.17801).

The share of such columns is `quantize.high_share`. A column counts by the loss its rounding alone would cause after
all others made up for it, `|dw_j|^2 / (2 [H^-1]_jj)`. High columns share the scales of their groups, on a grid four
times as fine, and are rounded last, so that they take up the errors of the others. The output is in llmcompress's own
layout.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from llmcompress.compress.feedback import Loop, column_order, inverse_factor, round_columns
from llmcompress.compress.grid import (
    SHIFT_ROWS,
    Codes,
    expand_scale,
    find_scale,
    full_range_scale,
    group_size_for,
    shrinks,
    stored_scale,
)
from llmcompress.compress.rounding import NOT_FINITE, Quantized, Request, Seen
from llmcompress.spec import HIGH_BITS
from llmcompress.types import LinearSpec, QuantizerOptions

NEEDS_HESSIAN = True


def formats(bits: int, columns: int, *, group_size: int, options: QuantizerOptions) -> LinearSpec | None:
    """Symmetric integers of which a share of the columns has two bits more."""
    size = group_size_for(columns, group_size)
    if size is None or bits + HIGH_BITS > 8:
        return None
    return LinearSpec(bits=bits, group_size=size, high_share=options.high_share)


def quantize(
    requests: Sequence[Request], seen: Seen | None, *, options: QuantizerOptions, dtype: torch.dtype
) -> list[Quantized]:
    """Quantize linears that read one input; `dtype` is that of the stored scales.

    Without a finite, regular Hessian columns count by their own rounding error and there is no feedback; it is
    recorded.
    """
    if seen is None or not seen.finite:
        return [_alone(r, options, dtype, NOT_FINITE) for r in requests]
    plain = torch.arange(len(seen.hessian), device=seen.hessian.device)
    factor, notes = seen.once("factor", lambda: inverse_factor(seen.hessian, plain, options.damp))
    if factor is None:
        return [_alone(r, options, dtype, notes[0]) for r in requests]
    inverse = factor.upper.double().square().sum(0).float()
    return [_together(r, seen, inverse, options=options, dtype=dtype) for r in requests]


def _alone(request: Request, options: QuantizerOptions, dtype: torch.dtype, note: str) -> Quantized:
    weight, spec = request.weight, request.spec
    ones = torch.ones(weight.shape[1], device=weight.device)
    tiers = choose_tiers(weight, spec, importance=ones, inverse=ones)
    scale = tiers.find_scale(weight, dtype, clip=options.clip)
    codes, _ = tiers.round(weight, expand_scale(scale, weight.shape[1]))
    return Quantized(tiers.pack(codes.to(torch.uint8), scale), (note,), blind=True)


def _together(
    request: Request, seen: Seen, inverse: Tensor, *, options: QuantizerOptions, dtype: torch.dtype
) -> Quantized:
    weight = request.weight
    tiers = choose_tiers(weight, request.spec, importance=seen.importance, inverse=inverse)
    scale = tiers.find_scale(weight, dtype, clip=options.clip)
    order = column_order(seen.hessian.diagonal(), "plain" if options.order == "plain" else "act", 1)
    order = torch.cat([order[~tiers.high[order]], order[tiers.high[order]]])
    factor, notes = inverse_factor(seen.hessian, order, options.damp)
    if factor is None:
        return _alone(request, options, dtype, notes[0])
    wide, ordered = expand_scale(scale, weight.shape[1])[:, order], tiers.ordered(order)

    def nearest(place: int, values: Tensor) -> tuple[Tensor, Tensor]:
        codes, stored = ordered.round(values[:, None], wide[:, place, None], slice(place, place + 1))
        return codes[:, 0], stored[:, 0]

    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    codes[:, order] = round_columns(weight[:, order], factor.upper, Loop(nearest))
    return Quantized(tiers.pack(codes, scale), notes)


@dataclass(frozen=True)
class Tiers:
    """The grid of each column: `high` says which is fine, `half` is half its number of codes, `fine` its step.

    All are `(columns,)`; steps are in units of the group's scale. `importance` weighs squared errors.
    """

    spec: LinearSpec
    high: Tensor
    importance: Tensor

    @cached_property
    def half(self) -> Tensor:
        return torch.where(self.high, 1 << (self.spec.bits + HIGH_BITS - 1), 1 << (self.spec.bits - 1)).float()

    @cached_property
    def fine(self) -> Tensor:
        return torch.where(self.high, 1.0 / (1 << HIGH_BITS), 1.0)

    def ordered(self, order: Tensor) -> "Tiers":
        """The same with columns in another order."""
        return Tiers(self.spec, self.high[order], self.importance[order])

    def round(self, values: Tensor, scale: Tensor, columns: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Nearest codes, as floats, and what they stand for; `scale`, that of the groups, broadcasts to `values`."""
        half, step = self.half[columns], scale * self.fine[columns]
        codes = torch.clamp(torch.round(values / step) + half, min=torch.zeros_like(half), max=2 * half - 1)
        return codes, (codes - half) * step

    def find_scale(self, weight: Tensor, dtype: torch.dtype, *, clip: bool) -> Tensor:
        """Scale of every group, as stored, that clips best with both grids; `(rows, columns / group size)`."""
        step = max(SHIFT_ROWS // weight.shape[1], 1)
        clips = shrinks(clip)
        return torch.cat([self._search(part, dtype, clips) for part in torch.split(weight, step)])

    def _search(self, weight: Tensor, dtype: torch.dtype, clips: tuple[float, ...]) -> Tensor:
        shape = (len(weight), -1, self.spec.group_size)
        full = full_range_scale(weight.view(shape), self.spec.bits)
        best, lowest = stored_scale(full, dtype), torch.full_like(full, torch.inf)
        for shrink in clips:
            scale = stored_scale(full * shrink, dtype)
            _, stored = self.round(weight, expand_scale(scale, weight.shape[1]))
            loss = ((stored - weight).square() * self.importance).view(shape).sum(-1)
            best, lowest = torch.where(loss < lowest, scale, best), torch.minimum(loss, lowest)
        return best

    def pack(self, codes: Tensor, scale: Tensor) -> Codes:
        """Codes of the format; without a single high column they are plain integers."""
        return Codes(codes, scale, self.spec, high=self.high if bool(self.high.any()) else None)


def choose_tiers(weight: Tensor, spec: LinearSpec, *, importance: Tensor, inverse: Tensor) -> Tiers:
    """The columns that lose most when rounded to the coarse grid: `|dw_j|^2 / (2 [H^-1]_jj)`.

    weight   (rows, columns)
    inverse  (columns,)       diagonal of the inverse Hessian
    """
    columns = weight.shape[1]
    coarse = Tiers(spec, torch.zeros(columns, dtype=torch.bool, device=weight.device), importance)
    scale = find_scale(weight, spec, torch.float32, importance=importance)
    _, stored = coarse.round(weight, expand_scale(scale, columns))
    scores = (stored - weight).square().sum(0) / (2 * inverse.clamp_min(1e-30))
    top = torch.argsort(scores, descending=True, stable=True)[: spec.high_columns(columns)]
    high = coarse.high.clone()
    high[top] = True
    return Tiers(spec, high, importance)
