"""Decide: spend the budget on scores, measure what could be better, and ship what measured best."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from llmcompress.compress.allocate.budget import Budget
from llmcompress.compress.allocate.spend import (
    Ground,
    Program,
    integer_program,
    narrower_widths,
    priced,
    reassigned,
    spend_by,
    with_widths,
)
from llmcompress.compress.exchange import Exchanger, Limits, exchange_units, halves
from llmcompress.compress.gram import measure_gram, measure_pairs
from llmcompress.compress.limits import search
from llmcompress.compress.measuring import Changes, MeasureJob, Text, at_width, units_of, widths_of
from llmcompress.compress.pipeline import QUANTIZERS, Opened, score
from llmcompress.compress.programs import Matrix, block_order, quadratic
from llmcompress.compress.ratios import fixed_ratios, ratio_program
from llmcompress.compress.statistics import mean, upper_bound, upper_bound_signed
from llmcompress.compress.trial import Contestant, Damage, best_of, judged_options, measure_allocations, trials_of
from llmcompress.errors import InputError
from llmcompress.model.checkpoint import TORCH_DTYPES
from llmcompress.model.text import Batches
from llmcompress.plugins import find
from llmcompress.recipes import Recipe
from llmcompress.runtimes.aim import advising, promised
from llmcompress.runtimes.answers import planned
from llmcompress.types import BitAllocation, Exchange, LinearSpec, Plan, Scores, Trial

RIVAL = "hessian"
ORDER = "lim"
SLACK = 0.005
FEWEST_ROWS = 6  # of text left over, to exchange by and to judge by


class Planner:
    """One model, one recipe, one calibration text and one set of scores: everything a plan is made from."""

    def __init__(self, opened: Opened, recipe: Recipe, batches: Batches, scores: Scores) -> None:
        self.opened, self.recipe, self.batches, self.scores = opened, recipe, batches, scores
        tokens = batches.tokens
        cut = min(recipe.calibration.score_samples, max(len(tokens) // 2, 1))
        self.hessian_rows, self.other_rows = tokens[:cut], tokens[cut:] if len(tokens) > cut else tokens

    @property
    def measures(self) -> bool:
        """Whether allocations can be carried out on text before one is chosen."""
        return bool(self.recipe.plan.trials and self.batches.tokens.numel())

    def job(self) -> MeasureJob:
        """The model with the quantizer that will be used."""
        return MeasureJob(
            skeleton=self.opened.skeleton,
            trace=self.opened.trace,
            quantizer=find(QUANTIZERS, self.recipe.quantizer),
            options=self.recipe.quantize.model_copy(update={"output_feedback": 0}),
            dtype=TORCH_DTYPES[self.opened.shards.scale_dtype],
            hints=self.opened.hints,
        )

    def split(self, rows: Tensor) -> list[Tensor]:
        """Rows as batches."""
        return list(torch.split(rows, self.recipe.calibration.batch_size))

    def allocate(self, scores: Scores, budget: Budget, program: Program = integer_program) -> BitAllocation:
        """Spend the budget on scores. Raises InputError when it is too small."""
        opened, size = self.opened, self.recipe.plan.group_size
        ground = Ground(size, opened.shards.file_bytes, opened.candidates, opened.kept)
        solve = partial(spend_by, program, self.opened.trace, scores, budget, ground=ground)
        with advising(self.recipe.plan.runtime):
            solved: BitAllocation = self.opened.skeleton.crew.first(solve, BitAllocation)  # it has a time limit
        return solved

    def program(self) -> Program:
        """The program of the recipe. Measures the interactions of units where it needs them."""
        name = self.recipe.plan.program
        if name == "order":
            return block_order(self.opened.trace, self.scores)
        if name == "ratio":
            return ratio_program(self.opened.trace, self.opened.candidates, self.gram)
        return self.quadratic() if name == "quadratic" else integer_program

    def quadratic(self) -> Program:
        """The quadratic program, its interactions measured on the full-precision model."""
        units = units_of(self.opened.trace, self.opened.candidates)
        keys = [(unit, bits) for unit, members in units.items() for bits in widths_of(members, self.opened.candidates)]
        variants = [at_width(units[unit], self.opened.candidates, bits) for unit, bits in keys]
        places = {key: place for place, key in enumerate(keys)}
        return quadratic(places, self.gram(variants, [unit for unit, _ in keys]))

    def gram(self, variants: Sequence[Changes], units: Sequence[str]) -> Matrix:
        """How the errors of variants add up, each of a unit, measured on the full-precision model."""
        swaps = self.recipe.score.swaps
        if not self.batches.tokens.numel():
            raise InputError("interactions are measured on calibration text", "use a recipe that reads text")
        memory, text = swaps.memory_mb << 20, self.text(self.other_rows[: swaps.samples, : swaps.tokens])
        if swaps.interactions == "pairs":
            return measure_pairs(self.job(), variants, units, text=text, memory_bytes=memory)
        return measure_gram(self.job(), variants, text=text, memory_bytes=memory, seed=self.recipe.seed)

    def measure(self, allocations: Sequence[BitAllocation], rows: Tensor | None = None) -> Damage:
        """Damage of allocations on rows of text that their Hessians did not see."""
        return measure_allocations(self.job(), allocations, self.text(rows))

    def text(self, rows: Tensor | None = None) -> Text:
        """Rows that Hessians are made from, and those to judge by: the rest, where none are given."""
        return Text(self.split(self.hessian_rows), self.split(self.other_rows if rows is None else rows))

    def rivals(self, budget: Budget, first: BitAllocation) -> Iterator[Contestant]:
        """Other allocations worth measuring, each of at most the same size."""
        bits, trace = self.recipe.plan.bits, self.opened.trace
        pairs = narrower_widths(first, bits, trace)
        found = [(f"{self.scores.scorer}, {_set(widths)}", with_widths(self.scores, widths)) for widths in pairs]
        if pairs and self.scores.scorer != RIVAL and self.job().quantizer.NEEDS_HESSIAN:
            found.append((f"{RIVAL}, {_set(pairs[0])}", self._local(pairs[0])))
        if self.recipe.plan.program == "ratio":
            found = [(f"{self.scores.scorer}, integer", self.scores), *fixed_ratios(self.scores)]
        else:
            found += [(f"uniform {width}", with_widths(self.scores, (width,))) for width in sorted(bits, reverse=True)]
        uniform = False
        for label, scores in found:
            if label.startswith("uniform") and uniform:
                continue  # a narrower one than fits
            try:
                allocation = self.allocate(scores, budget)
            except InputError:
                continue  # these widths alone cannot meet the budget
            uniform = uniform or label.startswith("uniform")
            yield Contestant(label, allocation)
        if pairs and self.batches.tokens.numel():
            yield from self._by_order(pairs[0], budget)

    def _local(self, widths: tuple[int, ...]) -> Scores:
        """Scores by the local proxy loss over a few widths."""
        fewer = {
            name: tuple(s for s in specs if s.bits in widths) or specs for name, specs in self.opened.candidates.items()
        }
        recipe = self.recipe.model_copy(update={"scorer": RIVAL})
        return score(replace(self.opened, candidates=fewer), recipe, self.batches, self.scores.model_digest)

    def _by_order(self, widths: tuple[int, ...], budget: Budget) -> Iterator[Contestant]:
        """The two-width mix by order of blocks."""
        recipe = self.recipe.model_copy(update={"scorer": ORDER})
        importance = score(self.opened, recipe, self.batches, self.scores.model_digest)
        try:
            program = block_order(self.opened.trace, importance)
            yield Contestant(
                f"{ORDER} order, {_set(widths[:2])}",
                self.allocate(with_widths(self.scores, widths[:2]), budget, program),
            )
        except InputError:
            return

    def contest(self, budget: Budget) -> tuple[list[Contestant], BitAllocation]:
        """All contestants, the program's own first, each with its damage under the scores."""
        first = self.allocate(self.scores, budget, self.program())
        found = [Contestant(f"{self.scores.scorer}, {self.recipe.plan.program}", first)]
        if self.measures:
            for rival in self.rivals(budget, first):
                if all(rival.allocation.assigned != known.allocation.assigned for known in found):
                    found.append(Contestant(rival.label, priced(rival.allocation, self.scores, first)))
        return found, first

    def exchanged(self, start: BitAllocation) -> tuple[BitAllocation, tuple[Exchange, ...]]:
        """An allocation after measured exchange on the first half of the text left over."""
        rounds, rows = self.recipe.plan.exchange, self.exchange_rows()
        if not rounds or not self.measures or len(rows) == 0:
            return start, ()
        swaps = self.recipe.score.swaps
        units = exchange_units(units_of(self.opened.trace, self.opened.candidates), self.opened.candidates)
        minimum = min(int(start.budget_bits * (1 - SLACK)) + 1, start.storage_bits)
        exchanger = Exchanger(
            self.job(),
            units,
            Limits(minimum, start.budget_bits),
            memory_bytes=swaps.memory_mb << 20,
            proposals=swaps.proposals,
        )
        texts = halves(rows[:, : swaps.tokens], self.recipe.calibration.batch_size, self.split(self.hessian_rows))
        specs = {a.linear: a.spec for a in start.assigned}
        places = tuple(
            next(i for i, option in enumerate(unit.options) if option[0] == specs[unit.linears[0].name])
            for unit in units
        )
        made: list[Exchange] = []
        for _ in range(rounds):
            places, exchange = exchanger.round(places, *texts)
            if exchange is None:
                break
            made.append(exchange)
        if not made:
            return start, ()
        with suppress(InputError):  # the digits of shard headers may take it a byte over a whole-file budget
            return self.reassigned(start, exchanger.changes(places)), tuple(made)
        return start, ()

    def exchange_rows(self) -> Tensor:
        """Rows to exchange by; none where too few would be left to judge by."""
        enough = len(self.other_rows) >= FEWEST_ROWS and len(self.other_rows) < len(self.batches.tokens)
        return self.other_rows[: len(self.other_rows) // 2 if enough else 0]

    def reassigned(self, allocation: BitAllocation, specs: Mapping[str, LinearSpec]) -> BitAllocation:
        """The allocation with other formats, counted and priced again. Raises InputError when over its budget."""
        trace = self.opened.trace
        found = reassigned(allocation, specs, trace, self.opened.shards.file_bytes)
        return priced(found, self.scores, allocation)


def _set(widths: Sequence[int]) -> str:
    return "{" + ",".join(map(str, widths)) + "}"


def make_plan(opened: Opened, recipe: Recipe, batches: Batches, scores: Scores, budget: Budget) -> Plan:
    """Spend the budget. Raises InputError with the nearest feasible budget when it is too small, and where the
    runtime planned for would not open the outcome.

    With `plan.trials` the program's answer, the same from fewer widths, one that follows the local proxy loss, the
    widest uniform format and a two-width order of blocks are all carried out on calibration text; the one with
    the least measured KL divergence goes on. It is then improved by measured exchange (`plan.exchange` rounds),
    and what came of that is taken only if it measures better on text that the exchange did not see.
    """
    planner = Planner(opened, recipe, batches, scores)
    if budget.measured:
        return _plan_within(planner, budget)
    contestants, _ = planner.contest(budget)
    allocation = contestants[0].allocation
    trials: tuple[Trial, ...] = ()
    exchanges: tuple[Exchange, ...] = ()
    if len(contestants) > 1:
        trials = trials_of(contestants, planner.measure([c.allocation for c in contestants]))
        allocation = contestants[best_of(trials)].allocation
    changed, made = planner.exchanged(allocation)
    if made:
        pair = [Contestant("before exchange", allocation), Contestant("after exchange", changed)]
        rows = planner.other_rows[len(planner.exchange_rows()) :]
        final = trials_of(pair, planner.measure([allocation, changed], rows))
        trials, exchanges = (*trials, *final), made
        allocation = pair[best_of(final)].allocation
    return _plan(planner, allocation, trials, exchanges)


def _plan(
    planner: Planner, allocation: BitAllocation, trials: tuple[Trial, ...], exchanges: tuple[Exchange, ...]
) -> Plan:
    recipe, batches, scores = planner.recipe, planner.batches, planner.scores
    specs = {assigned.linear: assigned.spec for assigned in allocation.assigned}
    options, feedback = judged_options(planner.job(), recipe.quantize, allocation, planner.text())
    promised(recipe.plan.runtime, planned(planner.opened.trace, specs, recipe.quantize))
    return Plan(
        model=planner.opened.source.name,
        model_digest=scores.model_digest,
        calibration=batches.source,
        calibration_digest=batches.digest,
        scorer=scores.scorer,
        program=recipe.plan.program,
        quantizer=recipe.quantizer,
        options=options,
        allocation=allocation,
        trials=trials,
        exchanges=exchanges,
        output_feedback=feedback,
        seed=recipe.seed,
        batch_size=recipe.calibration.batch_size,
    )


def _plan_within(planner: Planner, budget: Budget) -> Plan:
    """The smallest plan whose upper 95 % bound of measured damage keeps a limit."""
    if not planner.batches.tokens.numel():
        raise InputError(f"budget {budget.text} is measured on calibration text", "use a recipe that reads text")
    limit = budget.amount if budget.kind == "kld" else math.log1p(budget.amount)

    def allocate(bits: float) -> BitAllocation:
        found = planner.allocate(planner.scores, Budget(f"{bits:.4f}bits", "linears", bits), planner.program())
        return found.model_copy(update={"budget": budget.text, "budget_bits": found.storage_bits})

    klds: list[float] = []

    def measure(allocation: BitAllocation) -> tuple[float, float]:
        damage = planner.measure([allocation])
        klds.append(mean(damage.kld[0].tolist()))
        values = (damage.kld if budget.kind == "kld" else damage.dnll)[0].tolist()
        return mean(values), (upper_bound if budget.kind == "kld" else upper_bound_signed)(values)

    smallest, largest = _range(planner)
    best, probes = search(allocate, measure, limit, smallest=smallest, largest=largest, say=f"budget {budget.text}")
    trials = tuple(
        Trial(
            label=f"{probe.allocation.bits_per_weight:.3f} bits",
            widths=tuple(sorted({a.spec.bits for a in probe.allocation.assigned})),
            bits_per_weight=probe.allocation.bits_per_weight,
            expected_damage=probe.allocation.expected_damage,
            measured_kld=kld,
            upper=probe.upper if budget.kind == "kld" else math.expm1(probe.upper),
        )
        for probe, kld in zip(probes, klds, strict=True)
    )
    return _plan(planner, best.allocation, trials, ())


def _range(planner: Planner) -> tuple[float, float]:
    """Bits per weight with every linear at its narrowest format, and at its widest."""
    linears = [x for x in planner.opened.trace.every if x.name in planner.opened.candidates]
    weights = sum(x.weights for x in linears)
    bits = [
        sum(pick(s.storage_bits(x.rows, x.columns) for s in planner.opened.candidates[x.name]) for x in linears)
        for pick in (min, max)
    ]
    return math.ceil(bits[0] / weights * 1e4) / 1e4, math.ceil(bits[1] / weights * 1e4) / 1e4


def measured_frontier(
    opened: Opened, recipe: Recipe, batches: Batches, allocations: Sequence[BitAllocation]
) -> list[float]:
    """Measured KL divergence of each allocation, nats per token, on calibration text their Hessians did not see."""
    scores = Scores(scorer="", unit="nats/token", model_digest="", calibration_digest="", seed=recipe.seed, layers=())
    found: list[float] = Planner(opened, recipe, batches, scores).measure(allocations).kld.mean(1).tolist()
    return found
