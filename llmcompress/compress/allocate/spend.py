"""Spend a budget: from scores to one format per fused unit, never a bit over."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from llmcompress.compress.allocate.budget import Budget
from llmcompress.compress.allocate.integer import Choices, InfeasibleError, Solution, solve
from llmcompress.errors import InputError
from llmcompress.spec import GROUPED
from llmcompress.types import (
    Assigned,
    BitAllocation,
    Fallback,
    Kept,
    LayerScore,
    LinearInfo,
    LinearSpec,
    ModelTrace,
    Scores,
)

SLACK = 0.005  # a plan may stay this share under its budget before a closer one is looked for

FileBytes = Callable[[Mapping[str, LinearSpec]], int]
Allowed = Mapping[str, tuple[LinearSpec, ...]]


def narrow(linear: LinearInfo) -> str:
    """What is said of a linear that no group size of its format divides."""
    return f"its {linear.columns} inputs are not divisible by a group size of its format"


@dataclass(frozen=True)
class SpendUnit:
    """A fused unit with the formats all its linears could get; without a score there is no choice among them."""

    linears: tuple[LinearInfo, ...]
    specs: tuple[LinearSpec, ...]
    choices: Choices
    scored: bool

    def settled(self, step: int) -> "SpendUnit":
        """Without a score: the widest format, or the one `step` narrower, alone."""
        if self.scored:
            return self
        place = sorted(range(len(self.specs)), key=lambda i: -self.specs[i].bits)[min(step, len(self.specs) - 1)]
        choices = Choices((self.choices.costs[place],), (self.choices.damages[place],))
        return replace(self, specs=(self.specs[place],), choices=choices)


def _units(trace: ModelTrace, layers: Mapping[str, LayerScore], allowed: Allowed) -> list[SpendUnit]:
    """The units that are to be quantized: those of the linears in `allowed`."""
    members: dict[str, list[LinearInfo]] = {}
    for linear in trace.every:
        if linear.name in allowed:
            members.setdefault(linear.unit, []).append(linear)
    units = []
    for linears in members.values():
        common = [s for s in allowed[linears[0].name] if all(s in allowed[linear.name] for linear in linears)]
        damages = [{c.spec: c.damage for c in layers[x.name].candidates} if x.name in layers else {} for x in linears]
        known = [spec for spec in common if all(spec in table for table in damages)]
        specs = tuple(known or common)
        costs = tuple(sum(spec.storage_bits(x.rows, x.columns) for x in linears) for spec in specs)
        totals = tuple(sum(table.get(spec, 0.0) for table in damages) for spec in specs)
        units.append(SpendUnit(tuple(linears), specs, Choices(costs, totals), bool(known)))
    return units


Program = Callable[[Sequence[SpendUnit], int, int], Solution]  # units, most and least storage bits


def integer_program(units: Sequence[SpendUnit], budget: int, minimum: int) -> Solution:
    """The exact multiple-choice program on the damages alone."""
    return solve([unit.choices for unit in units], budget, minimum=minimum)


def _specs(units: list[SpendUnit], chosen: tuple[int, ...]) -> dict[str, LinearSpec]:
    return {x.name: unit.specs[i] for unit, i in zip(units, chosen, strict=True) for x in unit.linears}


@dataclass(frozen=True)
class _Account:
    """Converts between the user's budget and storage bits of the quantized linears."""

    budget: Budget
    weights: int
    parameters: int
    other_bits: int  # of the file, beyond the codes, scales and shapes of quantized linears

    @property
    def available(self) -> int:
        """Storage bits the quantized linears may take."""
        if self.budget.kind == "linears":
            return int(self.budget.amount * self.weights)
        whole = self.budget.amount * (self.parameters if self.budget.kind == "file" else 8)
        return int(whole) - self.other_bits

    def say(self, bits: float) -> str:
        """A total of storage bits, in the user's own unit."""
        if self.budget.kind == "linears":
            return f"{_ceil(bits / self.weights)}bits"
        whole = bits + self.other_bits
        if self.budget.kind == "file":
            return f"{_ceil(whole / self.parameters)}bits/file"
        return f"{math.ceil(whole / 8)}B"


def _ceil(value: float) -> str:
    return f"{-(-value * 1000 // 1) / 1000:.3f}"


def _fit(units: list[SpendUnit], account: _Account, program: Program) -> tuple[Solution, str]:
    """The best solution, as close to the budget as candidates allow; and why it is not closer."""
    available = account.available
    try:
        best = program(units, available, 0)
    except InfeasibleError as error:
        raise InputError(
            f"budget {account.budget.text} cannot be met: the smallest possible is {account.say(error.smallest)}",
            f"ask for {account.say(error.smallest)} or more, or allow fewer bits with --set plan.bits",
        ) from None
    wanted = int(available * (1 - SLACK)) + 1
    if best.cost >= wanted:
        return best, ""
    try:
        return program(units, available, wanted), ""
    except InfeasibleError as error:
        if error.largest <= available:
            return best, f"every linear has its largest candidate: {account.say(error.largest)} is the most there is"
        return best, "no combination of candidates comes closer to the budget"


