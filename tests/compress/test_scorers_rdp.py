"""RDP on paths whose bends are known, against the recursion itself, and against the whole model."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scoring_help import job_for, scored
from test_scorers_lim_zd import block_states

from llmcompress.compress.scorers import rdp
from llmcompress.compress.scorers.rdp import SPACES, bends, breakpoint_scores, breakpoints, chord_distances, vote
from llmcompress.options import RdpOptions

Array = Any
SEEDS = st.integers(0, 1_000_000)


def to_segment(point: list[float], start: list[float], end: list[float]) -> float:
    """Distance of a point to a segment, in plain arithmetic."""
    chord = [e - s for s, e in zip(start, end, strict=True)]
    apart = [p - s for s, p in zip(start, point, strict=True)]
    squared = sum(c * c for c in chord)
    along = sum(a * c for a, c in zip(apart, chord, strict=True)) / squared if squared else 0.0
    along = min(max(along, 0.0), 1.0)
    return math.sqrt(sum((a - along * c) ** 2 for a, c in zip(apart, chord, strict=True)))


def kept_at(points: list[list[float]], epsilon: float, first: int = 0) -> set[int]:
    """The interior points that Ramer-Douglas-Peucker keeps at one epsilon, by its recursion; numbered from `first`."""
    distances = [to_segment(point, points[0], points[-1]) for point in points[1:-1]]
    if not distances or max(distances) <= epsilon:
        return set()
    split = 1 + distances.index(max(distances))
    before, after = points[: split + 1], points[split:]
    return {first + split} | kept_at(before, epsilon, first) | kept_at(after, epsilon, first + split)


def path_of(seed: int, points: int, dims: int) -> Array:
    return numpy.random.default_rng(seed).normal(size=(points, dims)).cumsum(0)


def test_distance_is_to_the_segment() -> None:
    start, end = numpy.array([0.0, 0.0]), numpy.array([4.0, 0.0])
    points = numpy.array([[2.0, 3.0], [-3.0, 4.0], [7.0, -4.0], [1.0, 0.0]])
    assert chord_distances(points, start, end).tolist() == [3.0, 5.0, 5.0, 0.0]
    assert chord_distances(points, end, end).tolist() == pytest.approx([math.hypot(2, 3), math.hypot(7, 4), 5.0, 3.0])


@settings(max_examples=30, deadline=None)
@given(before=st.integers(0, 6), after=st.integers(0, 6), seed=SEEDS)
def test_an_l_shaped_path_bends_at_its_corner_alone(before: int, after: int, seed: int) -> None:
    random = numpy.random.default_rng(seed)
    axes = numpy.linalg.qr(random.normal(size=(5, 5)))[0]
    there = numpy.concatenate([[0.0], numpy.sort(random.uniform(0.05, 0.95, before)), [1.0]])
    up = numpy.concatenate([numpy.sort(random.uniform(0.05, 0.95, after)), [1.0]])
    corner = before + 1
    points = numpy.concatenate([there[:, None] * axes[0], axes[0] + up[:, None] * axes[1]]) + 3.0
    scores = breakpoint_scores(points)
    assert breakpoints(scores, 1) == (corner,)
    assert breakpoints(scores, 5) == (corner,)
    assert scores[corner] == pytest.approx(math.sqrt(0.5))


@settings(max_examples=30, deadline=None)
@given(steps=st.lists(st.floats(0.01, 10), min_size=1, max_size=12), seed=SEEDS)
def test_a_straight_path_has_no_breakpoint(steps: list[float], seed: int) -> None:
    random = numpy.random.default_rng(seed)
    direction = random.normal(size=7)
    points = numpy.concatenate([[0.0], numpy.cumsum(steps)])[:, None] * direction
    scores = breakpoint_scores(points)
    assert scores[1:-1].tolist() == [0.0] * (len(steps) - 1)
    assert numpy.isinf(scores[[0, -1]]).all()
    assert breakpoints(scores, 3) == ()


@settings(max_examples=60, deadline=None)
@given(points=st.integers(2, 14), dims=st.integers(1, 5), seed=SEEDS, portion=st.floats(0, 1.2))
def test_scores_hold_the_recursion_at_every_epsilon(points: int, dims: int, seed: int, portion: float) -> None:
    path = path_of(seed, points, dims)
    scores = breakpoint_scores(path)
    finite = sorted(scores[1:-1])
    between = [(low + high) / 2 for low, high in pairwise(finite) if high - low > 1e-9]
    largest = finite[-1] if finite else 1.0
    for epsilon in (*between, portion * largest, largest * 1.01, 1e-9):
        if all(abs(score - epsilon) > 1e-10 for score in finite):
            kept = {point for point in range(1, points - 1) if scores[point] > epsilon}
            assert kept == kept_at(path.tolist(), epsilon)
    for fewer, more in pairwise(range(points)):
        assert set(breakpoints(scores, fewer)) <= set(breakpoints(scores, more))


@settings(max_examples=30, deadline=None)
@given(points=st.integers(3, 10), seed=SEEDS)
def test_a_path_in_general_position_keeps_every_point_at_epsilon_zero(points: int, seed: int) -> None:
    scores = breakpoint_scores(path_of(seed, points, points + 2))
    assert breakpoints(scores, points) == tuple(range(1, points - 1))


@settings(max_examples=40, deadline=None)
@given(points=st.integers(2, 10), seed=SEEDS, factor=st.sampled_from([1e-6, 0.5, 3.0, 1e6]))
def test_scores_move_with_the_path(points: int, seed: int, factor: float) -> None:
    random = numpy.random.default_rng(seed)
    path = path_of(seed, points, 4)
    rotation = numpy.linalg.qr(random.normal(size=(4, 4)))[0]
    moved = factor * (path @ rotation + random.normal(size=4))
    expected = factor * breakpoint_scores(path)
    assert breakpoint_scores(moved)[1:-1] == pytest.approx(expected[1:-1], rel=1e-6, abs=1e-9 * factor)
    assert rdp.velocity(moved) == pytest.approx(factor * rdp.velocity(path), rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(points=st.integers(3, 10), seed=SEEDS, which=st.integers(0, 9))
def test_a_duplicate_point_takes_none_away(points: int, seed: int, which: int) -> None:
    path = path_of(seed, points, 3)
    twin = which % points
    doubled = numpy.insert(path, twin, path[twin], axis=0)
    places = [point + (point > twin) for point in range(points)]  # where each point, or its first twin, now is
    before, after = breakpoint_scores(path), breakpoint_scores(doubled)
    for point in range(1, points - 1):
        there = max(after[places[point]], after[places[point] + 1]) if point == twin else after[places[point]]
        assert there >= before[point] * (1 - 1e-9)


@settings(max_examples=40, deadline=None)
@given(points=st.integers(2, 12), seed=SEEDS, counts=st.lists(st.integers(1, 8), max_size=6))
def test_votes_are_bounded_and_add_up(points: int, seed: int, counts: list[int]) -> None:
    scores = breakpoint_scores(path_of(seed, points, 3))
    found = vote(scores, counts)
    assert found[0] == found[-1] == 0
    assert float(found.max()) <= sum(count**-0.5 for count in counts) + 1e-12
    assert float(found.sum()) == pytest.approx(sum(min(t, points - 2) * t**-0.5 for t in counts), abs=1e-9)


def test_votes_by_hand() -> None:
    scores = numpy.array([numpy.inf, 0.3, 0.9, 0.0, 0.5, numpy.inf])
    assert breakpoints(scores, 2) == (2, 4)
    assert breakpoints(scores, 9) == (1, 2, 4)
    assert breakpoints(numpy.array([numpy.inf, 1.0, 1.0, 1.0, numpy.inf]), 2) == (1, 2)
    expected = [0.0, 3**-0.5, 1 + 2**-0.5 + 3**-0.5, 0.0, 2**-0.5 + 3**-0.5, 0.0]
    assert vote(scores, (1, 2, 3)).tolist() == pytest.approx(expected)


def test_hybrid_mixes_parts_of_at_most_one() -> None:
    votes, speed = numpy.array([0.0, 2.0, 1.0]), numpy.array([3.0, 1.5, 0.0])
    assert rdp.hybrid(votes, speed, 1.0).tolist() == [0.0, 1.0, 0.5]
    assert rdp.hybrid(votes, speed, 0.0).tolist() == [1.0, 0.5, 0.0]
    assert rdp.hybrid(votes, speed, 0.25).tolist() == pytest.approx([0.75, 0.625, 0.125])
    assert rdp.hybrid(0 * votes, speed, 0.5).tolist() == [0.5, 0.25, 0.0]


def test_spaces_are_blind_to_what_they_should_be() -> None:
    random = numpy.random.default_rng(0)
    paths = torch.from_numpy(random.normal(size=(5, 7, 8)).cumsum(1))
    each = torch.from_numpy(random.uniform(0.1, 10, size=(5, 7, 1)))
    layer = torch.from_numpy(random.uniform(0.1, 10, size=(1, 7, 1)))
    huge = paths.clone()
    huge[:, 3:, 2] += 1e5
    without = paths[:, :, [0, 1, 3, 4, 5, 6, 7]]

    def moved(given: torch.Tensor, space: str) -> list[Any]:
        found = bends(given, space, (1, 2, 3))
        return [*found.path.flatten(), *found.votes, *found.velocity]

    assert moved(paths * each, "unit") == pytest.approx(moved(paths, "unit"))
    assert moved(paths * layer, "rms") == pytest.approx(moved(paths, "rms"))
    assert moved(huge, "drop_top_dims") == pytest.approx(moved(without, "raw"))
    assert moved(paths * each, "rms") != pytest.approx(moved(paths, "rms"))
    assert moved(paths * layer, "raw") != pytest.approx(moved(paths, "raw"))
    assert bends(huge, "raw", (1,)).selected(RdpOptions(keep=1))[3] == 1.0


def test_bends_are_means_over_paths() -> None:
    paths = torch.from_numpy(numpy.stack([path_of(seed, 6, 4) for seed in range(3)]))
    found = bends(paths, "raw", (1, 2))
    each = [path.numpy() for path in paths]
    assert found.votes == pytest.approx(sum(vote(breakpoint_scores(p), (1, 2)) for p in each)[1:] / 3)  # type: ignore[index]
    assert found.velocity == pytest.approx(sum(numpy.linalg.norm(p[1:] - p[:-1], axis=1) for p in each) / 3)
    assert found.path == pytest.approx(sum(each) / 3)


def test_the_plane_shows_a_flat_path_as_it_is() -> None:
    random = numpy.random.default_rng(1)
    flat = random.normal(size=(6, 2)) * [5, 1]
    lifted = flat @ numpy.linalg.qr(random.normal(size=(9, 9)))[0][:2] + 7
    x, y = rdp.plane(lifted)
    seen = numpy.stack([x, y], axis=1)
    assert numpy.linalg.norm(seen[:, None] - seen[None], axis=-1) == pytest.approx(
        numpy.linalg.norm(flat[:, None] - flat[None], axis=-1)
    )
    assert float(x.var()) >= float(y.var())
    for axis in (x, y):
        assert axis[numpy.abs(axis).argmax()] > 0
    line, nothing = rdp.plane(numpy.array([[0.0], [2.0]]))
    assert sorted(line.tolist()) == pytest.approx([-1.0, 1.0])
    assert nothing.tolist() == pytest.approx([0.0, 0.0])


def test_points_of_a_sample() -> None:
    hidden = torch.randn(2, 200, 3, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(rdp.points_of(hidden, "mean", skip_first=True), hidden[:, 1:].mean(1))
    assert torch.allclose(rdp.points_of(hidden, "mean", skip_first=False), hidden.mean(1))
    assert torch.equal(rdp.points_of(hidden, "last", skip_first=True), hidden[:, 199])
    spread = rdp.points_of(hidden, "token", skip_first=True).unflatten(0, (2, 64))
    assert torch.equal(spread[:, 0], hidden[:, 1])
    assert torch.equal(spread[:, -1], hidden[:, 199])
    places = [int((hidden[0] == point).all(-1).nonzero()) for point in spread[0]]
    assert set(numpy.diff(places)) == {3, 4}
    assert torch.equal(rdp.points_of(hidden[:, :9], "token", skip_first=True), hidden[:, 1:9].flatten(0, 1))
    assert torch.equal(rdp.points_of(hidden[:, :1], "mean", skip_first=True), hidden[:, 0])


@pytest.mark.parametrize("points", ["mean", "last", "token"])
@pytest.mark.parametrize("score", ["hybrid", "vote", "velocity"])
def test_streamed_scores_equal_the_whole_model(points: str, score: str, llama: Path) -> None:
    options = RdpOptions.model_validate({"points": points, "score": score, "space": "raw", "beta": 0.3, "keep": 2})
    job = job_for(llama)
    found = scored(llama, "rdp", rdp=options.model_dump())
    states = block_states(llama, job.batches.split(job.batch_size))
    levels = [
        torch.cat([rdp.points_of(batch[level], points, skip_first=True) for batch in states]) for level in range(4)
    ]
    paths = torch.stack(levels, dim=1).double().numpy()
    votes = sum(vote(breakpoint_scores(path), options.counts) for path in paths) / len(paths)
    speed = sum(numpy.linalg.norm(path[1:] - path[:-1], axis=1) for path in paths) / len(paths)
    series = {line.name: line.values for line in found.series}
    assert series["vote"] == pytest.approx(votes[1:])  # type: ignore[index]
    assert series["velocity"] == pytest.approx(speed)
    weight = {"hybrid": 0.3, "vote": 1.0, "velocity": 0.0}[score]
    expected = weight * votes[1:] / votes.max() + (1 - weight) * speed / speed.max()  # type: ignore[index, union-attr]
    importance = {layer.linear: layer.importance for layer in found.layers}
    seen = [importance[info.linears[-1].name] for info in job.trace.blocks]
    assert seen == pytest.approx(numpy.maximum(expected, rdp.FLOOR))
    middle = breakpoint_scores(paths.mean(0))
    assert series["breakpoint score"] == pytest.approx([0.0, *middle[1:-1], 0.0])


def test_series_are_named_and_as_long_as_the_path(llama: Path) -> None:
    found = {line.name: line.values for line in scored(llama, "rdp").series}
    spaces = [f"selected {space}" for space in SPACES]
    points = ["trajectory x", "trajectory y", "breakpoint score", "selected", *spaces]
    assert {name: len(values) for name, values in found.items()} == dict.fromkeys(points, 4) | {
        "vote": 3,
        "velocity": 3,
    }
    assert found["selected"] == found["selected unit"]
    for name in ("selected", *spaces):
        assert sum(found[name]) == 1  # a third of three blocks
        assert found[name][0] == found[name][-1] == 0
    raw = {line.name: line.values for line in scored(llama, "rdp", rdp={"space": "raw", "keep": 9}).series}
    assert raw["selected"] == (0.0, 1.0, 1.0, 0.0)
    assert raw["velocity"] != found["velocity"]
    assert raw["trajectory x"] != found["trajectory x"]
