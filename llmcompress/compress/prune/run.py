"""`prune`: trace, rank, choose by measured KL, write, reopen and compare, publish by one rename."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from llmcompress import __version__
from llmcompress.compress.journal import Journal, check_output
from llmcompress.compress.output import Origin, copy_side_files
from llmcompress.compress.pipeline import Opened, calibration, open_model, probe_tokens, score_job
from llmcompress.compress.prune.card import model_card
from llmcompress.compress.prune.choose import Chooser, Measure, Search, choose
from llmcompress.compress.prune.measure import RemovalDamage, removal_damage
from llmcompress.compress.prune.records import PruneRecord, RemovalStep
from llmcompress.compress.prune.write import check_pruned, write_pruned
from llmcompress.compress.scoring import SCORERS, Measured, run_scorers
from llmcompress.compress.statistics import mean, standard_error, upper_bound
from llmcompress.errors import InputError
from llmcompress.files import commit_bytes, commit_json
from llmcompress.model.checkpoint import folder_bytes
from llmcompress.model.hub import Source
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.text import Batches
from llmcompress.plugins import find
from llmcompress.recipes import Recipe

RECORD_NAME = "pruning.json"
MEASURED = "kl"  # ranked by measured removals of single blocks
VOIDS = "voids"
FREE = 1e-3  # nats per token: what a block that does nothing may cost


@dataclass(frozen=True)
class PruneRequest:
    """Everything `prune` was told.

    by           a scorer, or `kl`
    count, keep  blocks to remove, or the share that stays; neither removes as many as `max_kld` lets
    max_kld      limit of the KL's upper bound, nats per token
    exclude      blocks that stay
    output       None to look only
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


@dataclass(frozen=True)
class Ranked:
    """How blocks rank, the least important to be looked at first, and the figures behind it."""

    importance: tuple[float, ...]
    measured: Measured


@dataclass(frozen=True)
class Pruned:
    """What was decided, and written where there is an output."""

    record: PruneRecord
    directory_bytes: int | None


