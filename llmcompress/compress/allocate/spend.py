"""Spend a budget: from scores to one format per fused unit, never a bit over."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from llmcompress.compress.allocate.budget import Budget
from llmcompress.compress.allocate.integer import Choices, InfeasibleError, Solution, solve
from llmcompress.errors import InputError
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


@dataclass(frozen=True)
class _Unit:
    """A fused unit with the formats all its linears could get."""

    linears: tuple[LinearInfo, ...]
    specs: tuple[LinearSpec, ...]
    choices: Choices


def _units(trace: ModelTrace, layers: Mapping[str, LayerScore]) -> list[_Unit]:
    members: dict[str, list[LinearInfo]] = {}
    for linear in trace.linears:
        if linear.name in layers:
            members.setdefault(linear.unit, []).append(linear)
    units = []
    for linears in members.values():
        damages = [{c.spec: c.damage for c in layers[linear.name].candidates} for linear in linears]
        specs = tuple(spec for spec in damages[0] if all(spec in other for other in damages))
        costs = tuple(sum(spec.storage_bits(x.rows, x.columns) for x in linears) for spec in specs)
        totals = tuple(sum(table[spec] for table in damages) for spec in specs)
        units.append(_Unit(tuple(linears), specs, Choices(costs, totals)))
    return units


def _specs(units: list[_Unit], chosen: tuple[int, ...]) -> dict[str, LinearSpec]:
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

    def say(self, bits: int) -> str:
        """A total of storage bits, in the user's own unit."""
        if self.budget.kind == "linears":
            return f"{_ceil(bits / self.weights)}bits"
        whole = bits + self.other_bits
        if self.budget.kind == "file":
            return f"{_ceil(whole / self.parameters)}bits/file"
        return f"{-(-whole // 8)}B"


def _ceil(value: float) -> str:
    return f"{-(-value * 1000 // 1) / 1000:.3f}"


def _fit(units: list[_Unit], account: _Account) -> tuple[Solution, str]:
    """The best solution, as close to the budget as candidates allow; and why it is not closer."""
    choices = [unit.choices for unit in units]
    available = account.available
    try:
        best = solve(choices, available)
    except InfeasibleError as error:
        raise InputError(
            f"budget {account.budget.text} cannot be met: the smallest possible is {account.say(error.smallest)}",
            f"ask for {account.say(error.smallest)} or more, or allow fewer bits with --set plan.bits",
        ) from None
    wanted = int(available * (1 - SLACK)) + 1
    if best.cost >= wanted:
        return best, ""
    try:
        return solve(choices, available, minimum=wanted), ""
    except InfeasibleError as error:
        if error.largest <= available:
            return best, f"every linear has its largest candidate: {account.say(error.largest)} is the most there is"
        return best, "no combination of candidates comes closer to the budget"


def _kept(trace: ModelTrace, layers: Mapping[str, LayerScore]) -> tuple[Kept, ...]:
    reason = "its {} inputs are not divisible by a group size of 128, 64 or 32"
    return tuple(Kept(linear=x.name, reason=reason.format(x.columns)) for x in trace.linears if x.name not in layers)


def _fallbacks(specs: Mapping[str, LinearSpec], trace: ModelTrace, wanted: int) -> tuple[Fallback, ...]:
    found = []
    for linear in trace.linears:
        spec = specs.get(linear.name)
        if spec is not None and spec.group_size != wanted:
            reason = f"group size {spec.group_size}: {linear.columns} inputs are not divisible by {wanted}"
            found.append(Fallback(where=linear.name, reason=reason))
    return tuple(found)


def spend(
    trace: ModelTrace, scores: Scores, budget: Budget, *, group_size: int, file_bytes: FileBytes
) -> BitAllocation:
    """Choose a format for every unit by the exact integer program on true storage bits.

    `file_bytes(specs)` is the exact size of the weight shards for an allocation. Raises InputError
    with the nearest feasible budget when the budget is too small.
    """
    layers = {layer.linear: layer for layer in scores.layers if layer.candidates}
    units = _units(trace, layers)
    if not units:
        raise InputError("no linear of this model can be quantized", "its widths fit no group size of 128, 64 or 32")
    weights = sum(x.weights for unit in units for x in unit.linears)
    smallest = tuple(unit.choices.costs.index(min(unit.choices.costs)) for unit in units)
    other = file_bytes(_specs(units, smallest)) * 8 - sum(min(unit.choices.costs) for unit in units)
    while True:  # shard headers grow by a few digits with the sizes they list: then count them again
        account = _Account(budget, weights, trace.parameters, other)
        solution, reason = _fit(units, account)
        specs = _specs(units, solution.chosen)
        size = file_bytes(specs)
        exact = size * 8 - solution.cost
        if budget.kind == "linears" or exact <= other:
            break
        other = exact
    return BitAllocation(
        assigned=tuple(Assigned(linear=name, spec=spec) for name, spec in specs.items()),
        kept=_kept(trace, layers),
        fallbacks=_fallbacks(specs, trace, group_size),
        budget=budget.text,
        budget_bits=account.available,
        storage_bits=solution.cost,
        bits_per_weight=solution.cost / weights,
        file_bytes=size,
        file_bits_per_weight=size * 8 / trace.parameters,
        expected_damage=solution.damage,
        lower_bound=solution.bound,
        status="optimal" if solution.optimal else "gap",
        under_budget_reason=reason,
    )


def priced(allocation: BitAllocation, scores: Scores, best: BitAllocation) -> BitAllocation:
    """An allocation found another way, with its damage under `scores` and the bound that `best` proved for them."""
    damages = {(layer.linear, c.spec): c.damage for layer in scores.layers for c in layer.candidates}
    damage = math.fsum(damages[a.linear, a.spec] for a in allocation.assigned)
    proven = damage <= best.lower_bound * (1 + 1e-9)
    status = "optimal" if proven else "gap"
    changes = {"expected_damage": damage, "lower_bound": min(best.lower_bound, damage), "status": status}
    return allocation.model_copy(update=changes)


def with_widths(scores: Scores, widths: tuple[int, ...]) -> Scores:
    """The same scores with fewer candidates."""
    layers = tuple(
        layer.model_copy(update={"candidates": tuple(c for c in layer.candidates if c.spec.bits in widths)})
        for layer in scores.layers
    )
    return scores.model_copy(update={"layers": layers})


def narrower_widths(allocation: BitAllocation, bits: tuple[int, ...], trace: ModelTrace) -> tuple[tuple[int, ...], ...]:
    """Sets of adjacent widths around the mean width of an allocation: two of them, and three."""
    sizes = {linear.name: linear.weights for linear in trace.linears}
    total = sum(sizes[a.linear] for a in allocation.assigned)
    mean = sum(sizes[a.linear] * a.spec.bits for a in allocation.assigned) / total
    ordered = sorted(set(bits))
    below = max((place for place, width in enumerate(ordered) if width <= mean), default=0)
    pairs = (tuple(ordered[below : below + 2]), tuple(ordered[below : below + 3]))
    return tuple(dict.fromkeys(found for found in pairs if len(found) > 1 and found != tuple(ordered)))
