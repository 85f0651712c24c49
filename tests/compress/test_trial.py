"""Trials measure what an allocation really costs: the figure an evaluation of the written file gives."""

from pathlib import Path

import pytest
import torch
from test_allocate import allocate, toy_trace

from llmcompress.compress.allocate.budget import parse_budget
from llmcompress.compress.allocate.spend import narrower_widths, with_widths
from llmcompress.compress.measuring import MeasureJob, Text
from llmcompress.compress.pipeline import open_model, score
from llmcompress.compress.planning import make_plan
from llmcompress.compress.quantizers import gptq, rtn
from llmcompress.compress.rounding import Request
from llmcompress.compress.trial import measure_allocations
from llmcompress.errors import InputError
from llmcompress.hub.source import Source
from llmcompress.model.text import Batches
from llmcompress.recipes import load_recipe
from llmcompress.types import Assigned, BitAllocation, LinearSpec, QuantizerOptions


def tokens(rows: int, seed: int) -> torch.Tensor:
    return torch.randint(96, (rows, 32), generator=torch.Generator().manual_seed(seed))


def uniform(found: BitAllocation, names: list[str], bits: int) -> BitAllocation:
    spec = LinearSpec(bits=bits, group_size=64)
    return found.model_copy(update={"assigned": tuple(Assigned(linear=n, spec=spec) for n in names)})


def test_measured_kl_equals_the_kl_of_the_quantized_model(llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    opened = open_model(Source(llama, "llama"), load_recipe("balanced"), "cpu")
    names = [linear.name for linear in opened.trace.linears]
    _, some = allocate("3bits")
    job = MeasureJob(opened.skeleton, opened.trace, rtn, QuantizerOptions(), torch.bfloat16)
    held = tokens(4, 1)
    text = Text([tokens(2, 0)], [held[:2], held[2:]])
    measured = measure_allocations(job, [uniform(some, names, b) for b in (2, 3, 8)], text).kld.mean(1).tolist()
    assert measured[0] > measured[1] > measured[2] > 0
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    with torch.no_grad():
        p = torch.log_softmax(model(held).logits.double(), -1)
        for name in names:
            weight = model.get_submodule(name).weight
            spec = LinearSpec(bits=3, group_size=64)
            options = QuantizerOptions()
            (found,) = rtn.quantize([Request(weight.clone(), spec)], None, options=options, dtype=torch.bfloat16)
            weight.copy_(found.codes.dequantize())
        q = torch.log_softmax(model(held).logits.double(), -1)
    assert measured[1] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)


def test_each_allocation_has_a_chain_of_its_own(llama: Path) -> None:
    opened = open_model(Source(llama, "llama"), load_recipe("balanced"), "cpu")
    names = [linear.name for linear in opened.trace.linears]
    _, some = allocate("3bits")
    job = MeasureJob(opened.skeleton, opened.trace, gptq, QuantizerOptions(), torch.bfloat16)
    pair = [uniform(some, names, 2), uniform(some, names, 4)]
    text = Text([tokens(4, 0)], [tokens(2, 1)])
    alone = torch.cat([measure_allocations(job, [one], text).kld for one in pair])
    assert torch.equal(measure_allocations(job, pair, text).kld, alone)
    assert torch.equal(measure_allocations(job, pair[::-1], text).kld, alone.flip(0))


def test_the_plan_takes_the_allocation_that_measured_best(llama: Path) -> None:
    sets = ("calibration.score_samples=4", "plan.group_size=64")
    recipe = load_recipe("balanced", sets)
    opened = open_model(Source(llama, "llama"), recipe, "cpu")
    batches = Batches(tokens(12, 3), "random", "none")
    scores = score(opened, recipe, batches, "digest")
    plan = make_plan(opened, recipe, batches, scores, parse_budget("3.8bits"))
    contest = [t for t in plan.trials if t.label not in ("before exchange", "after exchange")]
    labels = [trial.label for trial in contest]
    assert labels[0] == "fisher, integer"
    assert any(label.startswith("uniform 3") for label in labels)
    assert any(label.startswith("lim order") for label in labels)
    final = [t for t in plan.trials if t.label in ("before exchange", "after exchange")] or contest
    best = min(final, key=lambda trial: trial.measured_kld)
    assert {a.spec.bits for a in plan.allocation.assigned} == set(best.widths)
    assert plan.allocation.expected_damage == best.expected_damage
    if len(final) == 2:
        assert plan.exchanges
        assert final[0].expected_damage == min(contest, key=lambda t: t.measured_kld).expected_damage
    assert plan.allocation.storage_bits <= plan.allocation.budget_bits
    untried = make_plan(
        opened, load_recipe("balanced", (*sets, "plan.trials=false")), batches, scores, parse_budget("3.8bits")
    )
    assert untried.trials == ()
    assert untried.exchanges == ()


@pytest.mark.parametrize("text", ["kld<=0.2", "ppl<=+20%"])
def test_a_damage_limit_gives_the_smallest_plan_that_keeps_it(text: str, llama: Path) -> None:
    recipe = load_recipe("balanced", ("calibration.score_samples=4", "plan.group_size=64"))
    opened = open_model(Source(llama, "llama"), recipe, "cpu")
    batches = Batches(tokens(16, 3), "random", "none")
    scores = score(opened, recipe, batches, "digest")
    plan = make_plan(opened, recipe, batches, scores, parse_budget(text))
    limit = 0.2
    assert len(plan.trials) <= 8
    chosen = next(t for t in plan.trials if t.bits_per_weight == plan.allocation.bits_per_weight)
    assert chosen.upper is not None
    assert chosen.upper <= limit
    assert all(t.upper > limit for t in plan.trials if t.bits_per_weight < chosen.bits_per_weight)  # type: ignore[operator]
    assert plan.allocation.budget == text
    assert plan.allocation.budget_bits == plan.allocation.storage_bits
    with pytest.raises(InputError, match="cannot be met"):
        make_plan(opened, recipe, batches, scores, parse_budget("kld<=0.000002"))


def test_narrower_widths_are_adjacent_and_around_the_mean() -> None:
    trace, found = allocate("3.5bits")
    assert narrower_widths(found, (2, 3, 4, 5, 6, 8), trace) == ((3, 4), (3, 4, 5))
    assert narrower_widths(found, (3, 4), trace) == ()
    assert narrower_widths(allocate("7.9bits")[1], (2, 3, 4, 5, 6, 8), toy_trace()) == ((6, 8),)


def test_with_widths_keeps_only_those() -> None:
    from test_allocate import toy_scores

    fewer = with_widths(toy_scores(toy_trace()), (3, 5))
    assert {c.spec.bits for layer in fewer.layers for c in layer.candidates} == {3, 5}
