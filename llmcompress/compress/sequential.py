"""Round weights column by column with feedback, by one factorised Hessian: the work behind `gptq`.

Methods that begin from its answer use it as well.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from llmcompress.compress.descent import descend, descend_plainly, metric_of
from llmcompress.compress.feedback import (
    BLOCK_COLUMNS,
    Factor,
    Integers,
    Loop,
    Scales,
    column_order,
    drift_factor,
    inverse_factor,
    round_columns,
)
from llmcompress.compress.grid import Codes, expand_scale, find_scale, shrinks
from llmcompress.compress.kronecker import round_by_rows, row_factor
from llmcompress.compress.rounding import NOT_FINITE, Quantized, Request, Seen, nearest, portions, stacked
from llmcompress.kernels import native_columns
from llmcompress.types import QuantizerOptions

Settle = Callable[[Tensor, Codes, Tensor, int], Codes]  # as `descent.descend`
GPTAQ_ALPHA = 0.25
BATCH_WEIGHTS = 1 << 22  # rounded together in torch: linears of a group and their formats, or rows of a linear


def round_with_feedback(
    requests: Sequence[Request], seen: Seen | None, *, options: QuantizerOptions, dtype: torch.dtype
) -> list[Quantized]:
    """Quantize linears that read one input; `dtype` is that of the stored scales.

    The scale of the Hessian does not matter. A Hessian that is not finite, or stays singular after three tenfold
    increases of the damping, falls back to rounding; both are recorded.
    """
    if seen is None or not seen.finite:
        return [nearest(r, options, dtype, NOT_FINITE) for r in requests]
    found: dict[int, Quantized] = {}
    for size in sorted({r.spec.group_size for r in requests}):
        places = [place for place, r in enumerate(requests) if r.spec.group_size == size]
        work, notes = seen.once((size, options, dtype), partial(_work_of, seen, size, options, dtype))
        if work is None:
            found |= {place: nearest(requests[place], options, dtype, notes[0]) for place in places}
            continue
        for batch in portions(requests, places, BATCH_WEIGHTS):
            codes = work.round_all([requests[place] for place in batch])
            found |= {place: Quantized(found, notes) for place, found in zip(batch, codes, strict=True)}
    return [found[place] for place in range(len(requests))]


def _work_of(
    seen: Seen, size: int, options: QuantizerOptions, dtype: torch.dtype
) -> tuple["_Work | None", tuple[str, ...]]:
    order = column_order(seen.hessian.diagonal(), options.order, size)
    factor, notes = inverse_factor(seen.hessian, order, options.damp)
    return None if factor is None else _Work(seen, factor, options, dtype), notes


class _Work:
    """One input and its factor; rounds any number of weights that read it."""

    def __init__(self, seen: Seen, factor: Factor, options: QuantizerOptions, dtype: torch.dtype) -> None:
        self.factor, self.options, self.dtype = factor, options, dtype
        self.importance = seen.importance
        self.metric = metric_of(seen.hessian, options.damp) if options.sweeps else None
        self.extra = None
        if seen.drift is not None and options.target == "gptaq":
            self.extra = drift_factor(seen.drift, factor, options.alpha or GPTAQ_ALPHA)

    def round_all(self, requests: Sequence[Request]) -> list[Codes]:
        """As `round`; those whose curvature is known a few rows at a time, the error of each moving those to come."""
        rows = self.options.output_feedback
        factors = [None if not rows or r.curvature is None else row_factor(r.curvature, rows) for r in requests]
        sided = [(r, factor) for r, factor in zip(requests, factors, strict=True) if factor is not None]
        plain = [r for r, factor in zip(requests, factors, strict=True) if factor is None]
        one = iter(self.round(plain) if plain else ())
        two = iter(
            round_by_rows([r for r, _ in sided], [f for _, f in sided], rows, rounded=self.round) if sided else ()
        )
        return [next(one if factor is None else two) for factor in factors]

    def round(self, requests: Sequence[Request]) -> list[Codes]:
        """Codes of weights whose formats share one group size."""
        found = [self._natively(r) for r in requests]
        rest = [r for r, codes in zip(requests, found, strict=True) if codes is None]
        others = iter(self.round_plainly(rest, descend) if rest else ())
        return [next(others) if codes is None else codes for codes in found]

    def _natively(self, request: Request) -> Codes | None:
        """By the C library, where it does what is asked for."""
        if self.extra is not None or self.options.pull:
            return None
        weight, spec = request.weight, request.spec
        if self._static(spec.group_size):
            scale = find_scale(weight, spec, self.dtype, clip=self.options.clip, importance=self.importance)
            ranges: Sequence[float] = ()
        else:
            scale = torch.empty((len(weight), weight.shape[1] // spec.group_size), dtype=self.dtype)
            ranges = shrinks(self.options.clip)
        feedback = native_columns.Feedback(self.factor.order, self.factor.upper, self.importance, ranges)
        descent = None if self.metric is None else native_columns.Descent(self.metric, self.options.sweeps)
        return native_columns.rounded(weight, spec, scale, feedback, descent)

    def _static(self, group_size: int) -> bool:
        """Whether scales are chosen before the loop, and not as it enters a group."""
        return self.options.order != "group" or group_size == self.factor.order.numel()

    def round_plainly(self, requests: Sequence[Request], settle: Settle = descend_plainly) -> list[Codes]:
        """`round` in torch, for any device: what the C library is held against. On the CPU some rows at a time."""
        pieces = _pieces(requests[0].weight) if len(requests) == 1 else ()
        if len(pieces) > 1:
            return [stacked([self.round_plainly([Request(rows, requests[0].spec)], settle)[0] for rows in pieces])]
        found = self._in_order(requests)
        if self.metric is None:
            return found
        pairs = zip(requests, found, strict=True)
        return [settle(r.weight, codes, self.metric, self.options.sweeps) for r, codes in pairs]

    def _in_order(self, requests: Sequence[Request]) -> list[Codes]:
        """Codes after one loop over the columns."""
        order, size = self.factor.order, requests[0].spec.group_size
        halves = [torch.full((len(r.weight),), float(1 << (r.spec.bits - 1))) for r in requests]
        chooser, static = _Chooser(self, requests), self._static(size)
        grid = Integers(torch.cat(halves).to(order.device), chooser.static() if static else chooser.entering)
        loop = Loop(
            grid.nearest,
            grid.enter,
            block=BLOCK_COLUMNS if static else size,
            extra=self.extra,
            pull=self.options.pull,
            grid=grid,
        )
        turned = [r.weight.T.index_select(0, order) for r in requests]  # as the loop has it: no copy is made of it
        codes = round_columns((turned.pop() if len(turned) == 1 else torch.cat(turned, 1)).T, self.factor.upper, loop)
        restored = torch.empty_like(codes, memory_format=torch.contiguous_format)
        restored[:, order] = codes
        parts = torch.split(restored, [len(r.weight) for r in requests])
        return [Codes(part, scale, r.spec) for part, scale, r in zip(parts, chooser.scales, requests, strict=True)]


def _pieces(weight: Tensor) -> tuple[Tensor, ...]:
    """Rows that are rounded together, the same whoever rounds them: fewer than `2 BATCH_WEIGHTS` weights."""
    parts = weight.numel() // BATCH_WEIGHTS if weight.device.type == "cpu" else 1
    return weight.tensor_split(max(min(parts, len(weight)), 1))


class _Chooser:
    """Chooses scales before the loop, from the weights as they are, or as the loop enters a group."""

    def __init__(self, work: _Work, requests: Sequence[Request]) -> None:
        self.work, self.requests = work, requests
        rows = [len(r.weight) for r in requests]
        groups = requests[0].weight.shape[1] // requests[0].spec.group_size
        self.scales = [torch.empty((count, groups), dtype=work.dtype, device=work.importance.device) for count in rows]
        self.rows = rows

    def static(self) -> Scales:
        """All scales at once; returns the steps of any block of columns."""
        order, columns = self.work.factor.order, self.work.importance.numel()
        for scale, r in zip(self.scales, self.requests, strict=True):
            scale.copy_(self._find(r.weight, r, self.work.importance))
        wide = torch.cat([expand_scale(scale, columns) for scale in self.scales])[:, order]
        return lambda start, stop, left: wide[:, start:stop]

    def entering(self, start: int, stop: int, left: Tensor) -> Tensor:
        """The scale of the group whose columns are `start` to `stop`, from its weights as corrected so far."""
        places = self.work.factor.order[start:stop]
        group = int(places[0]) // (stop - start)
        steps = []
        for scale, r, part in zip(self.scales, self.requests, torch.split(left, self.rows), strict=True):
            scale[:, group] = self._find(part.contiguous(), r, self.work.importance[places])[:, 0]
            steps.append(scale[:, group : group + 1].float().expand(-1, stop - start))
        return torch.cat(steps)

    def _find(self, weight: Tensor, request: Request, importance: Tensor) -> Tensor:
        return find_scale(weight, request.spec, self.work.dtype, clip=self.work.options.clip, importance=importance)
