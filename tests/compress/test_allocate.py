"""The integer program against brute force, budgets, and the promise never to overspend."""

import contextlib
import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcompress.compress.allocate.budget import parse_budget
from llmcompress.compress.allocate.integer import Choices, InfeasibleError, solve, total
from llmcompress.compress.allocate.spend import spend
from llmcompress.errors import InputError
from llmcompress.types import (
    BitAllocation,
    BlockTrace,
    Candidate,
    LayerScore,
    LinearInfo,
    LinearSpec,
    ModelTrace,
    Scores,
)


def random_units(source: random.Random, most: int) -> list[Choices]:
    units = []
    for _ in range(source.randrange(1, most + 1)):
        costs = tuple(sorted(source.randrange(10, 10_000) for _ in range(3)))
        units.append(Choices(costs, tuple(sorted((source.random() for _ in range(3)), reverse=True))))
    return units


def test_equals_brute_force_on_200_instances() -> None:
    source = random.Random(0)
    for _ in range(200):
        units = random_units(source, 6)
        low, high = sum(min(u.costs) for u in units), sum(max(u.costs) for u in units)
        budget = source.randrange(low, high + 1)
        every = (total(units, chosen) for chosen in itertools.product(range(3), repeat=len(units)))
        best = min(damage for cost, damage in every if cost <= budget)
        found = solve(units, budget)
        assert found.cost <= budget
        assert found.damage == pytest.approx(best, rel=1e-9)
        assert found.bound <= best * (1 + 1e-6)


def test_a_minimum_is_kept_or_refused() -> None:
    units = [Choices((10, 20), (1.0, 0.5)), Choices((10, 20), (1.0, 2.0))]
    assert solve(units, 40).cost == 30  # more bits would hurt the second
    assert solve(units, 40, minimum=35).cost == 40
    with pytest.raises(InfeasibleError):
        solve(units, 39, minimum=35)


def test_infeasible_says_what_there_is() -> None:
    with pytest.raises(InfeasibleError) as caught:
        solve([Choices((10, 20), (1.0, 0.5))], 9)
    assert (caught.value.smallest, caught.value.largest) == (10, 20)


