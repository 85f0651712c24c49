"""Which formats each linear could get: the widths of the recipe, narrowed and pinned by name."""

import difflib
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial

from llmcompress.compress import formats
from llmcompress.compress.allocate.spend import narrow
from llmcompress.compress.formats import Maker
from llmcompress.errors import InputError
from llmcompress.plugins import nearest
from llmcompress.recipes import PlanPart, check_widths
from llmcompress.spec import PER_ROW
from llmcompress.types import LinearInfo, LinearSpec, ModelTrace, QuantizerOptions

Candidates = dict[str, tuple[LinearSpec, ...]]


def _specs(linear: LinearInfo, widths: Iterable[int], make: Maker) -> tuple[LinearSpec, ...]:
    """A format for each width, narrowest first; none where no group size divides the linear's inputs."""
    found = [make(width, linear.columns) for width in sorted(set(widths))]
    return tuple(spec for spec in found if spec is not None)


def integers(group_size: int) -> Maker:
    """Symmetric integers: what a quantizer makes that does not say otherwise."""
    return partial(formats.integers, group_size=group_size, options=QuantizerOptions())


def tie_experts(trace: ModelTrace, scope: str, make: Maker) -> ModelTrace:
    """The trace with all experts of the model in one unit where `scope` is `model`, those of a block otherwise.

    Formats by rows differ with the number of inputs: of what `make` makes so, linears of one size share a unit.
    """
    spec = make(8, 64 * 128)
    by_rows = spec is not None and spec.kind in PER_ROW

    def tied(linear: LinearInfo) -> LinearInfo:
        if linear.expert is None:
            return linear
        unit = "experts" if scope == "model" else linear.unit
        return linear.model_copy(update={"unit": f"{unit}#{linear.columns}" if by_rows else unit})

    blocks = tuple(b.model_copy(update={"linears": tuple(map(tied, b.linears))}) for b in trace.blocks)
    return trace.model_copy(update={"blocks": blocks})


def _unit_specs(unit: list[LinearInfo], widths: Iterable[int], make: Maker) -> Candidates:
    """The formats of the linears of a unit; experts have one group size, which divides the inputs of them all."""
    if unit[0].expert is None:
        return {linear.name: _specs(linear, widths, make) for linear in unit}
    shared = unit[0].model_copy(update={"columns": math.gcd(*(linear.columns for linear in unit))})
    return dict.fromkeys((linear.name for linear in unit), _specs(shared, widths, make))


def candidates_for(trace: ModelTrace, bits: tuple[int, ...], group_size: int) -> Candidates:
    """The formats each linear of the blocks could get; a linear whose width no group size divides gets none."""
    found = {linear.name: _specs(linear, bits, integers(group_size)) for linear in trace.linears}
    return {name: specs for name, specs in found.items() if specs}


def matches(name: str, linear: LinearInfo) -> bool:
    """Whether a name in a recipe stands for a linear: full name, last component, or pattern on the full name."""
    return name in (linear.name, linear.name.rpartition(".")[2]) or fnmatchcase(linear.name, name)


def _units(trace: ModelTrace) -> list[list[LinearInfo]]:
    """The linears by fused unit, the head last."""
    units: dict[str, list[LinearInfo]] = {}
    for linear in trace.every:
        units.setdefault(linear.unit, []).append(linear)
    return list(units.values())


def _check_made(part: PlanPart, make: Maker) -> None:
    """Raises InputError where the recipe asks only for widths the quantizer has no format for."""
    made = formats.widths_of_maker(make, part.group_size)
    lists = {"bits": part.bits} | {f"candidates.{name}": widths for name, widths in part.candidates.items()}
    lists |= {f"pin.{name}": (width,) for name, width in part.pin.items()}
    for key, widths in lists.items():
        if not set(widths) & set(made):
            can = ", ".join(map(str, made))
            raise InputError(
                f"plan.{key}: {list(widths)}: the quantizer has no format of such a width", f"it can make: {can} bits"
            )


def _check_names(trace: ModelTrace, part: PlanPart, make: Maker) -> None:
    """Every name in a recipe must stand for a linear of this model, a pinned one for one that can be quantized."""
    tables: tuple[tuple[str, Mapping[str, object]], ...] = (("pin", part.pin), ("candidates", part.candidates))
    for key, table in tables:
        for name in table:
            found = [linear for linear in trace.every if matches(name, linear)]
            if not found:
                raise InputError(f"plan.{key}.{name}: no linear of this model has that name", _nearest(name, trace))
            made = formats.widths_of_maker(make, part.group_size)
            if not any(_specs(linear, made, make) for linear in found):
                what = (
                    f"plan.{key}.{name}: {found[0].columns} inputs are not divisible by a group size of 128, 64 or 32"
                )
                raise InputError(what, "leave it out: it stays at the source precision")


