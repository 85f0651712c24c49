"""Measured exchange: within its limits, only when it pays, and what it says is what it did."""

import random
from pathlib import Path

import pytest
import torch
from scoring_help import job_for

from llmcompress.compress.exchange import Exchanger, Limits, Steps, exchange_units, halves, shrunk
from llmcompress.compress.measuring import MeasureJob, Text, units_of
from llmcompress.compress.quantizers import rtn
from llmcompress.types import QuantizerOptions


class Additive(Exchanger):
    """An exchanger whose model is a table: damages add up, plus noise of a given size on every sequence."""

    def __init__(self, folder: Path, damages: dict[tuple[int, int], float], limits: Limits, noise: float = 0.0) -> None:
        job = job_for(folder)
        units = exchange_units(units_of(job.trace, job.candidates), job.candidates)
        super().__init__(
            MeasureJob(job.skeleton, job.trace, rtn, QuantizerOptions(), torch.bfloat16),
            units, limits, memory_bytes=1 << 30, proposals=16,
        )  # fmt: skip
        self.damages, self.noise, self.source = damages, noise, random.Random(0)

    def _differences(self, places, steps, text):  # type: ignore[no-untyped-def]
        def change(step: Steps) -> float:
            return sum(self.damages[u, p] - self.damages[u, places[u]] for u, p in step)

        rows = [[change(step) + self.source.gauss(0, self.noise) for _ in range(8)] for step in steps]
        return torch.tensor(rows, dtype=torch.float64)

    def total(self, places: tuple[int, ...]) -> float:
        return sum(self.damages[unit, place] for unit, place in enumerate(places))


NOTHING = Text([], [])


def table(units: int, seed: int) -> dict[tuple[int, int], float]:
    source = random.Random(seed)
    weights = [10 ** source.uniform(-2, 0) for _ in range(units)]
    return {(u, place): weights[u] * 4.0 ** -(place + 2) for u in range(units) for place in range(3)}


@pytest.mark.parametrize("seed", range(4))
def test_rounds_improve_and_stay_within_the_limits(llama: Path, seed: int) -> None:
    count = len(Additive(llama, {}, Limits(0, 0)).units)
    probe = Additive(llama, table(count, seed), Limits(0, 0))
    places = tuple(1 for _ in probe.units)
    cost = probe.cost(places)
    exchanger = Additive(llama, table(count, seed), Limits(int(cost * 0.97), cost))
    damages = [exchanger.total(places)]
    for _ in range(6):
        after, exchange = exchanger.round(places, NOTHING, NOTHING)
        if exchange is None:
            assert after == places
            break
        assert int(cost * 0.97) <= exchanger.cost(after) <= cost
        assert exchange.change == pytest.approx(exchanger.total(after) - exchanger.total(places))
        changed = {u for u, (a, b) in enumerate(zip(places, after, strict=True)) if a != b}
        assert {m.unit for m in exchange.moves} == {exchanger.units[u].name for u in changed}
        assert all(m.before != m.after for m in exchange.moves)
        places = after
        damages.append(exchanger.total(places))
    assert len(damages) > 1
    assert damages == sorted(damages, reverse=True)


def test_noise_alone_is_rarely_taken_for_a_gain(llama: Path) -> None:
    count = len(Additive(llama, {}, Limits(0, 0)).units)
    flat = {(u, place): 0.0 for u in range(count) for place in range(3)}
    places = tuple(1 for _ in range(count))
    exchanger = Additive(llama, flat, Limits(0, 1 << 60), noise=0.01)
    taken = [exchanger.round(places, NOTHING, NOTHING)[1] for _ in range(10)]
    changes = [exchange.change for exchange in taken if exchange is not None]
    assert all(abs(change) < 0.02 for change in changes)


def test_the_real_measure_agrees_with_what_was_promised(llama: Path) -> None:
    """On the real model: the change an exchange reports is the change of measured KL on the second text."""
    from llmcompress.compress.swaps import measure_swaps

    job = job_for(llama)
    units = exchange_units(units_of(job.trace, job.candidates), job.candidates)
    measuring = MeasureJob(job.skeleton, job.trace, rtn, QuantizerOptions(), torch.bfloat16)
    places = tuple(0 if number % 2 else 2 for number in range(len(units)))
    probe = Exchanger(measuring, units, Limits(0, 0), memory_bytes=1 << 30, proposals=4)
    exchanger = Exchanger(measuring, units, Limits(0, probe.cost(places)), memory_bytes=1 << 30, proposals=4)
    rows = torch.randint(96, (8, 24), generator=torch.Generator().manual_seed(3))
    first, second = halves(rows, 4, [])
    after, exchange = exchanger.round(places, first, second)
    assert exchange is not None
    assert exchanger.cost(after) <= exchanger.cost(places)
    klds = [
        measure_swaps(measuring, exchanger.changes(p), [], text=second, memory_bytes=1 << 30)[0].mean()
        for p in (places, after)
    ]
    assert float(klds[1] - klds[0]) == pytest.approx(exchange.change, rel=1e-3)
    assert exchange.change < 0


def test_halves_share_no_row() -> None:
    rows = torch.arange(20).view(10, 2)
    first, second = halves(rows, 2, [])
    left, right = torch.cat(first.judging), torch.cat(second.judging)
    assert torch.equal(torch.sort(torch.cat([left, right]).flatten()).values, rows.flatten())


def test_noisy_means_are_pulled_to_zero() -> None:
    assert shrunk([1.0, 1.0, 1.0, 1.0]) == pytest.approx(1.0)
    assert abs(shrunk([1.0, -1.0, 1.2, -1.0])) < 0.05 / 2
    assert shrunk([0.0, 0.0]) == 0.0
    assert shrunk([5.0]) == 0.0
