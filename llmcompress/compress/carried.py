"""A plan as it could be carried out: what had to be left at the source precision counts as kept."""

from collections.abc import Sequence

from llmcompress.compress.group import LEFT
from llmcompress.compress.shards import ShardMap
from llmcompress.errors import InputError
from llmcompress.types import BitAllocation, BlockOutcome, Kept, ModelTrace, Plan


def carried_out(plan: Plan, outcomes: Sequence[BlockOutcome], trace: ModelTrace, shards: ShardMap) -> Plan:
    """The plan with the linears that no outcome rounded among those kept, its sizes counted again.

    What the budget allowed the quantized linears stays as it was. Raises InputError where nothing is left to quantize.
    """
    rounded = {linear.linear for outcome in outcomes for linear in outcome.linears}
    left = [a.linear for a in plan.allocation.assigned if a.linear not in rounded]
    if not left:
        return plan
    reasons = {note.where: note.reason for outcome in outcomes for note in outcome.fallbacks}
    kept = tuple(Kept(linear=name, reason=reasons[name].removesuffix(f": {LEFT}")) for name in left)
    fields = {name: getattr(plan, name) for name in Plan.model_fields}
    return Plan(**fields | {"allocation": _without(plan, kept, trace, shards)})


def _without(plan: Plan, kept: tuple[Kept, ...], trace: ModelTrace, shards: ShardMap) -> BitAllocation:
    before, names = plan.allocation, {one.linear for one in kept}
    assigned = tuple(a for a in before.assigned if a.linear not in names)
    if not assigned:
        raise InputError("no linear of this model could be quantized", kept[0].reason)
    sizes = {linear.name: linear for linear in trace.every}
    bits = sum(a.spec.storage_bits(sizes[a.linear].rows, sizes[a.linear].columns) for a in assigned)
    size = shards.file_bytes(plan.specs, names)
    changes = {
        "assigned": assigned,
        "kept": (*before.kept, *kept),
        "fallbacks": tuple(note for note in before.fallbacks if note.where not in names),
        "storage_bits": bits,
        "bits_per_weight": bits / sum(sizes[a.linear].weights for a in assigned),
        "file_bytes": size,
        "file_bits_per_weight": size * 8 / trace.parameters,
    }
    return before.model_copy(update=changes)


def difference(planned: Plan, plan: Plan, *, whole_file: bool) -> str:
    """What became of a plan, in a sentence; empty where all of it was carried out. `whole_file`: so is the budget."""
    left = [a.linear for a in planned.allocation.assigned if a.linear not in plan.specs]
    if not left:
        return ""
    names = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
    more = plan.allocation.file_bytes - planned.allocation.file_bytes
    spare = planned.allocation.budget_bits - planned.allocation.storage_bits
    asked = ", and more than asked" if whole_file and more * 8 > spare else ""
    return f"{len(left)} linear(s) could not be quantized ({names}): {more:,} bytes more than planned{asked}"