def _kept(trace: ModelTrace, allowed: Allowed, ground: "Ground", *, whole_file: bool) -> tuple[Kept, ...]:
    """Linears without a format, and why; the head only where it would have been quantized."""
    kept = [x for x in trace.linears if x.name not in allowed]
    head = trace.head
    if head is not None and whole_file and head.name not in allowed:
        narrow = bool(head.columns % ground.group_size and head.columns % 32)
        kept += [head] if narrow or head.name in ground.reasons else []
    return tuple(Kept(linear=x.name, reason=ground.reason(x)) for x in kept)


def _unscored(units: list[SpendUnit], specs: Mapping[str, LinearSpec], scorer: str) -> tuple[Fallback, ...]:
    """What became of linears that had a choice, but no score to choose by."""
    return tuple(
        Fallback(where=linear.name, reason=f"not scored by {scorer}: {specs[linear.name].bits} bits")
        for unit in units
        if not unit.scored and len(unit.specs) > 1
        for linear in unit.linears
    )


def _fallbacks(specs: Mapping[str, LinearSpec], trace: ModelTrace, wanted: int) -> tuple[Fallback, ...]:
    found = []
    for linear in trace.every:
        spec = specs.get(linear.name)
        if spec is not None and spec.kind in GROUPED and spec.group_size != wanted:
            reason = f"group size {spec.group_size}: {linear.columns} inputs are not divisible by {wanted}"
            found.append(Fallback(where=linear.name, reason=reason))
    return tuple(found)


@dataclass(frozen=True)
class _Spent:
    """A budget spent on units, and the account it was spent from."""

    account: _Account
    solution: Solution
    reason: str  # why it is not closer to the budget
    specs: dict[str, LinearSpec]
    size: int


def _spent(
    units: list[SpendUnit], trace: ModelTrace, budget: Budget, *, file_bytes: FileBytes, program: Program
) -> _Spent:
    weights = sum(x.weights for unit in units for x in unit.linears)
    smallest = tuple(unit.choices.costs.index(min(unit.choices.costs)) for unit in units)
    other = file_bytes(_specs(units, smallest)) * 8 - sum(min(unit.choices.costs) for unit in units)
    while True:  # shard headers grow by a few digits with the sizes they list: then count them again
        account = _Account(budget, weights, trace.parameters, other)
        solution, reason = _fit(units, account, program)
        specs = _specs(units, solution.chosen)
        size = file_bytes(specs)
        exact = size * 8 - solution.cost
        if budget.kind == "linears" or exact <= other:
            return _Spent(account, solution, reason, specs, size)
        other = exact


def _spent_on_any(
    units: list[SpendUnit], trace: ModelTrace, budget: Budget, *, file_bytes: FileBytes, program: Program
) -> _Spent:
    """Spend with unscored units at their widest format, or as narrow as it takes to meet the budget."""
    last = max((len(unit.specs) for unit in units if not unit.scored), default=1) - 1
    for step in range(last):
        with suppress(InputError):  # too wide: the next one leaves more to the others
            return _spent([unit.settled(step) for unit in units], trace, budget, file_bytes=file_bytes, program=program)
    return _spent([unit.settled(last) for unit in units], trace, budget, file_bytes=file_bytes, program=program)


@dataclass(frozen=True)
class Ground:
    """What a budget is spent on, beside the scores.

    `file_bytes(specs)` is the exact size of the weight shards for an allocation; `candidates` are the formats
    allowed to each linear that is to be quantized, those that were scored where not given; `reasons` say of others why
    they have none, where that is known.
    """

    group_size: int
    file_bytes: FileBytes
    candidates: Allowed | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)

    def reason(self, linear: LinearInfo) -> str:
        """Why a linear has no format."""
        if linear.name in self.reasons:
            return self.reasons[linear.name]
        return narrow(linear) if linear.columns % 32 else "there is no score for it"


def spend(
    trace: ModelTrace,
    scores: Scores,
    budget: Budget,
    *,
    group_size: int,
    file_bytes: FileBytes,
    candidates: Allowed | None = None,
) -> BitAllocation:
    """Choose a format for every unit by the exact integer program; see `spend_by`."""
    return spend_by(integer_program, trace, scores, budget, ground=Ground(group_size, file_bytes, candidates))


