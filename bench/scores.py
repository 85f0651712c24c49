"""What every importance measure is worth: does it rank units as measured damage does, and what plan does it make?

    python bench/scores.py demo --json bench/results/scores-demo.json

For each scorer: rank correlation with the measured KL of every single unit at every width (the scorer `kl`); the KL
on held-out text of the plans at 3.5 and 3.0 bits that the exact program makes of its scores, all with the same
quantizer, GPTQ as published; CPU seconds, the same in forward passes over the scoring text, and peak memory of a
process of its own.
Below the scorers: uniform widths, the paper's two-width orders, the quadratic program, and what `quantize` ships.
"""

import argparse
import json
import math
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from scipy import stats

from llmcompress.compress.allocate.budget import parse_budget
from llmcompress.compress.allocate.spend import Program, integer_program, with_widths
from llmcompress.compress.measuring import Text
from llmcompress.compress.pipeline import Opened, calibration, open_model, score_all, score_job
from llmcompress.compress.planning import Planner, make_plan
from llmcompress.compress.programs import block_order
from llmcompress.compress.scoring import SCORERS, Observer, _watch
from llmcompress.compress.statistics import mean, standard_error
from llmcompress.compress.trial import measure_allocations
from llmcompress.errors import InputError
from llmcompress.hub.source import resolve
from llmcompress.model.text import Batches, TextRequest, token_batches
from llmcompress.plugins import available
from llmcompress.recipes import Recipe, load_recipe
from llmcompress.types import BitAllocation, ModelTrace, Scores

BUDGETS = ("3.5bits", "3.0bits")
PLAIN = ("quantize.target=layer", "quantize.order=act", "quantize.sweeps=0")  # GPTQ as published
REFERENCE = "kl"
ORDERS = ((3, 4), (2, 4), (2, 3))
FEWER = ((2, 3), (3, 4), (3, 4, 5))
QUADRATIC = ((2, 3, 4, 5, 6, 8), (3, 4, 5, 6, 8))


@dataclass(frozen=True)
class Cost:
    """Of one scorer in a process of its own."""

    cpu_seconds: float
    forward_passes: float
    peak_mb: float


def setup(options: argparse.Namespace) -> tuple[Opened, Recipe, Batches]:
    """The model, the default recipe on the calibration text asked for, and that text."""
    torch.set_num_threads(1)
    recipe = load_recipe("balanced", (f"calibration.source={options.calibration}", *PLAIN))
    opened = open_model(resolve(options.model), recipe, "cpu")
    return opened, recipe, calibration(opened, recipe)


def one(options: argparse.Namespace) -> None:
    """Run one scorer and write its scores and costs."""
    opened, recipe, batches = setup(options)
    job = score_job(opened, recipe, batches, 3)
    _watch(job, [(Observer(job), True)], data=True)
    began = time.process_time()
    _watch(job, [(Observer(job), True)], data=True)
    forward = time.process_time() - began
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    (found,) = score_all(opened, recipe, batches, scorers=(options.one,), model_digest="bench", working_bits=3)
    seconds = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cost = Cost(seconds, seconds / forward, (peak - before) / 1024)
    options.json.write_text(json.dumps({"scores": found.model_dump(mode="json"), "cost": asdict(cost)}))


def all_scores(options: argparse.Namespace) -> dict[str, tuple[Scores, Cost]]:
    """Every scorer, each in a process of its own."""
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for name in available(SCORERS):
            path = folder / f"{name}.json"
            words = [sys.executable, __file__, options.model, "--calibration", options.calibration]
            if not path.exists():
                subprocess.run([*words, "--one", name, "--json", str(path)], check=True)
            document = json.loads(path.read_text())
            found[name] = Scores.parse(json.dumps(document["scores"]), name), Cost(**document["cost"])
            print(f"{name}: {found[name][1].cpu_seconds:.1f} s", file=sys.stderr, flush=True)
    return found


def by_unit(trace: ModelTrace, scores: Scores) -> dict[tuple[str, int], float]:
    """Damage of each unit at each width."""
    unit = {linear.name: linear.unit for linear in trace.every}
    found: dict[tuple[str, int], float] = {}
    for layer in scores.layers:
        for candidate in layer.candidates:
            key = (unit[layer.linear], candidate.spec.bits)
            found[key] = found.get(key, 0.0) + candidate.damage
    return found


def correlations(truth: Mapping[tuple[str, int], float], found: Mapping[tuple[str, int], float]) -> dict[str, float]:
    """Ranks of units at 3 bits, and the linear correlation of logarithms over all units and widths."""
    three = [key for key in truth if key[1] == 3]
    left, right = [truth[key] for key in three], [found[key] for key in three]
    both = [key for key in truth if truth[key] > 0 and found[key] > 0]
    logs = stats.pearsonr([math.log(truth[k]) for k in both], [math.log(found[k]) for k in both]).statistic
    return {
        "spearman": float(stats.spearmanr(left, right).statistic),
        "kendall": float(stats.kendalltau(left, right).statistic),
        "log": float(logs),
    }


