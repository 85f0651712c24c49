"""High-impact ratios: for each linear, the share of its columns that get more bits than the rest.

    minimise    sum_l a_l phi_l(r_l) + sum_{l<m} C_lm sqrt(phi_l(r_l) phi_m(r_m))
    subject to  sum_l cost_l(r_l) <= budget

`phi_l(r)` is the damage left when the share `r` of the columns with the highest scores is wide. The continuous
program is solved by quadratic programs after linearising `sqrt(phi)`, then rounded to RATIOS under the exact
storage and improved by exchanges.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

from llmcompress.compress.allocate.integer import Choices, InfeasibleError, solve
from llmcompress.compress.allocate.quadratic import QuadraticSolution, minimise, psd
from llmcompress.errors import InputError

Array = NDArray[numpy.float64]

RATIOS = (0.0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
NEWTON_STEPS = 8
PROJECTED_STEPS = 200


def column_scores(error_squared: Array, hessian_diagonal: Array) -> Array:
    """`H_jj |dW_:j|^2` per column: the cheap score, exact where inputs are uncorrelated.

    error_squared (columns,) sum over rows of the squared rounding error; hessian_diagonal (columns,).
    """
    return numpy.asarray(error_squared * hessian_diagonal)


def obq_column_scores(error_squared: Array, inverse_hessian_diagonal: Array) -> Array:
    """`|dW_:j|^2 / (2 [H^-1]_jj)` per column: the loss that is left when the other columns compensate (OBQ)."""
    return numpy.asarray(error_squared / (2 * inverse_hessian_diagonal))


def column_bits(rows: int, columns: int, high: int, *, low_bits: int, high_bits: int, metadata_bits: int = 0) -> int:
    """Storage of a `(rows, columns)` linear with `high` wide columns: codes, metadata, and a mask where both occur."""
    mask = columns if 0 < high < columns else 0
    return rows * ((columns - high) * low_bits + high * high_bits) + metadata_bits + mask


def mask_entropy(ratio: float) -> float:
    """`h2(r) = -r log2 r - (1-r) log2 (1-r)`: bits per weight to say which single weights are wide."""
    return -sum(p * math.log2(p) for p in (ratio, 1 - ratio) if p > 0)


def element_bits(weights: int, ratio: float, *, low_bits: int, high_bits: int, metadata_bits: int = 0) -> int:
    """Storage when single weights are wide: codes, metadata and the entropy of the mask, rounded up."""
    return math.ceil(weights * ((1 - ratio) * low_bits + ratio * high_bits + mask_entropy(ratio))) + metadata_bits


@dataclass(frozen=True, eq=False)
class Columns:
    """A linear by its columns.

    rows           outputs
    low_scores     (columns,) damage of each column in the narrow format
    high_scores    (columns,) in the wide format; None: nothing is left of it
    metadata_bits  scales and whatever else is stored beside the codes
    weight         factor of the damage in the objective
    """

    rows: int
    low_scores: Array
    high_scores: Array | None = None
    metadata_bits: int = 0
    weight: float = 1.0

    def counts(self) -> tuple[int, ...]:
        """Wide columns at each of RATIOS, rounded down."""
        return tuple(int(ratio * len(self.low_scores)) for ratio in RATIOS)

    def order(self) -> NDArray[numpy.intp]:
        """Columns by what widening saves, most first."""
        high = 0.0 if self.high_scores is None else self.high_scores
        return numpy.argsort(high - self.low_scores, kind="stable")

    def curve(self) -> Array:
        """(columns + 1,) damage left when the first 0, 1, 2, ... columns of `order` are wide."""
        order = self.order()
        low = self.low_scores[order]
        high = numpy.zeros(len(low)) if self.high_scores is None else self.high_scores[order]
        narrow = numpy.concatenate([numpy.cumsum(low[::-1])[::-1], [0.0]])
        return numpy.asarray(narrow + numpy.concatenate([[0.0], numpy.cumsum(high)]))

    def choices(self, low_bits: int, high_bits: int) -> Choices:
        """Exact storage and damage at each of RATIOS."""
        costs = tuple(
            column_bits(self.rows, len(self.low_scores), high, low_bits=low_bits, high_bits=high_bits,
                        metadata_bits=self.metadata_bits) for high in self.counts()
        )  # fmt: skip
        return Choices(costs, tuple(float(self.weight * damage) for damage in self.damages()))

    def damages(self) -> Array:
        """`phi(r)` at each of RATIOS, without the weight."""
        return self.curve()[list(self.counts())]


@dataclass(frozen=True)
class Ratios:
    """The ratio of each linear, the storage and the damage they cost, and how far from the optimum that can be."""

    ratios: tuple[float, ...]
    chosen: tuple[int, ...]  # index in RATIOS
    cost: int
    damage: float
    bound: float


def high_impact_ratios(
    linears: Sequence[Columns],
    cross: Array | None,
    budget: int,
    *,
    widths: tuple[int, int],
    start: Sequence[int] | None = None,
) -> Ratios:
    """Choose a ratio for every linear (derived from arXiv 2511.17801) within `budget` storage bits.

    cross    (linears, linears) symmetric C, the diagonal unused; None: no interaction, solved exactly
    widths   bits of the narrow and of the wide format
    start    a known choice to improve on, such as the one for a smaller budget: the damage never exceeds its

    Raises InfeasibleError when the narrow format alone is over the budget.
    """
    units = [linear.choices(*widths) for linear in linears]
    if any(damage < 0 for linear in linears for damage in linear.damages()):
        raise InputError("column scores are negative", "scores are weighted squares of errors, which cannot be")
    coupling = numpy.zeros((len(units), len(units))) if cross is None else (cross + cross.T) / 2
    numpy.fill_diagonal(coupling, 0.0)
    if not coupling.any():
        exact = solve(units, budget)
        return _ratios(QuadraticSolution(exact.chosen, exact.cost, exact.damage, exact.bound, exact.damage))
    smallest = sum(unit.costs[0] for unit in units)
    if smallest > budget:
        raise InfeasibleError(smallest, sum(max(unit.costs) for unit in units))
    roots = numpy.sqrt(numpy.array([linear.damages() for linear in linears]))
    prices = numpy.array([float(unit.costs[-1] - unit.costs[0]) for unit in units])
    around = coupling @ _root(linears, relax_ratios(linears, coupling, prices, budget=budget - smallest))[0]
    rounded = solve(_with_slopes(units, roots * around[:, None]), budget).chosen
    starts = [rounded] if start is None else [rounded, start]
    return _ratios(choose_ratios(units, coupling, budget, starts=starts, roots=roots.ravel()))


def choose_ratios(
    units: Sequence[Choices],
    coupling: Array,
    budget: int,
    *,
    minimum: int = 0,
    starts: Sequence[Sequence[int]] = (),
    roots: Array | None = None,
) -> QuadraticSolution:
    """`min sum d_l + sum_{l<m} C_lm s_l s_m`, with the damages `d` and the storage of any choices.

    coupling  (units, units) symmetric C with a zero diagonal; the others as in `minimise`
    roots     `s` of every choice, unit after unit; `sqrt(d)` where not given
    """
    roots = numpy.concatenate([numpy.sqrt(unit.damages) for unit in units]) if roots is None else roots
    place = numpy.repeat(numpy.arange(len(units)), [len(unit.costs) for unit in units])
    matrix = roots[:, None] * coupling[numpy.ix_(place, place)] * roots[None, :]
    return minimise(units, matrix, budget, minimum=minimum, starts=starts)


def relax_ratios(linears: Sequence[Columns], coupling: Array, prices: Array, *, budget: float) -> Array:
    """Ratios in [0, 1] that nearly minimise the continuous program, (linears,).

    coupling (linears, linears) symmetric with a zero diagonal; prices (linears,) bits from ratio 0 to ratio 1, and
    budget the bits to spend on that. `sqrt(phi)` is linearised, the quadratic program solved, and the step halved
    until the objective falls; a coupling that is too strong to be convex is projected for that.
    """
    form = numpy.diag([linear.weight for linear in linears]) + coupling / 2
    convex = psd(form)
    ratios = _project(numpy.full(len(linears), budget / max(float(prices.sum()), 1e-300)), prices, budget)
    for _ in range(NEWTON_STEPS):
        root, slope = _root(linears, ratios)
        hessian = 2 * slope[:, None] * convex * slope[None, :]
        gradient = 2 * slope * (convex @ root)
        aim = _box_program(hessian, gradient - hessian @ ratios, ratios, prices=prices, budget=budget)
        value, length = float(root @ form @ root), 1.0
        while length > 1e-3:
            trial = ratios + length * (aim - ratios)
            after = _root(linears, trial)[0]
            if float(after @ form @ after) < value:
                break
            length /= 2
        if length <= 1e-3:
            return ratios
        ratios = trial
    return ratios


def _root(linears: Sequence[Columns], ratios: Array) -> tuple[Array, Array]:
    """`sqrt(phi)` and its derivative at a ratio of each linear; phi is linear between whole columns."""
    roots, slopes = numpy.zeros(len(linears)), numpy.zeros(len(linears))
    for place, (linear, ratio) in enumerate(zip(linears, ratios, strict=True)):
        curve = linear.curve()
        last = len(curve) - 1
        column = min(int(ratio * last), last - 1)
        rise = curve[column + 1] - curve[column]
        value = max(float(curve[column] + (ratio * last - column) * rise), 0.0)
        roots[place] = math.sqrt(value)
        floor = math.sqrt(max(float(curve[0]), 1e-300)) * 1e-3  # the root has no finite slope where nothing is left
        slopes[place] = rise * last / (2 * max(roots[place], floor))
    return roots, slopes


def _box_program(hessian: Array, linear: Array, start: Array, *, prices: Array, budget: float) -> Array:
    """`min 1/2 x'Hx + c'x` over [0, 1] and one budget, by accelerated projected gradients."""
    steepest = float(numpy.linalg.eigvalsh(hessian)[-1])
    if steepest <= 0:
        return _project(start - numpy.sign(linear), prices, budget)
    point, ahead, momentum = start, start, 1.0
    for _ in range(PROJECTED_STEPS):
        following = _project(ahead - (hessian @ ahead + linear) / steepest, prices, budget)
        growth = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        ahead = following + (momentum - 1) / growth * (following - point)
        point, momentum = following, growth
    return point


def _project(point: Array, prices: Array, budget: float) -> Array:
    """The nearest point of the box that keeps the budget."""
    inside = numpy.clip(point, 0.0, 1.0)
    if float(prices @ inside) <= budget:
        return inside
    low, high = 0.0, float(numpy.max(point / numpy.maximum(prices, 1e-300)))
    for _ in range(60):
        middle = (low + high) / 2
        over = float(prices @ numpy.clip(point - middle * prices, 0.0, 1.0)) > budget
        low, high = (middle, high) if over else (low, middle)
    return numpy.clip(point - high * prices, 0.0, 1.0)


def _with_slopes(units: Sequence[Choices], slopes: Array) -> list[Choices]:
    pairs = zip(units, slopes, strict=True)
    return [
        Choices(unit.costs, tuple(float(d + s) for d, s in zip(unit.damages, row, strict=True))) for unit, row in pairs
    ]


def _ratios(found: QuadraticSolution) -> Ratios:
    ratios = tuple(RATIOS[i] for i in found.chosen)
    return Ratios(ratios, found.chosen, found.cost, found.objective, found.bound)
