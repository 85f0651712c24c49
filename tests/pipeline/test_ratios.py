"""The ratio program from recipe to file: which share of each unit's columns gets two bits more."""

import itertools
from pathlib import Path

import numpy
import pytest
import torch
from conftest import SMALL
from test_layouts import logits_of, quantized

import llmcompress
from llmcompress.compress.allocate.integer import Choices, solve
from llmcompress.compress.allocate.ratio import choose_ratios
from llmcompress.compress.allocate.spend import SpendUnit
from llmcompress.compress.pipeline import calibration, open_model, score
from llmcompress.compress.programs import interactions
from llmcompress.compress.ratios import fixed_ratios, ratio_program, shares_in_words, with_ratios
from llmcompress.compress.verify import probe_logits
from llmcompress.errors import InputError
from llmcompress.hub.source import Source
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.trace import trace
from llmcompress.recipes import load_recipe
from llmcompress.types import BlockTrace, Candidate, LayerScore, LinearInfo, LinearSpec, ModelTrace, Scores

NARROW = LinearSpec(bits=2, group_size=32, high_share=0.0625)
CHANGES = (*SMALL[1:-1:2], "quantizer=twotier", "plan.program=ratio", "plan.bits=[2]", "plan.group_size=32")
TOKENS = tuple(range(40))


def linears(*sizes: tuple[int, int]) -> tuple[LinearInfo, ...]:
    return tuple(
        LinearInfo(name=f"l{k}", tensor=f"l{k}.weight", rows=rows, columns=columns, unit=f"u{k}", shared_input=k)
        for k, (rows, columns) in enumerate(sizes)
    )


def test_ratios_are_true_counts_of_columns(llama: Path) -> None:
    found = trace(Skeleton.open(llama))
    widened = with_ratios(found, {linear.name: (NARROW,) for linear in found.linears})
    for linear in found.linears:
        specs = widened[linear.name]
        counts = [linear.columns if spec.bits == 4 else spec.high_columns(linear.columns) for spec in specs]
        expected = [0, 1, 2, 4, 8, 16, 32, 64] if linear.columns == 64 else [0, 2, 4, 8, 16, 32, 64, 128]
        assert counts == expected
        sizes = [spec.storage_bits(linear.rows, linear.columns) for spec in specs]
        assert sizes == sorted(sizes)  # rows are padded to words: some ratios take the same
        assert sizes[-1] == LinearSpec(bits=4, group_size=32).storage_bits(linear.rows, linear.columns)


@pytest.mark.parametrize("seed", range(6))
def test_the_program_finds_what_trying_everything_finds(seed: int) -> None:
    """Three units, every ratio, true storage bits and interactions."""
    generator = numpy.random.default_rng(seed)
    members = linears((64, 32), (32, 64), (96, 64))
    blocks = trace_of(members)
    narrow = {x.name: (NARROW,) for x in members}
    units = []
    for x in members:
        specs = with_ratios(blocks, narrow)[x.name]
        damages = tuple(numpy.sort(generator.exponential(size=len(specs)))[::-1].tolist())
        costs = tuple(spec.storage_bits(x.rows, x.columns) for spec in specs)
        units.append(SpendUnit((x,), specs, Choices(costs, damages), True))
    factor = generator.normal(size=(3, 4))
    gram = factor @ factor.T
    program = ratio_program(blocks, narrow, lambda variants, names: gram)
    coupling = interactions(gram, [1.0] * 3)
    budget = int(sum(min(unit.choices.costs) + max(unit.choices.costs) for unit in units) / 2)

    def value(chosen: tuple[int, ...]) -> float:
        damages = [unit.choices.damages[i] for unit, i in zip(units, chosen, strict=True)]
        pairs = itertools.combinations(range(3), 2)
        return sum(damages) + sum(coupling[a, b] * (damages[a] * damages[b]) ** 0.5 for a, b in pairs)

    def cost(chosen: tuple[int, ...]) -> int:
        return sum(unit.choices.costs[i] for unit, i in zip(units, chosen, strict=True))

    every = itertools.product(*(range(len(unit.specs)) for unit in units))
    best = min(value(chosen) for chosen in every if cost(chosen) <= budget)
    solution = program(units, budget, 0)
    assert cost(solution.chosen) == solution.cost <= budget
    assert value(solution.chosen) == pytest.approx(best, rel=1e-9)
    assert solution.damage == pytest.approx(best, rel=1e-9)
    choices = [unit.choices for unit in units]
    assert choose_ratios(choices, numpy.zeros((3, 3)), budget).chosen == solve(choices, budget).chosen


