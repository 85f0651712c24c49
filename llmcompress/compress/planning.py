"""Decide: spend the budget on scores, and measure before believing them."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from llmcompress.compress.allocate.budget import Budget
from llmcompress.compress.allocate.spend import narrower_widths, priced, spend, with_widths
from llmcompress.compress.pipeline import QUANTIZERS, Opened, score
from llmcompress.compress.trial import TrialJob, measure_allocations
from llmcompress.errors import InputError
from llmcompress.model.checkpoint import TORCH_DTYPES
from llmcompress.model.text import Batches
from llmcompress.plugins import find
from llmcompress.recipes import Recipe
from llmcompress.types import BitAllocation, Plan, Scores, Trial

RIVAL = "hessian"


def make_plan(opened: Opened, recipe: Recipe, batches: Batches, scores: Scores, budget: Budget) -> Plan:
    """Spend the budget. Raises InputError with the nearest feasible budget when it is too small.

    With `plan.trials`, allocations from narrower sets of widths, and one that follows the local proxy
    loss, are carried out on calibration text as well, and the one with the least measured KL divergence
    is taken: sums of single damages mislead when damage is large.
    """
    size, file_bytes = recipe.plan.group_size, opened.shards.file_bytes
    allocations = [spend(opened.trace, scores, budget, group_size=size, file_bytes=file_bytes)]
    trials: tuple[Trial, ...] = ()
    if recipe.plan.trials and batches.tokens.numel():
        for rival in _rival_scores(opened, recipe, batches, scores=scores, first=allocations[0]):
            try:
                found = spend(opened.trace, rival, budget, group_size=size, file_bytes=file_bytes)
            except InputError:
                continue  # these widths alone cannot meet the budget
            if all(found.assigned != known.assigned for known in allocations):
                allocations.append(priced(found, scores, allocations[0]))
    if len(allocations) > 1:
        trials = run_trials(opened, recipe, batches, allocations)
        best = min(range(len(trials)), key=lambda place: trials[place].measured_kld)
        allocations = [allocations[best]]
    return Plan(
        model=opened.source.name,
        model_digest=scores.model_digest,
        calibration=batches.source,
        calibration_digest=batches.digest,
        scorer=scores.scorer,
        quantizer=recipe.quantizer,
        options=recipe.quantize,
        allocation=allocations[0],
        trials=trials,
        seed=recipe.seed,
        batch_size=recipe.calibration.batch_size,
    )


def _rival_scores(
    opened: Opened, recipe: Recipe, batches: Batches, *, scores: Scores, first: BitAllocation
) -> Iterator[Scores]:
    """Scores that lead to other plausible allocations: fewer widths, and the local proxy loss over two of them."""
    pairs = narrower_widths(first, recipe.plan.bits, opened.trace)
    for widths in pairs:
        yield with_widths(scores, widths)
    if pairs and scores.scorer != RIVAL and find(QUANTIZERS, recipe.quantizer).NEEDS_HESSIAN:
        fewer = {name: tuple(s for s in specs if s.bits in pairs[0]) for name, specs in opened.candidates.items()}
        local = recipe.model_copy(update={"scorer": RIVAL})
        yield score(replace(opened, candidates=fewer), local, batches, scores.model_digest)


def run_trials(opened: Opened, recipe: Recipe, batches: Batches, found: list[BitAllocation]) -> tuple[Trial, ...]:
    """Measure allocations on the calibration text: part of it to quantize with, the rest to judge by."""
    job = TrialJob(
        skeleton=opened.skeleton,
        trace=opened.trace,
        quantizer=find(QUANTIZERS, recipe.quantizer),
        options=recipe.quantize,
        dtype=TORCH_DTYPES[opened.shards.scale_dtype],
    )
    tokens = batches.tokens
    cut = min(recipe.calibration.score_samples, max(len(tokens) // 2, 1))
    parts = [list(torch.split(part, recipe.calibration.batch_size)) for part in (tokens[:cut], tokens[cut:])]
    measured = measure_allocations(job, found, *parts)
    return tuple(
        Trial(
            widths=tuple(sorted({a.spec.bits for a in allocation.assigned})),
            bits_per_weight=allocation.bits_per_weight,
            expected_damage=allocation.expected_damage,
            measured_kld=kld,
        )
        for allocation, kld in zip(found, measured, strict=True)
    )
