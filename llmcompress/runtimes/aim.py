"""Plan for a runtime: which formats a linear may get so that the runtime opens the result, packed or exactly."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from llmcompress.errors import InputError
from llmcompress.runtimes import Layout, Runtime, Terms, find_runtime, table
from llmcompress.runtimes.answers import Answer, Subject, answer_for, refusal, weight_of
from llmcompress.spec import LinearSpec
from llmcompress.types import LinearInfo, ModelTrace

ANY = "any"
Formats = Mapping[str, tuple[LinearSpec, ...]]


def terms_for(runtime: Runtime, layout: Layout) -> tuple[Terms, ...]:
    """All terms a linear has to meet to reach the runtime in a layout: its own, and those of the export to it."""
    door = runtime.door(layout)
    exports = tuple(entry.exact for entry in table().exports if entry.layout == layout)
    written = any(entry.layout == layout for entry in table().layouts)
    return (*(() if door is None else (door.terms,)), *(() if written else exports))


def _fault(runtime: Runtime, unit: list[LinearInfo], spec: LinearSpec) -> str | None:
    """Why a fused unit cannot have a format, None where it can in some layout."""
    if spec.bits not in runtime.plan.bits:
        return f"{spec.bits} bits, where plans have {', '.join(map(str, runtime.plan.bits))}"
    weights = tuple(weight_of(x, spec) for x in unit)
    why = None
    for layout in runtime.plan.layouts:
        subject = Subject("", layout, weights)
        faults = [refusal(_of_linears(terms), subject) for terms in terms_for(runtime, layout)]
        why = next((fault for fault in faults if fault is not None), None)
        if why is None:
            return None
    return why


def _of_linears(terms: Terms) -> Terms:
    """The terms without what they say of the whole model."""
    return terms.model_copy(update={"families": None, "uniform": False})


def fitting(name: str, trace: ModelTrace, candidates: Formats) -> dict[str, tuple[LinearSpec, ...]]:
    """Of the formats each linear could get, those that the runtime takes from it and from what it fuses it with.

    A linear left with none stays at the source precision. Raises InputError for a family that the runtime does not
    open, and where no linear is left.
    """
    if name == ANY:
        return dict(candidates)
    runtime = find_runtime(name)
    families = _families(runtime)
    if families is not None and trace.model_type not in families:
        raise InputError(
            f"{runtime.words} opens {', '.join(families)}, and this is a {trace.model_type} model",
            f"plan for another runtime than {runtime.name}",
        )
    units: dict[str, list[LinearInfo]] = {}
    for linear in trace.every:
        if linear.name in candidates:
            units.setdefault(linear.unit, []).append(linear)
    found: dict[str, tuple[LinearSpec, ...]] = {}
    why = ""
    for unit in units.values():
        faults = {spec: _fault(runtime, unit, spec) for x in unit for spec in candidates[x.name]}
        why = why or next((fault for fault in faults.values() if fault is not None), "")
        for x in unit:
            if specs := tuple(spec for spec in candidates[x.name] if faults[spec] is None):
                found[x.name] = specs
    if candidates and not found:
        raise InputError(f"no linear of this model can be stored for {runtime.words}: {why}", _advice(runtime))
    return found


def _families(runtime: Runtime) -> tuple[str, ...] | None:
    doors = [door.terms.families for layout in runtime.plan.layouts if (door := runtime.door(layout)) is not None]
    return None if None in doors or not doors else tuple(name for names in doors for name in names or ())


def _advice(runtime: Runtime) -> str:
    every = [terms for layout in runtime.plan.layouts for terms in terms_for(runtime, layout)]
    kinds = {kind for terms in every for kind in terms.kinds or ()}
    if kinds and kinds <= {"nf4", "fp4"}:
        return "use --recipe nf4, or plan for another runtime"
    return "use a quantizer of symmetric integers such as gptq, or plan for another runtime"


@contextmanager
def advising(name: str) -> Iterator[None]:
    """Refusals inside say that the runtime leaves fewer formats to choose from, and that another may leave more."""
    try:
        yield
    except InputError as error:
        if name == ANY:
            raise
        runtime = find_runtime(name)
        widths = ", ".join(map(str, runtime.plan.bits))
        what = f"{error.what}, for {runtime.words}, which leaves widths of {widths} bits"
        raise InputError(what, f"{error.hint.partition(', or allow')[0]}, or plan for another runtime") from None


def promised(name: str, subject: Subject) -> Answer | None:
    """What the runtime planned for makes of the outcome. Raises InputError where it would not open it."""
    if name == ANY:
        return None
    runtime = find_runtime(name)
    reasons = []
    for layout in runtime.plan.layouts:
        answer = answer_for(runtime, subject, layout)
        if answer is not None and answer.loads and answer.exact:
            return answer
        reasons.append("" if answer is None else answer.reason)
    why = next((reason for reason in reasons if reason), "its formats have no place there")
    raise InputError(f"{runtime.words} would not open this plan: {why}", _advice(runtime))
