"""Will it load there? Answers for a checkpoint that is there, or that a plan would make."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from llmcompress.runtimes import Export, Layout, Runtime, Terms, Weight, table
from llmcompress.spec import PER_ROW, LinearSpec, Noun
from llmcompress.types import LinearInfo, ModelTrace, QuantizerOptions

AS_WRITTEN = "as written"
DEQUANTIZED = "dequantized"
EXPERTS = -1
CacheWord = Literal["none", "int8", "fp8"]


class Answer(Noun):
    """What one runtime makes of a checkpoint: as it is written, or as an export.

    packed    weights stay in their codes while it runs; otherwise they are decompressed
    exact     weights are those of the checkpoint, not rounded once more
    reason    why it does not load, or what becomes of weights that are not carried over exactly
    checked   whether this version was run by us, or its source read; `needs` what else has to be there
    """

    runtime: str
    version: str
    how: str
    loads: bool
    packed: bool = False
    exact: bool = True
    reason: str = ""
    needs: str = ""
    checked: Literal["run", "read", ""] = ""

    @property
    def words(self) -> str:
        """The verdict, in a few words."""
        if not self.loads:
            return "refused"
        return "runs packed" if self.packed else "loads, decompressed"

    @property
    def remark(self) -> str:
        """Everything else."""
        parts = [self.reason, f"needs {self.needs}" if self.needs else ""]
        parts.append("from its source, not run" if self.loads and self.checked == "read" else "")
        return "; ".join(part for part in parts if part)


@dataclass(frozen=True)
class Subject:
    """A checkpoint, or a plan for one. `softmax` says that attention weights are rounded; `plain` that nothing is."""

    family: str
    layout: Layout
    weights: tuple[Weight, ...]
    cache: CacheWord = "none"
    softmax: bool = False


def weights_of(trace: ModelTrace, specs: Mapping[str, LinearSpec]) -> tuple[Weight, ...]:
    """The linears of a model that get a format."""
    return tuple(weight_of(x, specs[x.name]) for x in trace.every if x.name in specs)


def weight_of(linear: LinearInfo, spec: LinearSpec) -> Weight:
    """A linear of a model in a format."""
    return Weight(
        name=linear.name,
        spec=spec,
        rows=linear.rows,
        columns=linear.columns,
        transposed=linear.transposed,
        expert=linear.expert is not None,
    )


def planned(trace: ModelTrace, specs: Mapping[str, LinearSpec], options: QuantizerOptions) -> Subject:
    """The checkpoint that a plan makes."""
    weights, softmax = weights_of(trace, specs), options.softmax != "none"
    layout = layout_of(weights, options.kv_cache, softmax)
    return Subject(trace.model_type, layout, weights, options.kv_cache, softmax)


def layout_of(weights: tuple[Weight, ...], cache: CacheWord = "none", softmax: bool = False) -> Layout:
    """The layout `quantize` writes: the most widely opened one that holds all formats; plain where there are none."""
    for entry in table().layouts if weights else ():
        if refusal(entry.terms, Subject("", entry.layout, weights, cache, softmax)) is None:
            return entry.layout
    return "plain"


def refusal(terms: Terms, subject: Subject) -> str | None:
    """Why a checkpoint does not meet the terms, None where it does."""
    faults = Counter(found for weight in subject.weights if (found := terms.fault(weight)) is not None)
    if faults:
        words, count = faults.most_common(1)[0]
        return f"{count} of {len(subject.weights)} linears: {words}"
    return _refusal_of_model(terms, subject) or _refusal_of_units(terms, subject)


def _refusal_of_model(terms: Terms, subject: Subject) -> str | None:
    if terms.families is not None and subject.family not in terms.families:
        return f"a {subject.family} model, where it opens {', '.join(terms.families)}"
    if subject.cache not in terms.caches:
        return f"keys and values rounded to {subject.cache}"
    if subject.softmax and not terms.softmax:
        return "attention weights are rounded"
    formats = {_any_columns(weight.spec) for weight in subject.weights}
    if terms.uniform and len(formats) > 1:
        return "formats differ between linears, where it opens one for all"
    return None


def _any_columns(spec: LinearSpec) -> LinearSpec:
    return spec.model_copy(update={"group_size": 0}) if spec.kind in PER_ROW else spec


def _refusal_of_units(terms: Terms, subject: Subject) -> str | None:
    for unit in units_of(terms, subject.weights):
        if len({_any_columns(weight.spec) for weight in unit}) > 1:
            leaves = ", ".join(dict.fromkeys(weight.name.rpartition(".")[2] for weight in unit))
            names = f"experts of one {terms.experts}" if unit[0].expert else leaves
            return f"{names} are fused there, and their formats differ"
        rows = sum(weight.rows for weight in unit)
        if rows % terms.rows and unit[0].spec.kind not in PER_ROW:
            return f"{unit[0].name}: {rows} outputs, where it wants multiples of {terms.rows}"
    return None


def units_of(terms: Terms, weights: tuple[Weight, ...]) -> Iterator[tuple[Weight, ...]]:
    """Linears by what the runtime fuses; all others alone."""
    fused: dict[tuple[str, int], list[Weight]] = {}
    for weight in weights:
        if weight.expert and terms.experts != "any":
            scope = weight.name.partition(".experts.")[0] if terms.experts == "block" else ""
            fused.setdefault((scope, EXPERTS), []).append(weight)
            continue
        parent, _, leaf = weight.name.rpartition(".")
        place = next((i for i, names in enumerate(terms.fused) if leaf in names), None)
        if place is None:
            yield (weight,)
        else:
            fused.setdefault((parent, place), []).append(weight)
    yield from (tuple(unit) for unit in fused.values())


def _as_written(runtime: Runtime, subject: Subject) -> Answer:
    door = runtime.door(subject.layout)
    answer = Answer(runtime=runtime.name, version=runtime.version, how=AS_WRITTEN, loads=False)
    if door is None:
        opens = ", ".join(door.layout for door in runtime.doors)
        return answer.model_copy(update={"reason": f"it opens {opens}, not {subject.layout}"})
    why = refusal(door.terms, subject)
    if why is not None:
        return answer.model_copy(update={"reason": why, "checked": door.checked})
    known = {"loads": True, "packed": door.packed, "needs": door.needs, "checked": door.checked}
    return answer.model_copy(update=known)


def _exported(runtime: Runtime, subject: Subject, export: Export) -> Answer | None:
    """What a runtime makes of an export of the checkpoint, None where it does not open it or there is none."""
    door = runtime.door(export.layout)
    if door is None or export.layout == subject.layout or subject.softmax or subject.cache != "none":
        return None
    if any(weight.spec.inputs is not None for weight in subject.weights):
        return None
    if export.exact.experts == "none" and any(weight.expert for weight in subject.weights):
        return None
    exact = refusal(export.exact, subject) is None
    if not exact and export.otherwise == "refused":
        return None
    if refusal(door.terms, subject if exact else _without_formats(subject)) is not None:
        return None
    return Answer(
        runtime=runtime.name,
        version=runtime.version,
        how=f"export --format {export.format}",
        loads=True,
        packed=door.packed and (exact or export.otherwise != DEQUANTIZED),
        exact=exact,
        reason="every weight carried over" if exact else _becomes(export, subject),
        needs=door.needs,
        checked=door.checked,
    )


def _without_formats(subject: Subject) -> Subject:
    """What a lossy export leaves to be asked: the family."""
    return Subject(subject.family, subject.layout, ())


def _becomes(export: Export, subject: Subject) -> str:
    changed = sum(1 for weight in subject.weights if export.exact.fault(weight) is not None) or len(subject.weights)
    return f"{changed} of {len(subject.weights)} linears {export.otherwise}"


def ask(subject: Subject) -> tuple[Answer, ...]:
    """Of every runtime: how it opens the checkpoint as written and, where not packed, the best export for it."""
    found = []
    for runtime in table().runtimes:
        first = _as_written(runtime, subject)
        found.append(first)
        if not (first.loads and first.packed) and subject.weights:
            exports = (_exported(runtime, subject, export) for export in table().exports)
            there = [answer for answer in exports if answer is not None]
            there = [answer for answer in there if not first.loads or (answer.packed and answer.exact)]
            if there:
                found.append(max(there, key=lambda answer: (answer.packed, answer.exact)))
    return tuple(found)


def answer_for(runtime: Runtime, subject: Subject, layout: str) -> Answer | None:
    """How a runtime opens the checkpoint in a layout: as written, or exported to it. None where neither is possible."""
    if layout == subject.layout:
        return _as_written(runtime, subject)
    return next((_exported(runtime, subject, export) for export in table().exports if export.layout == layout), None)


def rows_of(found: tuple[Answer, ...]) -> list[list[str]]:
    """The answers as rows of a table: runtime, how, verdict, remark."""
    titles: dict[str, str] = {runtime.name: runtime.words for runtime in table().runtimes}
    return [
        ["" if answer.how != AS_WRITTEN else titles[answer.runtime], answer.how, answer.words, answer.remark]
        for answer in found
    ]
