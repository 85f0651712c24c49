"""Decide: from a score file alone, without the model and without torch, or from an opened model. Gives `plan.json`."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field

from llmcompress.compress.allocate.budget import Budget, parse_budget
from llmcompress.compress.allocate.integer import InfeasibleError, Solution
from llmcompress.compress.allocate.spend import (
    Allowed,
    FileBytes,
    Ground,
    Program,
    SpendUnit,
    integer_program,
    spend_by,
)
from llmcompress.errors import InputError
from llmcompress.types import BitAllocation, Candidate, LinearSpec, ModelTrace, Noun, ScoreFile, Scores, Unit

NATS: Unit = "nats/token"
HALVES = tuple(half / 2 for half in range(4, 18))  # bits per weight the frontier is asked at


class FrontierPoint(Noun):
    """One allocation of the frontier. `measured_kld` in nats per token, where there was a model to measure."""

    bits_per_weight: float
    file_bits_per_weight: float
    file_bytes: int
    expected_damage: float
    measured_kld: float | None = None


class PlanFile(BitAllocation):
    """`plan.json`: an allocation, the scores it was made from, and the frontier where it was asked for.

    `frontier` is empty where it was not asked for. Damage is in `unit`.
    """

    version: Literal[1] = 1
    model: str
    scorer: str
    unit: Unit
    model_digest: str
    calibration_digest: str
    settings_digest: str
    frontier: tuple[FrontierPoint, ...] = Field(default=())


@dataclass(frozen=True)
class Uniform:
    """Every linear at one width: bits per weight over the linears, expected damage."""

    bits: int
    bits_per_weight: float
    expected_damage: float


@dataclass(frozen=True)
class Desk:
    """All that a decision is made from. `file_bytes` of the weight shards for an allocation.

    `candidates` are the formats allowed to each linear; where not given, those that were scored. `reasons` say why some
    linears have none, where that is known.
    """

    model: str
    trace: ModelTrace
    scores: Scores
    group_size: int
    file_bytes: FileBytes
    candidates: Allowed | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Rows and columns of every linear, the head among them."""
        return {x.name: (x.rows, x.columns) for x in self.trace.every}


def check_scores(file: ScoreFile) -> None:
    """Raises InputError, naming the linear, where a score file cannot be planned from though each value is legal."""
    hint = "the file is damaged or was edited by hand; make it again with `llmcompress score`"
    if not file.scores:
        raise InputError("the score file holds no scores", hint)
    counts = Counter(linear.name for linear in file.trace.every)
    for linear in file.trace.every:
        if min(linear.rows, linear.columns) < 1 or counts[linear.name] > 1:
            raise InputError(f"trace: {linear.name}: listed twice, or without weights", hint)
    if file.trace.parameters < 1:
        raise InputError("trace: parameters: must be positive", hint)
    units = {linear.name: linear.unit for linear in file.trace.every}
    for scores in file.scores:
        shared: dict[str, set[LinearSpec]] = {}
        names = [layer.linear for layer in scores.layers]
        for layer in scores.layers:
            if layer.linear not in units:
                raise InputError(f"{scores.scorer}: {layer.linear}: the trace has no such linear", hint)
            if layer.candidates:
                specs = {candidate.spec for candidate in layer.candidates}
                unit = units[layer.linear]
                shared[unit] = shared.get(unit, specs) & specs
                if not shared[unit]:
                    raise InputError(f"{scores.scorer}: {layer.linear}: shares no candidate with its unit", hint)
        if len(set(names)) < len(names):
            raise InputError(f"{scores.scorer}: a linear is listed twice", hint)


def pick(file: ScoreFile, scorer: str | None = None) -> Scores:
    """The scores to plan by: those of `scorer`, or the first in nats per token, or the first.

    Raises InputError naming the scorers there are.
    """
    if scorer is None:
        return next((scores for scores in file.scores if scores.unit == NATS), file.scores[0])
    for scores in file.scores:
        if scores.scorer == scorer:
            return scores
    there = ", ".join(dict.fromkeys(scores.scorer for scores in file.scores))
    raise InputError(f"--scorer {scorer}: the score file has no such scores", f"it has: {there}")