def test_more_budget_never_costs_damage() -> None:
    units = random_units(random.Random(3), 12)
    low, high = sum(min(u.costs) for u in units), sum(max(u.costs) for u in units)
    damages = [solve(units, budget).damage for budget in range(low, high, (high - low) // 15)]
    assert damages == sorted(damages, reverse=True)


def toy_trace(blocks: int = 4, columns: int = 128) -> ModelTrace:
    """Blocks of {q, k, v}, {o}, {gate, up}, {down}."""
    found = []
    for index in range(blocks):
        shapes = [("q", 128, 0), ("k", 64, 0), ("v", 64, 0), ("o", 128, 1), ("gate", 256, 2), ("up", 256, 2)]
        linears = [
            LinearInfo(
                name=f"b.{index}.{n}", tensor=f"b.{index}.{n}.weight", rows=r, columns=columns, unit=f"b.{index}#{g}",
                shared_input=g,
            )
            for n, r, g in shapes
        ]  # fmt: skip
        linears.append(
            LinearInfo(
                name=f"b.{index}.down", tensor=f"b.{index}.down.weight", rows=128, columns=256, unit=f"b.{index}#3",
                shared_input=3,
            )
        )  # fmt: skip
        found.append(BlockTrace(index=index, name=f"b.{index}", linears=tuple(linears), norms=()))
    count = sum(x.weights for b in found for x in b.linears)
    return ModelTrace(
        model_type="toy", blocks=tuple(found), parameters=count + 5000, other_bytes=10_000, untraced_share=0
    )


def toy_scores(trace: ModelTrace, seed: int = 0) -> Scores:
    source = random.Random(seed)
    layers = []
    for linear in trace.linears:
        weight = 10 ** source.uniform(-3, 0)
        candidates = tuple(
            Candidate(spec=LinearSpec(bits=b, group_size=64), damage=weight * 4.0**-b) for b in (2, 3, 4, 5, 6, 8)
        )
        layers.append(LayerScore(linear=linear.name, candidates=candidates))
    return Scores(
        scorer="toy", unit="nats/token", model_digest="m", calibration_digest="c", seed=0, layers=tuple(layers)
    )


def allocate(text: str, seed: int = 0) -> tuple[ModelTrace, BitAllocation]:
    trace = toy_trace()
    sizes = {x.name: (x.rows, x.columns) for x in trace.linears}

    def file_bytes(specs: dict[str, LinearSpec]) -> int:  # a header that grows with the digits in it
        payload = sum(spec.storage_bits(*sizes[name]) // 8 for name, spec in specs.items())
        return 10_000 + payload + sum(len(str(spec.storage_bits(*sizes[n]))) for n, spec in specs.items())

    return trace, spend(trace, toy_scores(trace, seed), parse_budget(text), group_size=64, file_bytes=file_bytes)


def recount(trace: ModelTrace, found: BitAllocation) -> tuple[int, int]:
    sizes = {x.name: (x.rows, x.columns) for x in trace.linears}
    bits = sum(
        sizes[a.linear][0] * (-(-sizes[a.linear][1] * a.spec.bits // 32) * 32 + sizes[a.linear][1] // 64 * 16) + 128
        for a in found.assigned
    )
    return bits, sum(r * c for r, c in sizes.values())


@given(st.floats(2.3, 8.2), st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_never_over_and_at_most_half_a_percent_under(amount: float, seed: int) -> None:
    trace, found = allocate(f"{amount:.3f}bits", seed)
    bits, weights = recount(trace, found)
    asked = float(f"{amount:.3f}") * weights
    assert bits == found.storage_bits
    assert bits <= asked
    assert bits > asked * 0.995 or found.under_budget_reason


@given(st.integers(180_000, 600_000))
@settings(max_examples=25, deadline=None)
def test_byte_budgets_count_the_whole_file(size: int) -> None:
    trace, found = allocate(f"{size}B")
    assert found.file_bytes <= size
    assert found.file_bytes > size * 0.99 or found.under_budget_reason
    assert found.file_bits_per_weight == pytest.approx(found.file_bytes * 8 / trace.parameters)


def test_fused_units_share_a_format() -> None:
    trace, found = allocate("3.5bits")
    specs = {a.linear: a.spec for a in found.assigned}
    units: dict[str, set[LinearSpec]] = {}
    for linear in trace.linears:
        units.setdefault(linear.unit, set()).add(specs[linear.name])
    assert all(len(formats) == 1 for formats in units.values())
    assert len({spec.bits for spec in specs.values()}) > 1


def test_too_small_names_the_nearest_feasible_budget_and_it_works() -> None:
    for text in ("1.9bits", "1.0bits/file", "20kB"):
        with pytest.raises(InputError) as caught:
            allocate(text)
        nearest = caught.value.what.rsplit(" ", 1)[-1]
        _, found = allocate(nearest)
        assert {a.spec.bits for a in found.assigned} == {2}


def test_a_linear_without_candidates_is_kept_and_said() -> None:
    trace = toy_trace()
    scores = toy_scores(trace)
    fewer = scores.model_copy(update={"layers": scores.layers[:-1]})
    found = spend(trace, fewer, parse_budget("3bits"), group_size=128, file_bytes=lambda _: 100_000)
    assert [kept.linear for kept in found.kept] == [trace.linears[-1].name]
    assert found.kept[0].reason == "there is no score for it"
    assert len(found.fallbacks) == len(trace.linears) - 1  # group size 64 where 128 was asked for


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [
        ("3.5bits", "linears", 3.5),
        ("3.5 bits", "linears", 3.5),
        (".9BITS/file", "file", 0.9),
        ("4.2GB", "bytes", 4.2e9),
        ("4GiB", "bytes", 4 * 2**30),
        ("300MB", "bytes", 3e8),
        ("512KiB", "bytes", 2**19),
    ],
)
def test_budgets_are_read(text: str, kind: str, amount: float) -> None:
    found = parse_budget(text)
    assert (found.kind, found.amount) == (kind, amount)


@given(st.text(max_size=12))
@settings(max_examples=200)
def test_any_text_is_a_budget_or_an_input_error(text: str) -> None:
    with contextlib.suppress(InputError):
        assert parse_budget(text).amount >= 0


@pytest.mark.parametrize("text", ["", "3.5", "bits", "-3bits", "17bits", "0bits", "3GB/file", "3.5.1bits"])
def test_bad_budgets_are_refused(text: str) -> None:
    with pytest.raises(InputError):
        parse_budget(text)
