"""RDP, where the path of the hidden states bends (arXiv 2604.19321): Ramer-Douglas-Peucker over the blocks.

A sample is a path of `L + 1` points, the hidden states that enter block 0 and those that leave each of the `L`
blocks. Point `l` belongs to block `l - 1`, whose importance is `S(l)`: the vote of several resolutions on the
points worth keeping, and the speed of the path. The last point is an end of the path and gets no votes, only
its speed. The importance is at least 1e-6, so that a block nothing speaks for counts next to nothing.

Options: `rdp.points` the `mean` over tokens, the `last` token, or `token` by token (at most 64 of each sample,
evenly spread); `rdp.space` `raw`, `unit` (every point on the sphere), `rms` (one scale for each block, the root
mean square over samples) or `drop_top_dims` (without the largest coordinates); `rdp.score` with `rdp.beta`,
`rdp.counts`, `rdp.keep`; `rdp.skip_first` leaves out position 0.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmcompress.compress.scoring import Measured, Observer, ScoreJob, layers_from_blocks
from llmcompress.options import RdpOptions
from llmcompress.types import BlockTrace, Series, Unit

UNIT: Unit = "unitless"
NEEDS_DATA = True
FLOOR = 1e-6
SPACES = ("raw", "unit", "rms", "drop_top_dims")
TOKENS_PER_SAMPLE = 64  # in `points: token`
DIMS_PER_DROPPED = 256  # `drop_top_dims` drops one coordinate in so many, and at least one
ROUNDING = 1e-12  # of a path's extent: nearer to the chord than this is on it

Array = NDArray[numpy.float64]


def chord_distances(points: Array, start: Array, end: Array) -> Array:
    """Distance of each point `(points, dims)` to the segment from `start` to `end` `(dims,)`."""
    chord, apart = end - start, points - start
    squared = float(chord @ chord)
    if squared > 0:
        apart = apart - numpy.clip(apart @ chord / squared, 0.0, 1.0)[:, None] * chord
    return numpy.asarray(numpy.sqrt(numpy.einsum("pd,pd->p", apart, apart)))


def breakpoint_scores(points: Array) -> Array:
    """For every point the largest epsilon at which Ramer-Douglas-Peucker still keeps it; the ends are infinite.

    points   (L + 1, dims)
    returns  (L + 1,) in the units of `points`

    The split at the farthest interior point is carried to exhaustion, and a point scores the smaller of its
    distance and its parent's score. So `score > epsilon` are the points that the recursion keeps at `epsilon`, for
    every epsilon at once. Points that rounding cannot tell from the chord score exactly 0.
    """
    scores = numpy.zeros(len(points))
    scores[[0, -1]] = numpy.inf
    least = ROUNDING * float(numpy.abs(points - points[0]).max(initial=0.0))
    open_segments = [(0, len(points) - 1, numpy.inf)]
    while open_segments:
        left, right, parent = open_segments.pop()
        if right - left < 2:
            continue
        distances = chord_distances(points[left + 1 : right], points[left], points[right])
        farthest = int(distances.argmax())
        score = min(parent, float(distances[farthest]))
        if score <= least:
            continue
        middle = left + 1 + farthest
        scores[middle] = score
        open_segments += [(left, middle, score), (middle, right, score)]
    return scores


def breakpoints(scores: Array, count: int) -> tuple[int, ...]:
    """The `count` interior points with the largest scores above 0, or all there are, in order; earlier on a tie."""
    interior = [point for point in range(1, len(scores) - 1) if scores[point] > 0]
    return tuple(sorted(sorted(interior, key=lambda point: -scores[point])[:count]))


def vote(scores: Array, counts: Sequence[int]) -> Array:
    """`V(l) = sum over t in counts of t^-1/2 where l is among the t best breakpoints`; `(L + 1,)`, ends 0."""
    found = numpy.zeros(len(scores))
    for count in counts:
        found[list(breakpoints(scores, count))] += count**-0.5
    return found


def velocity(points: Array) -> Array:
    """Length of each step of the path `(L + 1, dims)`: `(L,)`, step `l` leads to point `l + 1`."""
    return numpy.asarray(numpy.linalg.norm(numpy.diff(points, axis=0), axis=1))


def hybrid(votes: Array, speed: Array, beta: float) -> Array:
    """`beta V / max V + (1 - beta) v / max v`, of equal shape; a part that is zero everywhere stays zero."""
    parts = [values / max(float(values.max(initial=0.0)), 1e-300) for values in (votes, speed)]
    return numpy.asarray(beta * parts[0] + (1 - beta) * parts[1])


def in_space(points: Array, space: str, squares: Array) -> Array:
    """One path `(L + 1, dims)` in the space distances are taken in.

    `squares` `(L + 1, dims)` is the mean square of each coordinate of each point over all paths: `rms` and
    `drop_top_dims` treat all paths alike, or distances could not be compared between them.
    """
    if space == "unit":
        return numpy.asarray(points / numpy.maximum(numpy.linalg.norm(points, axis=1, keepdims=True), 1e-300))
    if space == "rms":
        return numpy.asarray(points / numpy.sqrt(numpy.maximum(squares.mean(1, keepdims=True), 1e-300)))
    if space == "drop_top_dims":
        dropped = min(max(points.shape[1] // DIMS_PER_DROPPED, 1), points.shape[1] - 1)
        order = numpy.argsort(squares.max(0), kind="stable")
        return points[:, numpy.sort(order[: len(order) - dropped])]
    return points


@dataclass(frozen=True)
class Bends:
    """Means over all paths, in one space: the path `(L + 1, dims)`, votes and velocity `(L,)` of points 1 to L."""

    path: Array
    votes: Array
    velocity: Array

    def score(self, options: RdpOptions) -> Array:
        """`S(l)` of points 1 to L, at most 1."""
        share = {"vote": 1.0, "velocity": 0.0}.get(options.score, options.beta)
        return hybrid(self.votes, self.velocity, share)

    def selected(self, options: RdpOptions) -> tuple[float, ...]:
        """1.0 at the `keep` interior points with the largest `S`, of `L + 1` points."""
        scores = numpy.concatenate([[numpy.inf], self.score(options)])
        keep = options.keep if options.keep is not None else math.ceil((len(scores) - 1) / 3)
        chosen = breakpoints(scores, keep)
        return tuple(float(point in chosen) for point in range(len(scores)))


def bends(paths: Tensor, space: str, counts: Sequence[int]) -> Bends:
    """What `paths` `(paths, L + 1, dims)` have in common; one path at a time is in float64."""
    squares = numpy.asarray(sum(path.double().square() for path in paths) / len(paths))
    moved = [in_space(path.double().numpy(), space, squares) for path in paths]
    return Bends(
        path=numpy.asarray(sum(moved) / len(moved)),
        votes=numpy.asarray(sum(vote(breakpoint_scores(path), counts)[1:] for path in moved) / len(moved)),
        velocity=numpy.asarray(sum(velocity(path) for path in moved) / len(moved)),
    )


def plane(points: Array) -> tuple[Array, Array]:
    """Coordinates `(L + 1,)` of a path on its two widest axes (PCA); each axis points to where it reaches farthest."""
    centred = points - points.mean(0)
    left, sizes, _ = numpy.linalg.svd(centred, full_matrices=False)
    axes = numpy.zeros((2, len(points)))
    for number in range(min(2, len(sizes))):
        values = left[:, number] * sizes[number]
        axes[number] = values * (1.0 if values[numpy.abs(values).argmax()] >= 0 else -1.0)
    return axes[0], axes[1]


def points_of(hidden: Tensor, points: str, *, skip_first: bool) -> Tensor:
    """The points `(paths, dims)` that hidden states `(batch, tokens, dims)` are on their samples' paths."""
    tokens = hidden.shape[1]
    first = 1 if skip_first and tokens > 1 else 0
    if points == "last":
        return hidden[:, -1]
    if points == "mean":
        return hidden[:, first:].mean(1)
    count = min(TOKENS_PER_SAMPLE, tokens - first)
    chosen = torch.linspace(first, tokens - 1, count, dtype=torch.float64).round().long()
    return hidden[:, chosen.to(hidden.device)].flatten(0, 1)


