"""`prune`: trace, rank, choose by measured KL, write, reopen and compare, publish by one rename."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from llmcompress import __version__
from llmcompress.compress.journal import Journal, check_output
from llmcompress.compress.memory import kept_to, prune_stages
from llmcompress.compress.output import Origin, copy_side_files, file_records
from llmcompress.compress.pipeline import Opened, calibration, open_model, probe_tokens, score_job
from llmcompress.compress.prune.card import model_card
from llmcompress.compress.prune.choose import Chooser, Measure, Search, choose
from llmcompress.compress.prune.halves import Half
from llmcompress.compress.prune.measure import removal_damage
from llmcompress.compress.prune.records import RECORD_NAME, PruneRecord, RemovalStep
from llmcompress.compress.prune.units import Scope, Units, find_units
from llmcompress.compress.prune.write import Writing, check_pruned, write_pruned
from llmcompress.compress.run import environment
from llmcompress.compress.scoring import SCORERS, Measured, run_scorers
from llmcompress.compress.statistics import mean, or_limit, standard_error, upper_bound
from llmcompress.errors import InputError
from llmcompress.files import commit_bytes, commit_json
from llmcompress.hub.source import Source
from llmcompress.model.checkpoint import folder_bytes
from llmcompress.model.text import Batches
from llmcompress.plugins import find
from llmcompress.recipes import Recipe

MEASURED = "kl"  # ranked by measured removals of single blocks
VOIDS = "voids"
FREE = 1e-3  # nats per token: what a block that does nothing may cost


@dataclass(frozen=True)
class PruneRequest:
    """Everything `prune` was told.

    sublayers    halves of blocks are removed in place of blocks; `pairs` also tries both of a block at once
    by           a scorer, or `kl`
    count, keep  blocks to remove, or the share that stays; neither removes as many as `max_kld` lets
    max_kld      limit of the KL's upper bound, nats per token
    exclude      blocks that stay
    output       None to look only
    max_memory   bytes to keep to, see `kept_to`
    """

    source: Source
    output: Path | None
    recipe: Recipe
    device: str
    command: str
    by: str = VOIDS
    count: int | None = None
    keep: float | None = None
    max_kld: float | None = None
    exclude: tuple[int, ...] = ()
    search: Search = field(default_factory=Search)
    force: bool = False
    sublayers: bool = False
    pairs: bool = False
    max_memory: int | None = None

    @property
    def limit(self) -> float | None:
        """What the upper bound of the KL may be, None where a count decides."""
        return FREE if self.count is None and self.max_kld is None else self.max_kld


@dataclass(frozen=True)
class Ranked:
    """How blocks rank, the least important to be looked at first, and the figures behind it."""

    importance: tuple[float, ...]
    measured: Measured


@dataclass(frozen=True)
class Pruned:
    """What was decided, and written where there is an output; `nothing` says why a look found nothing to remove."""

    record: PruneRecord
    directory_bytes: int | None
    nothing: InputError | None = None


@dataclass(frozen=True)
class _Facts:
    """What was read: the text, the model's digest, and what can be removed."""

    batches: Batches
    model_digest: str
    units: Units
    blocks: int


Event = str | Ranked | RemovalStep | Pruned