def desk_of(file: ScoreFile, scores: Scores) -> Desk:
    """A desk without the model: sizes are those of the trace, and the shards are told but for a few header bytes."""
    sizes = {x.name: (x.rows, x.columns) for x in file.trace.every}

    def file_bytes(specs: Mapping[str, LinearSpec]) -> int:
        return file.other_bytes + sum(spec.storage_bits(*sizes[name]) for name, spec in specs.items()) // 8

    return Desk(file.model, file.trace, scores, file.group_size, file_bytes)


def _optimum(units: Sequence[SpendUnit], budget: int, minimum: int) -> Solution:
    """The exact program without the second look for something closer to the budget, which a frontier has no use for."""
    if minimum:
        raise InfeasibleError(minimum, budget + 1)
    return integer_program(units, budget, 0)


def decide(desk: Desk, budget: Budget, program: Program = integer_program) -> BitAllocation:
    """Spend a budget of bits or bytes. Raises InputError when it is too small, or a limit of damage."""
    if budget.measured:
        raise InputError(
            f"budget {budget.text}: a damage limit is measured, which scores alone cannot do: it needs the model",
            "give the model in place of the score file, or a budget in bits or bytes",
        )
    ground = Ground(desk.group_size, desk.file_bytes, desk.candidates, desk.reasons)
    return spend_by(program, desk.trace, desk.scores, budget, ground=ground)


def frontier(desk: Desk) -> list[BitAllocation]:
    """Optimal allocations, smallest to largest, half a bit apart; budgets that change nothing are left out."""
    found: list[BitAllocation] = []
    least = math.ceil(_smallest(desk) * 1000) / 1000
    for bits in (least, *(half for half in HALVES if half > least)):
        try:
            allocation = decide(desk, parse_budget(f"{bits:.3f}bits"), _optimum)
        except InputError:
            continue  # fused linears may have no smallest format in common
        if not found or allocation.assigned != found[-1].assigned:
            found.append(allocation)
    return found


def _smallest(desk: Desk) -> float:
    """Bits per weight with every linear in its smallest format."""
    sizes, allowed = desk.sizes, desk.candidates
    if allowed is None:
        allowed = {x.linear: tuple(c.spec for c in x.candidates) for x in desk.scores.layers if x.candidates}
    costs = (min(spec.storage_bits(*sizes[name]) for spec in specs) for name, specs in allowed.items())
    return sum(costs) / max(sum(math.prod(sizes[name]) for name in allowed), 1)


def uniforms(desk: Desk) -> list[Uniform]:
    """Every scored linear at one width, for each width that all of them could get."""
    sizes = desk.sizes
    tables: dict[str, dict[int, Candidate]] = {
        layer.linear: {c.spec.bits: c for c in layer.candidates} for layer in desk.scores.layers if layer.candidates
    }
    widths = set.intersection(*(set(table) for table in tables.values())) if tables else set()
    weights = sum(math.prod(sizes[name]) for name in tables)
    found = []
    for bits in sorted(widths):
        cost = sum(table[bits].spec.storage_bits(*sizes[name]) for name, table in tables.items())
        damage = math.fsum(table[bits].damage for table in tables.values())
        found.append(Uniform(bits, cost / weights, damage))
    return found


def point_of(allocation: BitAllocation, measured_kld: float | None = None) -> FrontierPoint:
    """An allocation as a point of the frontier."""
    return FrontierPoint(
        bits_per_weight=allocation.bits_per_weight,
        file_bits_per_weight=allocation.file_bits_per_weight,
        file_bytes=allocation.file_bytes,
        expected_damage=allocation.expected_damage,
        measured_kld=measured_kld,
    )


def plan_file(desk: Desk, allocation: BitAllocation, points: Sequence[FrontierPoint] = ()) -> PlanFile:
    """What `plan.json` holds."""
    scores = desk.scores
    return PlanFile(
        **{name: getattr(allocation, name) for name in BitAllocation.model_fields},
        model=desk.model,
        scorer=scores.scorer,
        unit=scores.unit,
        model_digest=scores.model_digest,
        calibration_digest=scores.calibration_digest,
        settings_digest=scores.settings_digest,
        frontier=tuple(points),
    )
