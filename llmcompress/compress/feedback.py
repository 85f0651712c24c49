"""Rounding with feedback: the numerics of GPTQ and its relatives (arXiv 2210.17323, 2504.02692).

Columns are rounded one after the other, and each error is pushed onto the columns still unrounded. Rows do not
interact, so the rows of every linear that reads one input, and of every format asked for, go through one loop.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.kernels.triton import rounds_columns

BLOCK_COLUMNS = 128
INNER_COLUMNS = 32
DAMP_RETRIES = 3
TRIANGLE = 128  # columns that are inverted at once
STRIPE = 256  # rows or columns of a Hessian that are copied at a time, while it becomes another matrix

Scales = Callable[[int, int, Tensor], Tensor]  # (start, stop, left): a block of columns as it stands
Nearest = Callable[[int, Tensor], tuple[Tensor, Tensor]]  # (column, its values as they stand): codes, stored values


@dataclass(frozen=True)
class Factor:
    """`upper` is `U` of the damped inverse Hessian, `H^-1 = U^T U`, with columns taken in `order`."""

    order: Tensor
    upper: Tensor


def column_order(diagonal: Tensor, order: str, group_size: int) -> Tensor:
    """The order columns are rounded in, by the diagonal of their Hessian, largest first.

    `act`: one by one. `group`: groups as wholes, and columns inside each, so that a scale can still be chosen when
    its group is reached (group-aware reordering). `plain`: as they lie.
    """
    if order == "plain":
        return torch.arange(len(diagonal), device=diagonal.device)
    if order == "act":
        return torch.argsort(diagonal, descending=True, stable=True)
    groups = diagonal.view(-1, group_size)
    inside = torch.argsort(groups, dim=1, descending=True, stable=True)
    whole = torch.argsort(groups.sum(1), descending=True, stable=True)
    return (inside + torch.arange(len(groups), device=diagonal.device)[:, None] * group_size)[whole].flatten()


def damped_diagonal(hessian: Tensor, damp: float) -> Tensor:
    """float64 `(columns,)`: inputs never seen get the mean of the diagonal, all get `damp` times the mean."""
    diagonal = hessian.diagonal().to(torch.float64, copy=True)
    diagonal += (diagonal <= 0).to(diagonal.dtype) * diagonal.mean().clamp_min(1e-30)
    return diagonal.add_(damp * diagonal.mean())


def damped(hessian: Tensor, damp: float, order: Tensor | None = None) -> Tensor:
    """float64 `(columns, columns)`, the Hessian with its `damped_diagonal`, its columns taken in `order`.

    Nothing else of this size is made on the way: of a wide input nothing in a run is larger.
    """
    full = hessian.new_empty(hessian.shape, dtype=torch.float64)
    diagonal = damped_diagonal(hessian, damp)
    for start in range(0, len(hessian), STRIPE):
        part = slice(start, start + STRIPE)
        full[part] = hessian[part] if order is None else hessian[order[part]][:, order]
    full.diagonal().copy_(diagonal if order is None else diagonal[order])
    return full


def dampings(damp: float) -> Iterator[float]:
    """The damping, then ten times as much, for as often as it is worth trying."""
    for _ in range(DAMP_RETRIES + 1):
        yield damp
        damp *= 10


def factorise(matrix: Tensor) -> int:
    """Put the Cholesky factor of a symmetric matrix, which lies by columns, in its place; not 0 where it has none."""
    failed = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix, out=(matrix, failed))
    return int(failed)


def invert_triangular(lower: Tensor) -> None:
    """Put the inverse of a lower triangular matrix, which lies by columns, in its place; above it anything may lie."""
    size, half = len(lower), len(lower) // 2
    if size <= TRIANGLE:
        lower.copy_(torch.linalg.solve_triangular(lower, torch.eye(size).to(lower), upper=False))
        return
    first, last, below = lower[:half, :half], lower[half:, half:], lower[half:, :half]
    solver = last.T.contiguous().T  # once for all parts: who solves would copy what is no whole matrix
    for part in torch.split(below, STRIPE, 1):
        part.copy_(torch.linalg.solve_triangular(solver, part, upper=False))
    solver = first.T.contiguous().T
    for part in torch.split(below, STRIPE):
        part.copy_(torch.linalg.solve_triangular(solver, part, upper=False, left=False)).neg_()
    del solver
    invert_triangular(first)
    invert_triangular(last)


def inverse_factor(hessian: Tensor, order: Tensor, damp: float) -> tuple[Factor | None, tuple[str, ...]]:
    """Factorise the damped inverse; tenfold more damping up to three times where it is singular.

    Of the Hessian with its columns the other way round, `L L^T`, `L^-1` turned round again is `U`: half the work of
    inverting first. Returns None for a Hessian that cannot be factorised, and the notes to record.
    """
    for attempt, tried in enumerate(dampings(damp)):
        lower = damped(hessian, tried, order.flip(0)).T
        if factorise(lower):
            continue
        invert_triangular(lower)
        upper = hessian.new_empty(hessian.shape, dtype=torch.float32)
        for start in range(0, len(upper), STRIPE):
            stop = min(start + STRIPE, len(upper))
            upper[start:stop] = lower[len(upper) - stop : len(upper) - start].flip(0, 1)
        if not bool(torch.isfinite(upper.diagonal()).all()):
            continue
        notes = () if attempt == 0 else (f"singular Hessian: damping raised to {tried:g}",)
        return Factor(order, upper.triu_()), notes
    return None, (f"Hessian still singular at damping {tried:g}",)


def drift_factor(drift: Tensor, factor: Factor, alpha: float) -> Tensor:
    """What GPTAQ adds: `P = alpha * strictly_upper(C U^T) U`, float32 `(columns, columns)`, in processing order.

    drift  (columns, columns)  `C`, the mean of `(x' - x) x^T`
    """
    upper = factor.upper.double()
    ordered = drift.double()[factor.order][:, factor.order]
    return (alpha * torch.triu(ordered @ upper.T, diagonal=1) @ upper).float()


@dataclass(frozen=True)
class Loop:
    """What the loop is told besides the weights.

    nearest  rounds one column: codes `(rows,)`, below 256, and what they stand for
    enter    is told of a block of columns as it stands, `(start, stop, left)`, before its first is rounded
    block    columns of such a block
    extra    (columns, columns)  GPTAQ's `P`, or None
    pull     FOEM's: how strongly compensated weights are drawn back to where they began, 0 is not at all
    grid     whose `nearest` it is, where that rounds to integers: a GPU then takes many columns at once
    """

    nearest: Nearest
    enter: Callable[[int, int, Tensor], None] | None = None
    block: int = BLOCK_COLUMNS
    extra: Tensor | None = None
    pull: float = 0.0
    grid: "Integers | None" = None


class Integers:
    """Rounds to symmetric integers.

    half    (rows,)  half the number of codes of each row
    scales  gives the steps `(rows, stop - start)` of a block of columns, from the block as it stands, same shape
    """

    def __init__(self, half: Tensor, scales: Scales) -> None:
        self.half, self._top, self._scales = half, 2 * half - 1, scales
        self._start, self._steps = 0, half

    def enter(self, start: int, stop: int, left: Tensor) -> None:
        """Choose the steps of a block."""
        self._start, self._steps = start, self._scales(start, stop, left).T.contiguous()

    def steps(self, start: int, stop: int) -> Tensor:
        """Those of some columns of the block that was entered, `(stop - start, rows)`."""
        return self._steps[start - self._start : stop - self._start]

    def nearest(self, column: int, values: Tensor) -> tuple[Tensor, Tensor]:
        """Codes, as floats, and what they stand for."""
        step = self._steps[column - self._start]
        code = torch.minimum(torch.round(values / step).add_(self.half).clamp_(min=0), self._top)
        return code, (code - self.half) * step


def round_columns(weight: Tensor, upper: Tensor, loop: Loop) -> Tensor:
    """The feedback loop, blocked twice: columns of an inner block one by one, everything further at once.

    weight   (rows, columns)     float32, in processing order
    upper    (columns, columns)  upper Cholesky factor of the inverse Hessian, in processing order
    returns  (rows, columns)     uint8 codes, in processing order
    """
    rounds = _Rounds(weight, upper, loop)
    columns = weight.shape[1]
    for start in range(0, columns, loop.block):
        stop = min(start + loop.block, columns)
        if loop.enter is not None:
            loop.enter(start, stop, rounds.left[start:stop].T)
        for inner in range(start, stop, rounds.inner):
            end = min(inner + rounds.inner, stop)
            rounds.block(inner, end)
            rounds.push(inner, end, stop)
        rounds.push(start, stop, columns)
    return rounds.codes.T


class _Rounds:
    """State of the loop, transposed so that a column of the weight is contiguous."""

    def __init__(self, weight: Tensor, upper: Tensor, loop: Loop) -> None:
        self.left, self.upper, self.loop = weight.T.contiguous(), upper, loop
        self.raw = self.left.clone() if loop.pull else self.left
        self.codes = torch.empty(self.left.shape, dtype=torch.uint8, device=weight.device)
        self.errors = torch.empty_like(self.left)
        self.before = torch.empty_like(self.left) if loop.extra is not None else self.left
        self.diagonal = upper.diagonal().tolist()
        self.fused = None if loop.pull or loop.extra is not None or not rounds_columns(self.left) else loop.grid
        self.inner = INNER_COLUMNS if self.fused is None else BLOCK_COLUMNS

    def block(self, start: int, stop: int) -> None:
        """Round columns `start` to `stop`, each as those before it leave it."""
        if self.fused is None:
            for column in range(start, stop):
                self.column(column, stop)
            return
        from llmcompress.kernels.triton.columns import round_block  # lazy: triton is an extra

        grid = self.fused.steps(start, stop), self.fused.half
        round_block(self.left, self.upper, grid, out=(self.codes, self.errors), start=start)

    def column(self, column: int, end: int) -> None:
        """Round one column and correct those before `end`."""
        row = self.left[column]
        self.codes[column], values = self.loop.nearest(column, row)
        error = row - values
        if self.loop.pull:
            error -= self.loop.pull * (row - self.raw[column])
        torch.div(error, self.diagonal[column], out=self.errors[column])
        rest = slice(column + 1, end)
        if self.loop.extra is not None:
            self.before[column] = row
            self.left[rest].addr_(self.loop.extra[column, rest], row)
        self.left[rest].addr_(self.upper[column, rest], self.errors[column], alpha=-1)

    def push(self, start: int, stop: int, end: int) -> None:
        """Correct columns `stop` to `end` for the errors of columns `start` to `stop`."""
        self.left[stop:end].addmm_(self.upper[start:stop, stop:end].T, self.errors[start:stop], alpha=-1)
        if self.loop.extra is not None:
            self.left[stop:end].addmm_(self.loop.extra[start:stop, stop:end].T, self.before[start:stop])