def block_importance(measured: Measured, blocks: Sequence[Sequence[str]], by: str) -> tuple[float, ...]:
    """One figure per block from a scorer's findings; `blocks` are the linears of each.

    For voids the larger usage of the two phases: a block that either phase needs is needed. Raises InputError for a
    scorer that says nothing about some block.
    """
    usage = [series.values for series in measured.series if series.name.startswith("usage ")]
    if by == VOIDS and usage:
        return tuple(max(values) for values in zip(*usage, strict=True))
    values: dict[str, float] = {}
    for layer in measured.layers:
        damages = sorted(candidate.damage for candidate in layer.candidates)
        middle = damages[len(damages) // 2] if damages else None
        value = layer.importance if layer.importance is not None else middle
        if value is not None:
            values[layer.linear] = value
    found = [[values[name] for name in names if name in values] for names in blocks]
    if not all(found):
        raise InputError(f"--by {by}: nothing is known of block {found.index([])}", "rank by voids or kl")
    return tuple(sum(each) / len(each) for each in found)


def prune(request: PruneRequest) -> Iterator[Event]:
    """Run it, yielding stages, the ranking, every step of the search, and what came of it.

    Raises InputError where the input is at fault, or where a result is to be written and nothing can be removed
    within the limits.
    """
    if request.by != MEASURED:
        find(SCORERS, request.by)
    if request.output is not None:
        check_output(request.output, request.source.path, request.force)
    yield "opening"
    opened = open_model(request.source, request.recipe, request.device)
    request, said = _bounded(request, opened)
    yield said or "reading weights and text"
    units = _units(request, opened)
    request = _counted(request, units)
    digest = opened.digest()
    batches = calibration(opened, request.recipe)
    choosing, judging = texts(batches, request.recipe)
    memory = request.recipe.score.swaps.memory_mb << 20

    def measure(sets: Sequence[frozenset[int]], batches: Sequence[Tensor] = choosing) -> Tensor:
        removals = list(map(units.removal, sets))
        return removal_damage(opened.skeleton, removals, batches, memory_bytes=memory, halves=units.halves).kld

    yield f"ranking by {request.by}"
    ranked = _rank(request, opened, batches, measure=measure, units=units)
    yield ranked
    yield f"measuring what removing {'halves of ' * request.sublayers}blocks costs"
    chooser = Chooser(measure, ranked.importance, request.search, exclude=units.exclude, pairs=units.pairs)
    steps = []
    for step in choose(chooser, count=request.count, max_kld=request.limit):
        steps.append(step)
        yield units.named(step)
    nothing = None if steps else _nothing(units.named(chooser.cheapest()), request.limit, request.sublayers)
    if nothing is not None and request.output is not None:
        raise nothing
    final = measure([_places(steps)], judging)[0].tolist() if steps else [0.0] * sum(map(len, judging))
    facts = _Facts(batches, digest, units, len(opened.trace.blocks))
    record = _record(request, steps, chooser, final, ranked=ranked, facts=facts)
    size = None
    if request.output is not None:
        yield "writing and opening again"
        writing = Writing(opened.skeleton, units.removal(_places(steps)), units.halves)
        size = _publish(request, request.output, writing, record, probe=probe_tokens(opened, request.recipe.seed))
    yield Pruned(record, size, nothing)


def _bounded(request: PruneRequest, opened: Opened) -> tuple[PruneRequest, str]:
    """The request that keeps to its limit of memory, and what is done about it."""
    scorers = () if request.by == MEASURED else (request.by,)
    recipe, said = kept_to(opened, request.recipe, request.max_memory, lambda r: prune_stages(opened, r, scorers))
    return replace(request, recipe=recipe), said


def _rank(request: PruneRequest, opened: Opened, batches: Batches, *, measure: Measure, units: Units) -> Ranked:
    if request.by == MEASURED:
        places = [place for place in range(len(units.units)) if place not in units.exclude]
        klds = measure([frozenset({place}) for place in places]).mean(1).tolist()
        known = dict(zip(places, klds, strict=True))
        return Ranked(tuple(known.get(place, max(klds)) for place in range(len(units.units))), Measured(()))
    found = run_scorers((request.by,), score_job(opened, request.recipe, batches))[request.by]
    importance = block_importance(found, units.names, request.by)
    if len(importance) < len(units.units):  # of blocks: both halves of one have its figure
        importance = tuple(importance[unit if isinstance(unit, int) else unit.block] for unit in units.units)
    return Ranked(importance, found)


def _units(request: PruneRequest, opened: Opened) -> Units:
    """What can be removed."""
    scope = Scope(request.sublayers, request.pairs, frozenset(request.exclude))
    return find_units(opened.skeleton, opened.trace, scope)


def _counted(request: PruneRequest, units: Units) -> PruneRequest:
    """The request with a count in place of a share. Raises InputError where it does not fit the model."""
    every, word = len(units.units), "halves of blocks" if request.sublayers else "blocks"
    staying = len(units.exclude) - sum(unit in units.earlier for unit in units.units)
    most = every - len(units.exclude) - (not staying)  # one always stays
    if most < 1:
        raise InputError(f"none of {every} {word} may be removed", "exclude fewer; one always stays")
    if request.keep is not None:
        count = int(every * (1 - request.keep) + 1e-9)
        if not count:
            raise InputError(f"--keep {request.keep:g} of {every} {word} removes none", "keep less")
        request = replace(request, count=count, keep=None)
    if request.count is not None and not 0 < request.count <= most:
        raise InputError(f"cannot remove {request.count} of {every} {word}", f"ask for 1 to {most}")
    return request


def _places(steps: Sequence[RemovalStep]) -> frozenset[int]:
    """What the search ended with."""
    return frozenset(map(int, steps[-1].removed)) if steps else frozenset()


def texts(batches: Batches, recipe: Recipe) -> tuple[list[Tensor], list[Tensor]]:
    """Token batches to choose by, and others to judge by; the same where there is only one sequence."""
    rows, size = batches.tokens, recipe.calibration.batch_size
    cut = max(min(recipe.calibration.score_samples, len(rows) // 2), 1)
    return list(torch.split(rows[:cut], size)), list(torch.split(rows[cut:] if len(rows) > cut else rows, size))


def _nothing(step: RemovalStep, limit: float | None, sublayers: bool) -> InputError:
    name, kld, upper = step.removed[0], step.kld, step.upper
    what, option = ("half", "--halves") if sublayers else ("block", "--blocks")
    return InputError(
        f"no {what} can be removed within KL {limit:g}: {what} {name} costs the least, {kld:.4g} (at most {upper:.4g})",
        f"ask for {option} 1{or_limit(upper)}",
    )


def _record(
    request: PruneRequest,
    steps: Sequence[RemovalStep],
    chooser: Chooser,
    klds: list[float],
    *,
    ranked: Ranked,
    facts: _Facts,
) -> PruneRecord:
    units = facts.units
    single = {units.units[next(iter(s))]: mean(values) for s, values in chooser.measured.items() if len(s) == 1}
    removal = units.removal(_places(steps))
    return PruneRecord(
        llmcompress=__version__,
        origin=Origin.of(request.source, facts.model_digest),
        command=request.command,
        by=request.by,
        importance=ranked.importance,
        series=ranked.measured.series,
        single={unit: kld for unit, kld in sorted(single.items()) if isinstance(unit, int)},
        single_halves={str(unit): kld for unit, kld in sorted(single.items()) if isinstance(unit, Half)},
        steps=tuple(map(units.named, steps)),
        removed=tuple(sorted(unit for unit in removal if isinstance(unit, int))),
        halves=tuple(map(str, sorted(unit for unit in removal if isinstance(unit, Half)))),
        blocks=facts.blocks,
        kld=mean(klds),
        standard_error=standard_error(klds) if len(klds) > 1 else 0.0,
        upper=upper_bound(klds) if len(klds) > 1 else mean(klds),
        sequences=len(klds),
        calibration=facts.batches.source,
        calibration_digest=facts.batches.digest,
        seed=request.recipe.seed,
        environment=environment(),
    )


def _publish(request: PruneRequest, output: Path, writing: Writing, record: PruneRecord, *, probe: Tensor) -> int:
    """Write everything aside, compare, and let it appear at once; returns its size in bytes."""
    journal = Journal(output)
    with journal.in_one_go():
        check_output(output, request.source.path, request.force)
        journal.prepare()
        folder = journal.partial
        write_pruned(writing, folder)
        check_pruned(writing, folder, probe)
        copy_side_files(request.source.path, folder)
        commit_bytes(folder / "README.md", model_card(record).encode())
        record = record.model_copy(update={"files": file_records(folder)})
        commit_json(folder / RECORD_NAME, record.model_dump(mode="json"))
        size = folder_bytes(folder)
        journal.publish(request.force)
    return size