def baselines(planner: Planner, table: Mapping[str, Scores], text: str) -> dict[str, BitAllocation]:
    """Allocations that no scorer's integer program makes."""
    budget, trace, fisher = parse_budget(text), planner.opened.trace, planner.scores
    wanted: list[tuple[str, Scores, Program]] = [
        (f"uniform {bits}", with_widths(fisher, (bits,)), integer_program) for bits in (2, 3, 4)
    ]
    for name in ("lim", "zd"):
        program = block_order(trace, table[name])
        wanted += [
            (f"order {name} {_set(pair)}", with_widths(fisher, pair), program) for pair in ((3, 4), (2, 4), (2, 3))
        ]
    wanted += [(f"fisher {_set(widths)}", with_widths(fisher, widths), integer_program) for widths in FEWER]
    interacting = planner.quadratic()
    wanted += [(f"fisher {_set(widths)}, quadratic", with_widths(fisher, widths), interacting) for widths in QUADRATIC]
    found = {}
    for label, scores, program in wanted:
        with suppress(InputError):  # these widths cannot meet the budget
            found[label] = planner.allocate(scores, budget, program)
    return found


def _set(widths: tuple[int, ...]) -> str:
    return "{" + ",".join(map(str, widths)) + "}"


def plans(options: argparse.Namespace, table: Mapping[str, Scores]) -> list[dict[str, object]]:
    """Held-out KL of every plan."""
    opened, recipe, batches = setup(options)
    length = min(512, opened.context_tokens or 512)
    held = token_batches(TextRequest(options.data, 64, length, 0, "evaluation"), opened.source.path)
    rows: list[dict[str, object]] = []
    for text in BUDGETS:
        planner, budget = Planner(opened, recipe, batches, table["fisher"]), parse_budget(text)
        found = {f"{name}, integer": planner.allocate(scores, budget) for name, scores in table.items()}
        found |= baselines(planner, table, text)
        made = {}
        for rounds in (0, 2):
            part = recipe.plan.model_copy(update={"exchange": rounds})
            began = time.process_time()
            plan = make_plan(opened, recipe.model_copy(update={"plan": part}), batches, table["fisher"], budget)
            made[f"shipped, exchange {rounds}"] = (plan, time.process_time() - began)
        found |= {label: plan.allocation for label, (plan, _) in made.items()}
        parts = Text(planner.split(batches.tokens), planner.split(held.tokens))
        klds = measure_allocations(planner.job(), list(found.values()), parts).kld.tolist()
        for (label, allocation), values in zip(found.items(), klds, strict=True):
            rows.append(
                {"budget": text, "plan": label, "bits_per_weight": allocation.bits_per_weight, "kld": mean(values),
                 "standard_error": standard_error(values), "expected": allocation.expected_damage}
            )  # fmt: skip
            print(f"{text}  {label:<28} {allocation.bits_per_weight:.4f}  KL {mean(values):.5f} "
                  f"+- {standard_error(values):.5f}", flush=True)  # fmt: skip
        for row in rows[-len(made) :]:
            plan, seconds = made[str(row["plan"])]
            document = plan.model_dump(mode="json")
            row |= {"trials": document["trials"], "exchanges": document["exchanges"], "planning_cpu_seconds": seconds}
    return rows


def main() -> None:
    """Print the tables; with --json write them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--data", default="builtin")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--keep", type=Path, help="keep each scorer's file here, and use those that are there")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.one:
        one(options)
        return
    found = all_scores(options)
    trace = setup(options)[0].trace
    truth = by_unit(trace, found[REFERENCE][0])
    scorers = []
    for name, (scores, cost) in found.items():
        row = {"scorer": name, "unit": scores.unit, **correlations(truth, by_unit(trace, scores)), **asdict(cost)}
        scorers.append(row)
        ranks = f"Spearman {row['spearman']:+.3f}  Kendall {row['kendall']:+.3f}  log {row['log']:+.3f}"
        spent = f"{cost.cpu_seconds:.1f} s = {cost.forward_passes:.1f} forwards  +{cost.peak_mb:.0f} MB"
        print(f"{name:<16} {ranks}  {spent}", flush=True)
    rows = plans(options, {name: scores for name, (scores, _) in found.items()})
    if options.json:
        document = {
            "model": Path(options.model).name,
            "calibration": Path(options.calibration).name,
            "data": Path(options.data).name,
            "seed": 0,
            "torch": torch.__version__,
            "threads": 1,
            "machine": f"{platform.machine()}, CPU",
            "scorers": scorers,
            "plans": rows,
        }
        options.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
