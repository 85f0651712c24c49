"""The integer quadratic program: one candidate per unit where the damage of one depends on the others.

    minimise  sum_u damage[u][x_u] + 1/2 x' G x    subject to    minimum <= sum_u cost[u][x_u] <= budget

`x` is one-hot per unit and G has one row per (unit, candidate), unit by unit. Entries of G between two
candidates of the same unit never count, except on the diagonal. The optimum is searched for, not proven: what is
returned says how far from it, at most, it can be.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from itertools import pairwise as neighbours

import numpy
from numpy.typing import NDArray
from scipy.linalg import block_diag, eigvalsh

from llmcompress.compress.allocate.integer import Choices, InfeasibleError, solve
from llmcompress.compress.allocate.sweep import multiplier, padded
from llmcompress.errors import InputError

Array = NDArray[numpy.float64]
Indices = NDArray[numpy.int64]

ROUNDS, TRIAL_ROUNDS = 300, 20  # Frank-Wolfe steps
RELATIVE_GAP = 1e-6  # of the relaxation, at which Frank-Wolfe stops
MIXTURES = (1.0, 0.3, 0.03, 1e-3)  # shares of the diagonal in the curvature that is moved
KICKS = (0.03, 0.1, 0.3, 1.0)  # relative noise on the slopes of random starts, in turn
ROUNDING_SECONDS = 5.0


def pairwise(singles: Array, pairs: Array) -> Array:
    """CLADO's matrix (arXiv 2307.05657): diagonal `2 single_i`, elsewhere `pair_ij - single_i - single_j`.

    singles  (candidates,)             rise of the loss with only that candidate active
    pairs    (candidates, candidates)  rise with both active; NaN where not measured. One triangle is enough, and
                                       the mean counts where both are there. Never measured: no interaction.
    """
    cross = pairs - singles[:, None] - singles[None, :]
    both = numpy.stack([cross, cross.T])
    known = numpy.isfinite(both)
    matrix = numpy.where(known, both, 0.0).sum(0) / numpy.maximum(known.sum(0), 1)
    numpy.fill_diagonal(matrix, 2 * singles)
    return numpy.asarray(matrix)


def psd(matrix: Array) -> Array:
    """The nearest positive semidefinite matrix in the Frobenius norm: negative eigenvalues become zero."""
    values, vectors = numpy.linalg.eigh((matrix + matrix.T) / 2)
    nearest = (vectors * numpy.maximum(values, 0.0)) @ vectors.T
    return numpy.asarray((nearest + nearest.T) / 2)


def shrink(matrix: Array, share: float = 0.5) -> Array:
    """Take away a share of every cross term; the diagonal stays. Noise on measured pairs asks for about a half."""
    return numpy.asarray((1 - share) * matrix + share * numpy.diag(numpy.diag(matrix)))


@dataclass(frozen=True)
class QuadraticSolution:
    """`objective` of `chosen`; no choice within the budget lies below `bound`.

    `separable` is the objective of the best choice when cross terms are ignored; `objective` is never above it.
    """

    chosen: tuple[int, ...]
    cost: int
    objective: float
    bound: float
    separable: float

    @property
    def gap(self) -> float:
        """At most this share of the objective could be saved; 0 is a proven optimum."""
        return (self.objective - self.bound) / max(abs(self.objective), 1e-300)


def objective(units: Sequence[Choices], matrix: Array, chosen: Sequence[int]) -> float:
    """`sum damage + 1/2 x'Gx` of a choice; `matrix` (candidates, candidates), unit by unit."""
    return _Game(units, matrix).value(numpy.array(chosen, dtype=numpy.int64))


def minimise(
    units: Sequence[Choices],
    matrix: Array,
    budget: int,
    *,
    minimum: int = 0,
    starts: Sequence[Sequence[int]] = (),
    tries: int = 4,
) -> QuadraticSolution:
    """The best choice found for at most `budget` bits, with a certified lower bound.

    matrix   (candidates, candidates) symmetric, of any inertia; the bound is close where it is near semidefinite
    starts   further choices to improve on, such as the answer for a smaller budget; those over it are passed over
    tries    seeded random starts around the rounded relaxation, and as many around the best choice so far

    Starts: the optimum without cross terms, and the exact separable program on the linearisation at the relaxed
    optimum. Each is improved by exchanging one candidate, or two at once. Raises InfeasibleError as `solve` does.
    """
    game = _Game(units, matrix)
    diagonal = numpy.array(solve(game.linearised(0.0 * game.linear), budget, minimum=minimum).chosen)
    relaxed, bound = _relax(game, budget, minimum)
    given = [numpy.array(start, dtype=numpy.int64) for start in starts]
    pool = [diagonal, *(start for start in given if minimum <= game.cost(start) <= budget)]
    kicks = [0.0, *islice(cycle(KICKS), tries)]
    source = numpy.random.default_rng(0)
    pool += _roundings(game, relaxed, (budget, minimum), kicks, source=source)
    best = min((_exchange(game, start, budget, minimum) for start in pool), key=game.value)
    for kick in kicks:
        point = game.one_hot(best)
        for start in _roundings(game, point, (budget, minimum), [kick], source=source):
            best = min(best, _exchange(game, start, budget, minimum), key=game.value)
    value = game.value(best)
    chosen = tuple(int(i) for i in best)
    return QuadraticSolution(chosen, game.cost(best), value, min(bound, value), game.value(diagonal))


class _Game:
    """The program in flat arrays: one entry per (unit, candidate)."""

    def __init__(self, units: Sequence[Choices], matrix: Array) -> None:
        self.units = units
        self.sizes = [len(unit.costs) for unit in units]
        self.starts = numpy.concatenate([[0], numpy.cumsum(self.sizes)]).astype(numpy.int64)
        count = int(self.starts[-1])
        if matrix.shape != (count, count) or not numpy.isfinite(matrix).all():
            raise InputError(
                f"the matrix is {matrix.shape} and must be ({count}, {count}) of finite numbers",
                "one row and one column per candidate, unit by unit",
            )
        self.first = self.starts[:-1]
        self.unit_of = numpy.repeat(numpy.arange(len(units)), self.sizes)
        self.costs = numpy.array([c for unit in units for c in unit.costs], dtype=numpy.int64)
        self.whole = (matrix + matrix.T) / 2
        damages = numpy.array([d for unit in units for d in unit.damages], dtype=numpy.float64)
        self.linear = damages + numpy.diag(self.whole) / 2
        self.cross = numpy.where(self.unit_of[:, None] == self.unit_of[None, :], 0.0, self.whole)

    def value(self, chosen: Indices) -> float:
        places = self.first + chosen
        return float(self.linear[places].sum() + self.cross[numpy.ix_(places, places)].sum() / 2)

    def cost(self, chosen: Indices) -> int:
        return int(self.costs[self.first + chosen].sum())

    def one_hot(self, chosen: Indices) -> Array:
        point = numpy.zeros(len(self.costs))
        point[self.first + chosen] = 1.0
        return point

    def split(self, flat: Array) -> list[Array]:
        return [flat[a:b] for a, b in neighbours(self.starts)]

    def linearised(self, slopes: Array, linear: Array | None = None) -> list[Choices]:
        """The separable program with `slopes` on top of the linear part."""
        damages = self.split((self.linear if linear is None else linear) + slopes)
        pairs = zip(self.units, damages, strict=True)
        return [Choices(unit.costs, tuple(float(d) for d in damage)) for unit, damage in pairs]


def _roundings(
    game: _Game, point: Array, limits: tuple[int, int], kicks: Sequence[float], *, source: numpy.random.Generator
) -> list[Indices]:
    """Optima of the separable program on the linearisation at a point, with noise on its slopes."""
    slopes, found = game.cross @ point, []
    for kick in kicks:
        noise = kick * source.normal(size=len(slopes)) * (numpy.abs(slopes) + numpy.abs(game.linear))
        program = game.linearised(slopes + noise)
        try:
            rounded = solve(program, limits[0], minimum=limits[1], time_limit=ROUNDING_SECONDS)
        except InfeasibleError:  # with a minimum, a choice may exist and not be found in that time
            continue
        found.append(numpy.array(rounded.chosen, dtype=numpy.int64))
    return found


def _exchange(game: _Game, start: Indices, budget: int, minimum: int) -> Indices:
    """Exchange the candidates of one or two units, the best exchange first, until none helps."""
    chosen = start.copy()
    small = 1e-12 * (abs(game.value(start)) + float(numpy.abs(game.linear[game.first + start]).sum()))
    same = game.unit_of[:, None] == game.unit_of[None, :]
    while True:
        places = game.first + chosen
        now = places[game.unit_of]
        field = game.linear + game.cross[:, places].sum(1)
        single, extra = field - field[now], game.costs - game.costs[now]
        facing = game.cross[:, now]
        change = game.cross - facing - facing.T + game.cross[numpy.ix_(now, now)]
        change += single[:, None]
        change += single[None, :]
        spent = game.cost(chosen) + extra[:, None] + extra[None, :]
        change[same | (spent > budget) | (spent < minimum)] = numpy.inf
        first, second = numpy.unravel_index(int(change.argmin()), change.shape)
        alone = numpy.where(
            (spent.diagonal() - extra > budget) | (spent.diagonal() - extra < minimum), numpy.inf, single
        )
        moves = [first, second] if change[first, second] < alone.min() else [alone.argmin()]
        if not min(float(change[first, second]), float(alone.min())) < -small:
            return chosen
        for move in moves:
            chosen[game.unit_of[move]] = move - game.first[game.unit_of[move]]


def _relax(game: _Game, budget: int, minimum: int) -> tuple[Array, float]:
    """A point of the convexified relaxation near its optimum, and the best lower bound of the program.

    As x is one-hot, `x'Rx = diag(R)'x` for any R that is block diagonal over the units: such an R may be added to
    the cross terms until the sum is convex, and taken from the linear part. The less of it, the closer the bound.
    """
    curvatures = _curvatures(game)
    trials = [_frank_wolfe(game, curvature, (budget, minimum), TRIAL_ROUNDS) for curvature in curvatures]
    best = max(range(len(trials)), key=lambda i: trials[i][1])
    point, bound = _frank_wolfe(game, curvatures[best], (budget, minimum), ROUNDS)
    linear, quadratic = game.linear - numpy.diag(curvatures[best]) / 2, game.cross + curvatures[best]
    slope = quadratic @ point
    try:  # the tangent at that point bounds every choice from below: its exact optimum is better than its relaxed one
        tangent = solve(game.linearised(slope, linear), budget, minimum=minimum, time_limit=ROUNDING_SECONDS)
        bound = max(bound, tangent.bound - float(point @ slope) / 2)
    except InfeasibleError:
        pass
    return point, bound - 1e-10 * (abs(bound) + float(numpy.abs(linear @ point)))


def _curvatures(game: _Game) -> list[Array]:
    """Block diagonal matrices that make the cross terms convex where every unit's shares add up to one.

    Two bases, the blocks as they are and blocks of zeros, each less the smallest eigenvalue in several metrics.
    """
    largest = max(float(numpy.abs(game.linear).max()), float(numpy.abs(game.cross).max()), 1e-200)
    usual = numpy.where(game.linear > 0, 2 * game.linear, 1e-6 * largest)  # what hurts nobody has no scale of its own
    root = numpy.sqrt(numpy.maximum(usual, 1e-12 * largest))
    bases = [_differences(size) for size in game.sizes]
    across = block_diag(*bases)
    own = game.whole - game.cross
    found = []
    for mixture in MIXTURES:
        shape = [(1 - mixture) * numpy.outer(r, r) + mixture * numpy.diag(r * r) for r in game.split(root)]
        inner = [numpy.linalg.cholesky(b.T @ m @ b) for b, m in zip(bases, shape, strict=True) if b.shape[1]]
        into = across @ block_diag(*(numpy.linalg.inv(c).T for c in inner)) if inner else across
        for blocks in [numpy.zeros_like(own), own] if own.any() else [own]:
            lowest = 0.0
            if inner:
                lowest = float(eigvalsh(into.T @ (game.cross + blocks) @ into, subset_by_index=[0, 0])[0])
            found.append(blocks - (lowest - 1e-9 * abs(lowest) - 1e-12) * block_diag(*shape))
    return found


def _differences(size: int) -> Array:
    """Orthonormal columns (size, size - 1) that each add up to zero."""
    return numpy.asarray(numpy.linalg.qr(numpy.eye(size, size) - 1.0 / size)[0][:, : size - 1])


def _frank_wolfe(game: _Game, curvature: Array, limits: tuple[int, int], rounds: int) -> tuple[Array, float]:
    """Frank-Wolfe with exact steps. Returns the last point and the best lower bound any of its tangents gave."""
    linear, quadratic = game.linear - numpy.diag(curvature) / 2, game.cross + curvature
    costs = padded(game.split(game.costs.astype(numpy.float64)), 0.0)
    point, _ = _vertex(game, linear, costs, limits)
    curve, bound = quadratic @ point, -numpy.inf
    for _ in range(rounds):
        slope = linear + curve
        corner, lowest = _vertex(game, slope, costs, limits)
        value = float(linear @ point + point @ curve / 2)
        bound = max(bound, value + lowest - float(slope @ point))
        if value - bound <= RELATIVE_GAP * abs(value):
            break
        step = corner - point
        along, bend = float(slope @ step), quadratic @ step
        size = float(step @ bend)
        length = 1.0 if size <= 0 else min(max(-along / size, 0.0), 1.0)
        point, curve = point + length * step, curve + length * bend
    return point, bound


def _vertex(game: _Game, slope: Array, costs: Array, limits: tuple[int, int]) -> tuple[Array, float]:
    """The best fractional choice for a linear objective, and a lower bound of its value that rounding cannot break."""
    values, (budget, minimum) = padded(game.split(slope), numpy.inf), limits
    cap, resource = float(budget), costs
    low, high = multiplier(values, resource, cap)
    rows = numpy.arange(len(values))
    if high == 0.0 and costs[rows, values.argmin(1)].sum() < minimum:
        cap, resource = -float(minimum), -costs
        low, high = multiplier(values, resource, cap)
    lowest = float((values + high * resource).min(1).sum()) - high * cap
    over, under = ((values + price * resource).argmin(1) for price in (low, high))
    above, below = (float(resource[rows, picks].sum()) for picks in (over, under))
    share = 0.0 if above <= below else min(max((cap - below) / (above - below), 0.0), 1.0)
    return share * game.one_hot(over) + (1 - share) * game.one_hot(under), lowest