@dataclass(frozen=True)
class _Facts:
    """What was read: the text, and the model's digest."""

    batches: Batches
    model_digest: str


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

    Raises InputError where the input is at fault or nothing can be removed within the limits.
    """
    if request.by != MEASURED:
        find(SCORERS, request.by)
    if request.output is not None:
        check_output(request.output, request.source.path, request.force)
    yield "opening"
    opened = open_model(request.source, request.recipe, request.device)
    blocks = len(opened.trace.blocks)
    request = _counted(request, blocks)
    digest = opened.digest()
    batches = calibration(opened, request.recipe)
    rows = batches.tokens
    cut = max(min(request.recipe.calibration.score_samples, len(rows) // 2), 1)
    choosing, judging = _split(rows[:cut], request), _split(rows[cut:] if len(rows) > cut else rows, request)
    memory = request.recipe.score.swaps.memory_mb << 20

    def measure(removals: Sequence[frozenset[int]]) -> Tensor:
        return removal_damage(opened.skeleton, removals, choosing, memory_bytes=memory).kld

    yield f"ranking by {request.by}"
    ranked = _rank(request, opened, batches, measure)
    yield ranked
    yield "measuring what removing blocks costs"
    chooser = Chooser(measure, ranked.importance, request.search, exclude=frozenset(request.exclude))
    limit = FREE if request.count is None and request.max_kld is None else request.max_kld
    steps = []
    for step in choose(chooser, count=request.count, max_kld=limit):
        steps.append(step)
        yield step
    if not steps:
        raise _nothing(chooser, limit)
    removed = frozenset(steps[-1].removed)
    final = removal_damage(opened.skeleton, [removed], judging, memory_bytes=memory)
    record = _record(request, steps, chooser, final, ranked=ranked, facts=_Facts(batches, digest))
    size = None
    if request.output is not None:
        yield "writing and opening again"
        probe = probe_tokens(opened, request.recipe.seed)
        size = _publish(request, request.output, opened.skeleton, record, probe=probe)
    yield Pruned(record, size)


def _rank(request: PruneRequest, opened: Opened, batches: Batches, measure: Measure) -> Ranked:
    if request.by == MEASURED:
        singles = [frozenset({block}) for block in range(len(opened.trace.blocks))]
        return Ranked(tuple(measure(singles).mean(1).tolist()), Measured(()))
    found = run_scorers((request.by,), score_job(opened, request.recipe, batches))[request.by]
    names = [[linear.name for linear in info.linears] for info in opened.trace.blocks]
    return Ranked(block_importance(found, names, request.by), found)


def _counted(request: PruneRequest, blocks: int) -> PruneRequest:
    """The request with a count in place of a share. Raises InputError where it does not fit the model."""
    if request.keep is not None:
        count = int(blocks * (1 - request.keep) + 1e-9)
        if not count:
            raise InputError(f"--keep {request.keep:g} of {blocks} blocks removes none", "keep less")
        request = replace(request, count=count, keep=None)
    if request.count is not None and not 0 < request.count <= blocks - 1 - len(set(request.exclude)):
        raise InputError(f"cannot remove {request.count} of {blocks} blocks", f"ask for 1 to {blocks - 1}")
    wrong = [block for block in request.exclude if not 0 <= block < blocks]
    if wrong:
        raise InputError(f"--exclude {wrong[0]}: there is no such block", f"blocks are numbered 0 to {blocks - 1}")
    return request


def _split(rows: Tensor, request: PruneRequest) -> list[Tensor]:
    return list(torch.split(rows, request.recipe.calibration.batch_size))


def _nothing(chooser: Chooser, limit: float | None) -> InputError:
    step = chooser.cheapest()
    block, kld, upper = step.removed[0], step.kld, step.upper
    return InputError(
        f"no block can be removed within KL {limit:g}: block {block} costs the least, {kld:.4g} (at most {upper:.4g})",
        f"ask for --blocks 1, or --max-kld {upper * 1.01:.2g}",
    )


def _record(
    request: PruneRequest,
    steps: Sequence[RemovalStep],
    chooser: Chooser,
    final: RemovalDamage,
    *,
    ranked: Ranked,
    facts: _Facts,
) -> PruneRecord:
    klds = final.kld[0].tolist()
    single = {next(iter(s)): mean(klds) for s, klds in chooser.measured.items() if len(s) == 1}
    return PruneRecord(
        llmcompress=__version__,
        origin=Origin.of(request.source, facts.model_digest),
        command=request.command,
        by=request.by,
        importance=ranked.importance,
        series=ranked.measured.series,
        single=dict(sorted(single.items())),
        steps=tuple(steps),
        removed=steps[-1].removed,
        blocks=chooser.blocks,
        kld=mean(klds),
        standard_error=standard_error(klds) if len(klds) > 1 else 0.0,
        upper=upper_bound(klds) if len(klds) > 1 else mean(klds),
        sequences=len(klds),
        calibration=facts.batches.source,
        calibration_digest=facts.batches.digest,
        seed=request.recipe.seed,
    )


def _publish(request: PruneRequest, output: Path, skeleton: Skeleton, record: PruneRecord, *, probe: Tensor) -> int:
    """Write everything aside, compare, and let it appear at once; returns its size in bytes."""
    journal, removed = Journal(output), frozenset(record.removed)
    with journal.in_one_go():
        check_output(output, request.source.path, request.force)
        journal.prepare()
        folder = journal.partial
        write_pruned(skeleton, removed, folder)
        check_pruned(skeleton, removed, folder, probe)
        copy_side_files(request.source.path, folder)
        commit_json(folder / RECORD_NAME, record.model_dump(mode="json"))
        commit_bytes(folder / "README.md", model_card(record).encode())
        size = folder_bytes(folder)
        journal.publish(request.force)
    return size
