"""One budget for widths and depth: what is measured is what comes out, and bits count against the original."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import llama_config, save_model
from test_prune import silence

import llmcompress
from llmcompress.compress.allocate.budget import Budget, parse_budget
from llmcompress.compress.joint import _Joint, decide_dropping, reopen_dropped, write_dropped
from llmcompress.compress.measuring import Text
from llmcompress.compress.pipeline import Opened, calibration, open_model, score
from llmcompress.compress.planning import Planner
from llmcompress.compress.prune.measure import removal_damage
from llmcompress.compress.run import Finished, QuantizeRequest, Resumed, quantize
from llmcompress.compress.trial import measure_allocations
from llmcompress.errors import InputError
from llmcompress.hub.source import resolve
from llmcompress.recipes import Recipe, load_recipe
from llmcompress.types import Assigned, BlockOutcome, Dropping

SMALL = (
    "calibration.samples=8", "calibration.sequence_length=32", "calibration.score_samples=4", "plan.group_size=64",
    "plan.bits=[2, 3, 4]", "plan.voids=true", "plan.trials=false",
)  # fmt: skip


def told(text: Path, *changes: str) -> Recipe:
    return load_recipe("balanced", (f"calibration.source={text}", *SMALL, *changes))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six blocks, none of them idle."""
    return save_model(tmp_path_factory.mktemp("models") / "llama", llama_config(num_hidden_layers=6))


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six blocks, block 3 of which does nothing."""
    folder = save_model(tmp_path_factory.mktemp("models") / "llama", llama_config(num_hidden_layers=6))
    silence(folder, [3])
    return folder


def joint(opened: Opened, recipe: Recipe, budget: Budget) -> _Joint:
    batches = calibration(opened, recipe)
    return _Joint(Planner(opened, recipe, batches, score(opened, recipe, batches, opened.digest())), budget)


@pytest.mark.parametrize("target", ["residual", "layer"])
def test_a_plan_with_blocks_missing_measures_what_it_does_on_the_model_without_them(
    target: str, model: Path, text_file: Path, tmp_path: Path
) -> None:
    """Two ways to one figure: passed over on the way, and carried out on the checkpoint that lacks them."""
    recipe = told(text_file, f"quantize.target={target}")
    opened = open_model(resolve(str(model)), recipe, "cpu")
    desk = joint(opened, recipe, parse_budget("2.7bits"))
    planner = desk.planner
    plans = desk.plans()
    assert len(plans) == 4
    assert not plans[0][0]
    text = Text(planner.split(planner.hessian_rows), planner.split(planner.other_rows))
    drops, allocations = [plan[0] for plan in plans], [plan[2] for plan in plans]
    together = measure_allocations(planner.job(), allocations, text, drops)
    alone = measure_allocations(planner.job(), allocations[:1], text)
    assert torch.equal(together.kld[0], alone.kld[0])
    drop, _, allocation = plans[1]
    dropping = Dropping(trials=(), dropped=tuple(sorted(drop)), blocks=6, weights=1)
    write_dropped(opened, dropping, tmp_path / "dropped", 0)
    shorter, budget = reopen_dropped(opened, recipe, tmp_path / "dropped", desk.budget)
    kept = [block for block in range(6) if block not in drop]
    assert len(shorter.trace.blocks) == len(kept)

    def renamed(name: str) -> str:
        parts = name.split(".")
        parts[2] = str(kept.index(int(parts[2])))
        return ".".join(parts)

    moved = tuple(Assigned(linear=renamed(a.linear), spec=a.spec) for a in allocation.assigned)
    other = Planner(shorter, recipe, planner.batches, planner.scores)
    found = measure_allocations(other.job(), [allocation.model_copy(update={"assigned": moved})], text)
    removal = removal_damage(opened.skeleton, [drop], text.judging)
    assert torch.allclose(together.dnll[1], found.dnll[0] + removal.dnll[0], atol=1e-5)
    assert not torch.allclose(together.dnll[1], together.dnll[0], atol=1e-3)
    assert allocation.storage_bits <= 2.7 * sum(x.weights for x in opened.trace.linears)
    assert budget.amount == pytest.approx(2.7 * 6 / len(kept))


@pytest.mark.parametrize("size", ["2.5bits", "4.9bits/file"])
def test_a_block_that_does_nothing_gives_its_bits_to_the_others(
    size: str, idle: Path, text_file: Path, tmp_path: Path
) -> None:
    source, recipe = resolve(str(idle)), told(text_file)
    request = QuantizeRequest(source, tmp_path / "out", recipe, parse_budget(size), "cpu", "")
    running = quantize(request)
    first = list(itertools.takewhile(lambda event: not isinstance(event, BlockOutcome), running))
    running.close()  # type: ignore[attr-defined]
    found = list(quantize(request))
    assert any(isinstance(event, Resumed) for event in found)
    finished = found[-1]
    assert isinstance(finished, Finished)
    dropping = finished.plan.dropping
    assert dropping is not None
    assert 3 in dropping.dropped
    assert dropping in first
    assert dropping in found
    whole, *others = dropping.trials
    assert not whole.dropped
    taken = next(trial for trial in others if trial.dropped == dropping.dropped)
    assert taken.measured_kld <= min(trial.measured_kld for trial in dropping.trials)
    opened = open_model(source, recipe, "cpu", whole_file=size.endswith("file"))
    allocation = finished.plan.allocation
    if size.endswith("bits"):
        limit = 2.5 * sum(x.weights for x in opened.trace.linears)
        assert 0.9 * limit < allocation.storage_bits <= limit
    else:
        assert allocation.file_bytes * 8 <= 4.9 * opened.trace.parameters
    loaded: Any = llmcompress.load(tmp_path / "out")
    assert len(loaded.model.layers) == 6 - len(dropping.dropped)
    assert "were dropped for bits elsewhere" in (tmp_path / "out" / "README.md").read_text()
    record = json.loads((tmp_path / "out" / "llmcompress.json").read_text())
    assert record["plan"]["dropping"]["dropped"] == list(dropping.dropped)


def test_where_no_block_is_idle_the_plan_is_the_usual_one(model: Path, text_file: Path, tmp_path: Path) -> None:
    source, budget = resolve(str(model)), parse_budget("3.9bits")
    plans = []
    for name, change in (("with", "plan.voids=true"), ("without", "plan.voids=false")):
        events = list(quantize(QuantizeRequest(source, tmp_path / name, told(text_file, change), budget, "cpu", "")))
        assert isinstance(events[-1], Finished)
        plans.append(events[-1].plan)
    assert plans[0].dropping is not None
    assert not plans[0].dropping.dropped
    assert plans[0].allocation == plans[1].allocation


def test_what_cannot_be_compared_is_refused(model: Path, text_file: Path) -> None:
    recipe = told(text_file)
    opened = open_model(resolve(str(model)), recipe, "cpu")
    batches = calibration(opened, recipe)
    scores = score(opened, recipe, batches, opened.digest())
    unitless = scores.model_copy(update={"unit": "unitless"})
    for given, budget in ((scores, "kld<=0.1"), (unitless, "3bits")):
        with pytest.raises(InputError, match=r"plan\.voids"):
            decide_dropping(opened, recipe, batches, given, parse_budget(budget))
    with pytest.raises(InputError, match="cannot be met"):
        decide_dropping(opened, recipe, batches, scores, parse_budget("0.5bits"))