class _Trajectory(Observer):
    """Keeps the points of every sample's path."""

    def __init__(self, job: ScoreJob) -> None:
        super().__init__(job)
        self.points: list[list[Tensor]] = [[] for _ in range(len(job.trace.blocks) + 1)]

    def see(self, info: BlockTrace, entering: Tensor, leaving: Tensor) -> None:
        if info.index == 0:
            self._keep(0, entering)
        self._keep(info.index + 1, leaving)

    def _keep(self, number: int, hidden: Tensor) -> None:
        options = self.job.options.rdp
        self.points[number].append(points_of(hidden, options.points, skip_first=options.skip_first).cpu())

    def finish(self) -> Measured:
        options = self.job.options.rdp
        paths = torch.stack([torch.cat(parts) for parts in self.points], dim=1)
        found = {space: bends(paths, space, options.counts) for space in SPACES}
        chosen = found[options.space]
        x, y = plane(chosen.path)
        scores = breakpoint_scores(chosen.path)
        scores[[0, -1]] = 0.0
        figures: dict[str, Sequence[float] | Array] = {
            "trajectory x": x,
            "trajectory y": y,
            "breakpoint score": scores,
            "vote": chosen.votes,
            "velocity": chosen.velocity,
            "selected": chosen.selected(options),
            **{f"selected {space}": found[space].selected(options) for space in SPACES},
        }
        series = tuple(Series(name=name, values=tuple(map(float, values))) for name, values in figures.items())
        importance = [max(float(value), FLOOR) for value in chosen.score(options)]
        return Measured(layers_from_blocks(self.job, importance), series)


def observer(job: ScoreJob) -> Observer:
    """Score every linear by the bend of the path at its block, measured on the full-precision model."""
    return _Trajectory(job)
