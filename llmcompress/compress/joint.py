"""One budget for widths and depth: a block may get no bits at all, where the others make better use of them.

A block is dropped whole, so the integer program is solved once for every set of blocks that the search of `prune` has
measured, over what is left: the damage of a plan is then the measured KL of dropping the set and the sum over the
linears that stay. That sum leaves out that a model with blocks missing may suffer more, or less, from rounding. So the
plans that look best are carried out on calibration text, beside the best that drops nothing, all against the original
model, and the one with the least measured KL is taken. Bits count against the weights of the original.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from llmcompress.compress.allocate.budget import Budget
from llmcompress.compress.allocate.spend import Ground, spend_by
from llmcompress.compress.measuring import Text
from llmcompress.compress.output import copy_side_files
from llmcompress.compress.pipeline import Opened, open_model, probe_tokens, score
from llmcompress.compress.planning import Planner
from llmcompress.compress.prune.choose import Chooser, Search
from llmcompress.compress.prune.measure import removal_damage
from llmcompress.compress.prune.units import Scope, find_units
from llmcompress.compress.prune.write import Writing, check_pruned, write_pruned
from llmcompress.compress.shards import shard_bytes
from llmcompress.compress.statistics import mean, standard_error
from llmcompress.compress.trial import measure_allocations
from llmcompress.errors import InputError
from llmcompress.files import commit_json, sync_folder
from llmcompress.model.text import Batches
from llmcompress.recipes import Recipe
from llmcompress.types import BitAllocation, Dropping, JointTrial, LinearSpec, Scores

TRIED = 3  # joint plans that are carried out, beside the one that drops nothing
SHARE = 4  # at most one block of so many is dropped
UNIT = "nats/token"

Drop = frozenset[int]


def decide_dropping(opened: Opened, recipe: Recipe, batches: Batches, scores: Scores, budget: Budget) -> Dropping:
    """Which blocks to drop, if any, to stay within a budget at the least measured damage; writes nothing.

    Raises InputError where the budget is a limit of damage, where scores are not in nats per token, where there is no
    calibration text, or where no plan fits.
    """
    if budget.measured or scores.unit != UNIT or not batches.tokens.numel():
        raise InputError(
            "plan.voids compares measured damages at one size",
            "give a budget in bits or bytes, a scorer in nats per token such as fisher, and calibration text",
        )
    joint = _Joint(Planner(opened, recipe, batches, scores), budget)
    plans = joint.plans()
    trials = joint.carried_out(plans)
    best = min(trials, key=lambda trial: trial.measured_kld)
    return Dropping(trials=trials, dropped=best.dropped, blocks=len(opened.trace.blocks), weights=_weights(opened, ()))


class _Joint:
    """One planner and one budget, and the plans with blocks missing that they allow."""

    def __init__(self, planner: Planner, budget: Budget) -> None:
        self.planner, self.budget, self.opened = planner, budget, planner.opened

    def removals(self) -> dict[Drop, float]:
        """Measured KL of every set of blocks that a search looked at; the empty set is among them."""
        opened, planner = self.opened, self.planner
        units = find_units(opened.skeleton, opened.trace, Scope())
        memory = planner.recipe.score.swaps.memory_mb << 20
        text = planner.split(planner.hessian_rows)

        def measure(sets: Sequence[Drop]) -> Tensor:
            removals = list(map(units.removal, sets))
            found = removal_damage(opened.skeleton, removals, text, memory_bytes=memory, halves=units.halves)
            return opened.skeleton.crew.spread({"kld": found.kld})["kld"]  # all search alike, whatever machine it is

        blocks = len(units.units)
        singles = measure([frozenset({block}) for block in range(blocks)]).mean(1).tolist()
        chooser = Chooser(measure, singles, Search())
        for count, _ in enumerate(chooser.steps(), 1):
            if count >= blocks // SHARE:
                break
        return {frozenset(): 0.0} | {drop: mean(klds) for drop, klds in chooser.measured.items()}

    def allocate(self, drop: Drop) -> BitAllocation:
        """The budget spent on the linears of blocks that stay. Raises InputError where it does not reach."""
        opened, planner = self.opened, self.planner
        gone = {linear.name for info in opened.trace.blocks if info.index in drop for linear in info.linears}
        candidates = {name: specs for name, specs in opened.candidates.items() if name not in gone}
        shards = opened.shards
        places = [place for place in range(len(shards.shards)) if place - 1 not in drop]

        def file_bytes(specs: dict[str, LinearSpec]) -> int:
            return sum(shard_bytes(shards.layout(place, specs)) for place in places)

        budget = self.budget
        if budget.kind == "linears":
            budget = replace(budget, amount=budget.amount * _weights(opened, ()) / _weights(opened, gone))
        kept = {**opened.kept, **dict.fromkeys(gone, "its block is dropped")}
        ground = Ground(planner.recipe.plan.group_size, file_bytes, candidates, kept)  # type: ignore[arg-type]
        program = planner.program()
        solved: BitAllocation = opened.skeleton.crew.first(
            lambda: spend_by(program, opened.trace, planner.scores, budget, ground=ground), BitAllocation
        )
        return solved

    def plans(self) -> list[tuple[Drop, float, BitAllocation]]:
        """The plan that drops nothing, where it fits, then the best of the others by expected damage."""
        found, refused = [], None
        for drop, kld in self.removals().items():
            try:
                found.append((drop, kld, self.allocate(drop)))
            except InputError as error:
                refused = refused or error
        if not found:
            raise refused or InputError("nothing fits the budget", "ask for more bits")
        found.sort(key=lambda plan: (plan[1] + plan[2].expected_damage, sorted(plan[0])))
        return [plan for plan in found if not plan[0]] + [plan for plan in found if plan[0]][:TRIED]

    def carried_out(self, plans: Sequence[tuple[Drop, float, BitAllocation]]) -> tuple[JointTrial, ...]:
        """Measure plans together, on text their Hessians did not see."""
        planner = self.planner
        text = Text(planner.split(planner.hessian_rows), planner.split(planner.other_rows))
        drops, allocations = [plan[0] for plan in plans], [plan[2] for plan in plans]
        damage = measure_allocations(planner.job(), allocations, text, drops)
        weights = _weights(self.opened, ())
        return tuple(
            JointTrial(
                dropped=tuple(sorted(drop)),
                bits_per_weight=allocation.storage_bits / weights,
                removal_kld=kld,
                expected_damage=kld + allocation.expected_damage,
                measured_kld=mean(klds),
                standard_error=standard_error(klds) if len(klds) > 1 else 0.0,
            )
            for (drop, kld, allocation), klds in zip(plans, damage.kld.tolist(), strict=True)
        )


def _weights(opened: Opened, gone: Sequence[str] | set[str]) -> int:
    """Weights of the linears that are to be quantized, without some."""
    return sum(x.weights for x in opened.trace.every if x.name in opened.candidates and x.name not in gone)


def write_dropped(opened: Opened, dropping: Dropping, folder: Path, seed: int) -> None:
    """Write the model without the dropped blocks, compared with the original that passes them over; the folder
    appears once it is complete."""
    units = find_units(opened.skeleton, opened.trace, Scope())
    writing = Writing(opened.skeleton, units.removal(dropping.dropped), units.halves)
    staging = folder.with_name(folder.name + ".partial")
    staging.mkdir(exist_ok=True)
    write_pruned(writing, staging)
    check_pruned(writing, staging, probe_tokens(opened, seed))
    copy_side_files(opened.source.path, staging)
    commit_json(staging / "dropping.json", dropping.model_dump(mode="json"))
    sync_folder(staging)
    staging.rename(folder)
    sync_folder(folder.parent)


@contextmanager
def dropped(
    opened: Opened, recipe: Recipe, batches: Batches, budget: Budget
) -> Iterator[tuple[Opened, Budget, Dropping | None]]:
    """The model that a recipe plans, with blocks dropped into a temporary folder where that is what it comes to."""
    if not recipe.plan.voids:
        yield opened, budget, None
        return
    dropping = decide_dropping(opened, recipe, batches, score(opened, recipe, batches, opened.digest()), budget)
    if not dropping.dropped:
        yield opened, budget, dropping
        return
    with tempfile.TemporaryDirectory(prefix="llmcompress-") as place:
        write_dropped(opened, dropping, Path(place) / "dropped", recipe.seed)
        yield *reopen_dropped(opened, recipe, Path(place) / "dropped", budget), dropping


def reopen_dropped(opened: Opened, recipe: Recipe, folder: Path, budget: Budget) -> tuple[Opened, Budget]:
    """The model without the dropped blocks, and the budget in what it means for the weights that are left."""
    source, device = replace(opened.source, path=folder), str(opened.skeleton.device)
    found = open_model(source, recipe, device, whole_file=budget.whole_file)
    found.skeleton.shelf, found.skeleton.crew = opened.skeleton.shelf, opened.skeleton.crew
    before, after = (_weights(model, ()) for model in (opened, found))
    if budget.kind == "file":
        before, after = opened.trace.parameters, found.trace.parameters
    ratio = 1.0 if budget.kind == "bytes" else before / after
    return found, replace(budget, amount=budget.amount * ratio)