def trace_of(members: tuple[LinearInfo, ...]) -> ModelTrace:
    block = BlockTrace(index=0, name="b", linears=members, norms=())
    return ModelTrace(model_type="", blocks=(block,), parameters=1, other_bytes=0, untraced_share=0.0)


def test_fixed_ratios_leave_one_choice(llama: Path) -> None:
    specs = with_ratios(trace_of(linears((64, 64))), {"l0": (NARROW,)})["l0"]
    layer = LayerScore(linear="l0", candidates=tuple(Candidate(spec=spec, damage=1.0) for spec in specs))
    scores = Scores(scorer="fisher", unit="nats/token", model_digest="", calibration_digest="", seed=0, layers=(layer,))
    found = [[c.spec.high_share for c in fixed.layers[0].candidates] for _, fixed in fixed_ratios(scores)]
    assert found == [[share] for share in (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64)]


def test_from_recipe_to_file(llama: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    changes = (*CHANGES, f"calibration.source={text_file}")
    finished = quantized(llama, out, "3.6bits", *changes, recipe="balanced")
    plan = finished.plan
    specs = [a.spec for a in plan.allocation.assigned]
    assert plan.program == "ratio"
    assert plan.allocation.storage_bits <= plan.allocation.budget_bits
    assert len({spec.high_share if spec.bits == 2 else 1.0 for spec in specs}) > 2
    units: dict[str, set[LinearSpec]] = {}
    for linear in trace(Skeleton.open(llama)).linears:
        units.setdefault(linear.unit, set()).add(plan.specs[linear.name])
    assert all(len(found) == 1 for found in units.values())  # q, k and v have one format
    labels = [trial.label for trial in plan.trials]
    assert labels[0] == "fisher, ratio"
    assert any(label.startswith("uniform share") for label in labels)
    assert all(trial.bits_per_weight <= 3.6 for trial in plan.trials)
    expected = probe_logits(out, TOKENS, "cpu")
    found = logits_of(llmcompress.load(out, dtype=torch.float32))
    assert float((found - expected).abs().max()) < 1e-3 * float(expected.abs().max())
    assert "columns" in shares_in_words(specs, 2)


def test_scores_tell_ratios_apart(llama: Path, text_file: Path) -> None:
    recipe = load_recipe("balanced", (*CHANGES, f"calibration.source={text_file}"))
    opened = open_model(Source(llama, "model"), recipe, "cpu")
    scores = score(opened, recipe, calibration(opened, recipe), "")
    for layer in scores.layers:
        damages = [candidate.damage for candidate in layer.candidates]
        assert len(damages) == len(set(damages)) == 8
        assert damages[-1] < 0.5 * damages[0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [("quantizer=gptq", "twotier"), ("plan.bits=[2, 3]", "one width"), ("scorer=zd", "does not score ratios")],
)
def test_what_it_cannot_do_is_refused(change: str, reason: str, llama: Path) -> None:
    with pytest.raises(InputError) as refused:
        open_model(Source(llama, "model"), load_recipe("balanced", (*CHANGES, change)), "cpu")
    assert reason in str(refused.value) + refused.value.hint


def test_shares_in_words() -> None:
    specs = [LinearSpec(bits=2, group_size=32, high_share=share) for share in (0.0, 0.25, 0.25)]
    words = shares_in_words([*specs, LinearSpec(bits=4, group_size=32)], 2)
    assert words == "no columns in 1, 1/4 of columns in 2, all columns in 1"