def spend_by(program: Program, trace: ModelTrace, scores: Scores, budget: Budget, *, ground: Ground) -> BitAllocation:
    """Choose a format for every unit by a program, on true storage bits.

    A unit that has several formats but no score gets its widest, or the widest the budget has room for, and the
    fallback is recorded. Raises InputError with the nearest feasible budget when the budget is too small.
    """
    layers = {layer.linear: layer for layer in scores.layers if layer.candidates}
    allowed = ground.candidates
    if allowed is None:
        allowed = {name: tuple(c.spec for c in layer.candidates) for name, layer in layers.items()}
    units = _units(trace, layers, allowed)
    if not units:
        raise InputError("no linear of this model can be quantized", "its widths fit no group size of 128, 64 or 32")
    spent = _spent_on_any(units, trace, budget, file_bytes=ground.file_bytes, program=program)
    solution = spent.solution
    return BitAllocation(
        assigned=tuple(Assigned(linear=name, spec=spec) for name, spec in spent.specs.items()),
        kept=_kept(trace, allowed, ground, whole_file=budget.whole_file),
        fallbacks=(*_fallbacks(spent.specs, trace, ground.group_size), *_unscored(units, spent.specs, scores.scorer)),
        budget=budget.text,
        budget_bits=spent.account.available,
        storage_bits=solution.cost,
        bits_per_weight=solution.cost / spent.account.weights,
        file_bytes=spent.size,
        file_bits_per_weight=spent.size * 8 / trace.parameters,
        expected_damage=solution.damage,
        lower_bound=solution.bound,
        status="optimal" if solution.optimal else "gap",
        under_budget_reason=spent.reason,
    )


def reassigned(
    allocation: BitAllocation, specs: Mapping[str, LinearSpec], trace: ModelTrace, file_bytes: FileBytes
) -> BitAllocation:
    """The allocation with other formats for the same linears, its sizes counted again.

    Raises InputError when they take more than the budget of the allocation.
    """
    sizes = {x.name: x for x in trace.every}
    bits = sum(spec.storage_bits(sizes[name].rows, sizes[name].columns) for name, spec in specs.items())
    weights = sum(sizes[name].weights for name in specs)
    size = file_bytes(specs)
    if bits > allocation.budget_bits:
        raise InputError(f"{bits} storage bits are more than the {allocation.budget_bits} there are")
    changes = {
        "assigned": tuple(Assigned(linear=a.linear, spec=specs[a.linear]) for a in allocation.assigned),
        "storage_bits": bits,
        "bits_per_weight": bits / weights,
        "file_bytes": size,
        "file_bits_per_weight": size * 8 / trace.parameters,
    }
    return allocation.model_copy(update=changes)


def priced(allocation: BitAllocation, scores: Scores, best: BitAllocation) -> BitAllocation:
    """An allocation found another way, with its damage under `scores` and the bound that `best` proved for them.

    Formats without a score count nothing, as in `spend`.
    """
    damages = {layer.linear: {c.spec: c.damage for c in layer.candidates} for layer in scores.layers}
    damage = math.fsum(damages.get(a.linear, {}).get(a.spec, 0.0) for a in allocation.assigned)
    proven = damage <= best.lower_bound * (1 + 1e-9)
    status = "optimal" if proven else "gap"
    changes = {"expected_damage": damage, "lower_bound": min(best.lower_bound, damage), "status": status}
    return allocation.model_copy(update=changes)


def with_widths(scores: Scores, widths: tuple[int, ...]) -> Scores:
    """The same scores with fewer candidates; a linear that would be left with none, as a pinned one, keeps all."""
    layers = []
    for layer in scores.layers:
        fewer = tuple(c for c in layer.candidates if c.spec.bits in widths)
        layers.append(layer.model_copy(update={"candidates": fewer or layer.candidates}))
    return scores.model_copy(update={"layers": tuple(layers)})


def narrower_widths(allocation: BitAllocation, bits: tuple[int, ...], trace: ModelTrace) -> tuple[tuple[int, ...], ...]:
    """Sets of adjacent widths around the mean width an allocation gives the blocks: two of them, and three."""
    sizes = {linear.name: linear.weights for linear in trace.linears}
    blocks = [a for a in allocation.assigned if a.linear in sizes]
    total = sum(sizes[a.linear] for a in blocks)
    mean = sum(sizes[a.linear] * a.spec.bits for a in blocks) / max(total, 1)
    ordered = sorted(set(bits))
    below = max((place for place, width in enumerate(ordered) if width <= mean), default=0)
    pairs = (tuple(ordered[below : below + 2]), tuple(ordered[below : below + 3]))
    return tuple(dict.fromkeys(found for found in pairs if len(found) > 1 and found != tuple(ordered)))