def _nearest(name: str, trace: ModelTrace) -> str:
    """A hint with the nearest names; all last components where nothing is near."""
    last = tuple(dict.fromkeys(linear.name.rpartition(".")[2] for linear in trace.every))
    full = [linear.name for linear in trace.every]
    close = difflib.get_close_matches(name, [*last, *full], n=3, cutoff=0.5)
    tied = "" if trace.head else " (the head has no weight of its own here: it stays as it is)"
    return nearest(name, tuple(close) or last) + tied


def _pinned(unit: list[LinearInfo], part: PlanPart) -> int | None:
    """The width a unit is pinned to, if any. Raises InputError for two that disagree."""
    pins = {name: width for name, width in part.pin.items() if any(matches(name, linear) for linear in unit)}
    if len(set(pins.values())) > 1:
        said = ", ".join(f"{name}={width}" for name, width in pins.items())
        names = "+".join(linear.name for linear in unit)
        raise InputError(f"plan.pin: {said} disagree about {names}", "linears that are fused share one width")
    return next(iter(pins.values()), None)


def _listed(unit: list[LinearInfo], part: PlanPart) -> set[int] | None:
    """The widths that all lists matching a unit allow, None where none matches. Raises InputError for no width."""
    lists = {n: set(widths) for n, widths in part.candidates.items() if any(matches(n, linear) for linear in unit)}
    if not lists:
        return None
    common = set.intersection(*lists.values())
    if not common:
        said, names = ", ".join(lists), "+".join(linear.name for linear in unit)
        raise InputError(f"plan.candidates: {said} have no width in common for {names}", "let their lists overlap")
    return common


def resolve(
    trace: ModelTrace,
    plan_part: PlanPart,
    whole_file: bool,
    *,
    make: Maker | None = None,
    make_experts: Maker | None = None,
) -> Candidates:
    """The formats each linear could get, by name; a linear that is absent stays at the source precision.

    A pin leaves one width and goes before a list, a list goes before `bits`; what is said of one member of a
    fused unit holds for the unit, and where several lists match, the widths they all allow remain. The head
    is there when it is pinned, or when `whole_file` says that the budget counts its bytes. `make` is what the
    quantizer makes of a linear at a width, symmetric integers where not given; widths it does not make are left out.
    `make_experts` is the same for experts, `make` where not given.

    Raises InputError for a name that stands for no linear, a width outside 2 to 8 or one that the quantizer does not
    make, or rules that disagree.
    """
    make = make or integers(plan_part.group_size)
    check_widths(plan_part, "recipe")
    _check_made(plan_part, make)
    _check_names(trace, plan_part, make)
    found: Candidates = {}
    for unit in _units(trace):
        pin, listed = _pinned(unit, plan_part), _listed(unit, plan_part)
        is_head = trace.head in unit
        if is_head and pin is None and not whole_file:
            continue
        usual = plan_part.head_bits if is_head else plan_part.bits
        widths = (pin,) if pin is not None else usual if listed is None else listed
        maker = (make_experts or make) if unit[0].expert is not None else make
        found |= {name: specs for name, specs in _unit_specs(unit, widths, maker).items() if specs}
    if trace.head is not None and trace.head.name in found:  # what the head reads is left as it is
        plain = (spec.model_copy(update={"inputs": None}) for spec in found[trace.head.name])
        found[trace.head.name] = tuple(plain)
    return found


def narrowed(candidates: Mapping[str, tuple[LinearSpec, ...]], widths: tuple[int, ...]) -> Candidates:
    """Fewer candidates: those of `widths`; a linear that would be left with none, as a pinned one, keeps all."""
    return {name: tuple(spec for spec in specs if spec.bits in widths) or specs for name, specs in candidates.items()}


def sparing(candidates: Mapping[str, tuple[LinearSpec, ...]], spared: Mapping[str, str]) -> Candidates:
    """The candidates without those of some linears."""
    return {name: specs for name, specs in candidates.items() if name not in spared}


def broken(trace: ModelTrace, tensors: Sequence[str]) -> dict[str, str]:
    """The linears of tensors with NaN or infinity, those that share a format with them, and what is said of each."""
    first: dict[str, LinearInfo] = {}
    for linear in trace.every:
        if linear.tensor in tensors:
            first.setdefault(linear.unit, linear)
    said = {x.name: f"shares its format with {first[x.unit].name}, which has NaN or infinity" for x in trace.every
            if x.unit in first}  # fmt: skip
    return said | {x.name: "NaN or infinity in its weights" for x in trace.every if x.tensor in tensors}


def unformatted(trace: ModelTrace, resolved: Collection[str], fitted: Collection[str], runtime: str) -> dict[str, str]:
    """What is said of linears of the blocks for which there is no format, or none that `runtime` takes."""
    found = {x.name: narrow(x) for x in trace.linears if x.name not in resolved}
    return found | {name: f"{runtime} takes no format of it" for name in resolved if name not in fitted}
