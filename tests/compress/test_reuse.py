"""Scores from a file are taken only for the model, text and settings they were made with."""

import itertools

import pytest
import torch
from synthetic_scores import make_file

from llmcompress.compress.allocate.budget import parse_budget
from llmcompress.compress.decide import NATS, check_scores, decide, desk_of, frontier, pick, plan_file, uniforms
from llmcompress.compress.pipeline import settings_digest
from llmcompress.compress.reuse import Expected, expected, reuse
from llmcompress.errors import InputError
from llmcompress.model.text import Batches
from llmcompress.recipes import Recipe
from llmcompress.types import BitAllocation, ScoreFile

FILE = make_file(3)
GOOD = Expected("m" * 64, "c" * 64, "s" * 64)
FIELDS = {"model": "model_digest", "calibration text": "calibration_digest", "settings": "settings_digest"}


def test_scores_that_fit_are_taken() -> None:
    assert reuse(FILE, "fisher", GOOD) is FILE.scores[2]
    assert reuse(FILE, "rdp", GOOD) is FILE.scores[0]


@pytest.mark.parametrize("wrong", [w for n in (1, 2, 3) for w in itertools.combinations(FIELDS, n)])
def test_a_mismatch_says_which_and_what_to_do(wrong: tuple[str, ...]) -> None:
    changes = {FIELDS[name]: "x" * 64 for name in wrong}
    asked = Expected(
        **({"model_digest": "m" * 64, "calibration_digest": "c" * 64, "settings_digest": "s" * 64} | changes)
    )
    with pytest.raises(InputError) as caught:
        reuse(FILE, "fisher", asked)
    for name in FIELDS:
        assert (f"other {name}" in caught.value.what) == (name in wrong)
    assert ("--calibration" in caught.value.hint) == ("calibration text" in wrong)
    assert ("--recipe" in caught.value.hint) == ("settings" in wrong)
    assert "without --scores" in caught.value.hint


def test_a_scorer_that_reads_no_text_ignores_it() -> None:
    assert reuse(FILE, "fisher", Expected("m" * 64, None, "s" * 64)) is FILE.scores[2]


def test_a_scorer_that_is_not_there_names_those_that_are() -> None:
    with pytest.raises(InputError) as caught:
        reuse(FILE, "zd", GOOD)
    assert "rdp, voids, fisher, hessian" in caught.value.what
    assert "--scorer zd" in caught.value.hint


def test_of_two_by_one_scorer_the_fitting_one_is_taken() -> None:
    other = FILE.scores[2].model_copy(update={"settings_digest": "z"})
    both = FILE.model_copy(update={"scores": (other, FILE.scores[2])})
    assert reuse(both, "fisher", GOOD) is FILE.scores[2]


def test_what_is_expected_follows_recipe_and_text() -> None:
    recipe = Recipe()
    tokens = torch.arange(80).reshape(40, 2)
    found = expected(recipe, Batches(tokens, "text", "t"), "m")
    assert found.settings_digest == settings_digest(recipe, "fisher", None)
    same = expected(recipe, Batches(tokens[: recipe.calibration.score_samples], "text", "t"), "m")
    assert found == same  # scorers read the first samples only
    changed = recipe.model_copy(update={"plan": recipe.plan.model_copy(update={"bits": (2, 3)})})
    assert expected(changed, Batches(tokens, "text", "t"), "m").settings_digest != found.settings_digest
    free = recipe.model_copy(update={"scorer": "zd"})
    assert expected(free, Batches(tokens, "text", "t"), "m").calibration_digest is None


def test_pick_prefers_nats() -> None:
    assert pick(FILE).scorer == "fisher"
    assert pick(FILE, "hessian").scorer == "hessian"
    rest = FILE.model_copy(update={"scores": tuple(s for s in FILE.scores if s.unit != NATS)})
    assert pick(rest).scorer == "rdp"
    with pytest.raises(InputError, match="no such scores"):
        pick(FILE, "zd")


@pytest.mark.parametrize("text", ["kld<=0.05", "ppl<=+2%"])
def test_a_damage_limit_needs_the_model(text: str) -> None:
    with pytest.raises(InputError, match="measured"):
        decide(desk_of(FILE, pick(FILE)), parse_budget(text))


def test_a_frontier_falls_from_the_smallest_to_the_largest() -> None:
    desk = desk_of(FILE, pick(FILE))
    found = frontier(desk)
    assert {a.spec.bits for a in found[0].assigned} == {2}
    assert {a.spec.bits for a in found[-1].assigned} == {8}
    for one, other in itertools.pairwise(found):
        assert one.storage_bits < other.storage_bits
        assert one.expected_damage > other.expected_damage
    for one in uniforms(desk):  # an optimum with as many bits is never worse
        if one.bits > 2:
            allocation = decide(desk, parse_budget(f"{one.bits_per_weight + 1e-6:.6f}bits"))
            assert allocation.expected_damage <= one.expected_damage * (1 + 1e-9)
    assert uniforms(desk)[0].expected_damage == pytest.approx(found[0].expected_damage)
    assert uniforms(desk)[0].bits_per_weight == pytest.approx(found[0].bits_per_weight)


def test_a_plan_file_is_an_allocation_and_more() -> None:
    desk = desk_of(FILE, pick(FILE))
    allocation = decide(desk, parse_budget("3.5bits"))
    written = plan_file(desk, allocation)
    fields = written.model_dump()
    assert {name: fields[name] for name in BitAllocation.model_fields} == allocation.model_dump()
    assert (written.scorer, written.unit, written.model) == ("fisher", "nats/token", FILE.model)
    assert type(written).parse(written.model_dump_json(), "plan.json") == written


def broken(name: str) -> ScoreFile:
    """A score file each of whose values is legal, but which makes no sense."""
    trace, scores = FILE.trace, FILE.scores[2]
    block, layer = trace.blocks[0], scores.layers[0]
    first = block.linears[0]
    if name == "no scores":
        return FILE.model_copy(update={"scores": ()})
    if name in ("no weights", "twice"):
        bad = first.model_copy(update={"rows": 0}) if name == "no weights" else block.linears[1]
        changed = block.model_copy(update={"linears": (bad, *block.linears[1:])})
        blocks = (changed, *trace.blocks[1:])
        return FILE.model_copy(update={"trace": trace.model_copy(update={"blocks": blocks})})
    if name == "no parameters":
        return FILE.model_copy(update={"trace": trace.model_copy(update={"parameters": 0})})
    layers = {
        "stranger": (layer.model_copy(update={"linear": "nobody"}), *scores.layers[1:]),
        "scored twice": (scores.layers[1], *scores.layers[1:]),
        "disjoint": (
            layer.model_copy(update={"candidates": layer.candidates[:1]}),
            scores.layers[1].model_copy(update={"candidates": layer.candidates[1:]}),
            *scores.layers[2:],
        ),
    }[name]
    return FILE.model_copy(update={"scores": (scores.model_copy(update={"layers": layers}),)})


@pytest.mark.parametrize(
    "name", ["no scores", "no weights", "twice", "no parameters", "stranger", "scored twice", "disjoint"]
)
def test_files_that_make_no_sense_are_refused(name: str) -> None:
    check_scores(FILE)
    with pytest.raises(InputError, match=r".") as caught:
        check_scores(broken(name))
    assert "llmcompress score" in caught.value.hint
