"""`prune --tie`: fit, choose groups by measured KL, compare with removing blocks, write, reopen, publish."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from llmcompress import __version__
from llmcompress.compress.journal import Journal, check_output
from llmcompress.compress.output import RECORD_NAME, Origin, OutputRecord, copy_side_files, file_records
from llmcompress.compress.pipeline import Opened, calibration, open_model, probe_tokens
from llmcompress.compress.prune.choose import Chooser, Search, choose
from llmcompress.compress.prune.measure import damage_of, removal_damage
from llmcompress.compress.prune.records import RemovalStep
from llmcompress.compress.prune.run import FREE, texts
from llmcompress.compress.run import environment
from llmcompress.compress.statistics import mean, or_limit, standard_error, upper_bound
from llmcompress.compress.tie.card import model_card
from llmcompress.compress.tie.records import TYING_NAME, Instead, TyingRecord
from llmcompress.compress.tie.weights import BASES, Group, Tied, Ties
from llmcompress.compress.tie.write import Writing, check_tied, write_tied
from llmcompress.compress.verify import probe_of, require, verify
from llmcompress.errors import InputError
from llmcompress.files import commit_bytes, commit_json
from llmcompress.hub.source import Source
from llmcompress.model.checkpoint import folder_bytes
from llmcompress.model.text import Batches
from llmcompress.recipes import Recipe
from llmcompress.runtime.skipping import SkipRecord


@dataclass(frozen=True)
class TieRequest:
    """Everything `prune --tie` was told.

    size     neighbouring blocks in a group, at least 2
    rank     of the low-rank corrections, 0 for none
    groups   how many are tied; None: as many as `keep` or `max_kld` let
    keep     share of the blocks' weights to keep
    max_kld  limit of the KL's upper bound, nats per token
    exclude  blocks that are not tied
    output   None to look only
    """

    source: Source
    output: Path | None
    recipe: Recipe
    device: str
    command: str
    size: int = 2
    rank: int = 0
    groups: int | None = None
    keep: float | None = None
    max_kld: float | None = None
    exclude: tuple[int, ...] = ()
    search: Search = field(default_factory=Search)
    force: bool = False

    @property
    def limit(self) -> float | None:
        """What the upper bound of the KL may be, None where a count decides."""
        return FREE if self.groups is None and self.max_kld is None else self.max_kld


@dataclass(frozen=True)
class TiedResult:
    """What was decided, and written where there is an output."""

    record: TyingRecord
    directory_bytes: int | None


Event = str | RemovalStep | TiedResult


class _Measuring:
    """KL by sequence of tied and of shortened models, on the text to choose by and on the text to judge by.

    Corrections are fitted to half of the latter, which then judges no more: a choice among fits to its own text would
    take the one that fits nothing else.
    """

    def __init__(self, request: TieRequest, opened: Opened) -> None:
        self.opened = opened
        self.batches = calibration(opened, request.recipe)
        self.choosing, self.judging = texts(self.batches, request.recipe)
        if request.rank and len(self.batches.tokens) > len(torch.cat(self.choosing)) + 1:
            self.fitting, self.judging = _halves(self.judging)
        else:
            self.fitting = self.choosing
        self.ties = Ties(opened.skeleton, opened.trace, rank=request.rank, size=request.size)
        self._memory = request.recipe.score.swaps.memory_mb << 20

    def tied(self, sets: Sequence[Sequence[Group]], batches: Sequence[Tensor] | None = None) -> Tensor:
        """Of models with groups tied, float64 `(sets, sequences)`."""
        variants = [Tied(self.ties, groups) for groups in sets]
        given = self.choosing if batches is None else batches
        return damage_of(self.opened.skeleton, variants, given, memory_bytes=self._memory).kld

    def removed(self, sets: Sequence[frozenset[int]], batches: Sequence[Tensor] | None = None) -> Tensor:
        """Of models without some blocks."""
        given = self.choosing if batches is None else batches
        return removal_damage(self.opened.skeleton, list(sets), given, memory_bytes=self._memory).kld


def _halves(batches: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The same sequences in two parts, in batches of the same size."""
    rows, size = torch.cat(list(batches)), len(batches[0])
    middle = len(rows) // 2
    return list(torch.split(rows[:middle], size)), list(torch.split(rows[middle:], size))


def tie(request: TieRequest) -> Iterator[Event]:
    """Run it, yielding stages, every step of the search, and what came of it.

    Raises InputError where the input is at fault, no bytes are saved, or nothing can be tied within the limits.
    """
    if request.output is not None:
        check_output(request.output, request.source.path, request.force)
    yield "opening"
    opened = open_model(request.source, request.recipe, request.device)
    measuring = _Measuring(request, opened)
    candidates = _candidates(request, measuring.ties)
    request = _counted(request, len(opened.trace.blocks), candidates)
    every = [group._replace(base=base) for group in candidates for base in BASES]
    if request.rank:
        yield "fitting corrections"
        measuring.ties.fit(every, measuring.fitting)
    yield "measuring what tying blocks costs"
    singles = dict(zip(every, measuring.tied([[group] for group in every]).mean(1).tolist(), strict=True))
    best = [min((g._replace(base=base) for base in BASES), key=singles.__getitem__) for g in candidates]
    steps = []
    for step in _search(request, measuring, best, [singles[group] for group in best]):
        steps.append(step)
        yield _named(step, best)
    chosen = [best[int(place)] for place in steps[-1].removed]
    yield "measuring what removing blocks costs instead"
    record = _record(request, measuring, chosen, steps=[_named(step, best) for step in steps], singles=singles)
    size = None
    if request.output is not None:
        yield "writing and opening again"
        writing = Writing(Tied(measuring.ties, chosen))
        probe = probe_tokens(opened, request.recipe.seed)
        record, size = _publish(request, writing, record, probe=probe, batches=measuring.batches)
    yield TiedResult(record, size)


def _candidates(request: TieRequest, ties: Ties) -> list[Group]:
    """The groups that could be tied, one for each first block; the base of each is open."""
    blocks, exclude = len(ties.linears), set(request.exclude)
    if SkipRecord.of(ties.skeleton.files.config) is not None:
        raise InputError("halves of this model's blocks are skipped", "tie the model it was made from")
    wrong = [block for block in sorted(exclude) if not 0 <= block < blocks]
    if wrong:
        raise InputError(f"--exclude {wrong[0]}: there is no such block", f"blocks are numbered 0 to {blocks - 1}")
    if request.size > blocks:
        raise InputError(f"--tie {request.size}: the model has {blocks} blocks", f"tie 2 to {blocks} at a time")
    groups = [Group(first, request.size) for first in range(blocks - request.size + 1)]
    found = [group for group in groups if not exclude & {*group.blocks} and ties.alike(group.blocks)]
    if not found:
        raise InputError(f"no {request.size} neighbouring blocks have equal shapes and may be tied", "exclude fewer")
    if any(ties.saved_bytes(group) <= 0 for group in found):
        raise InputError(f"--rank {request.rank}: corrections take what tying saves", "use a smaller rank")
    return found


def _counted(request: TieRequest, blocks: int, candidates: Sequence[Group]) -> TieRequest:
    """The request with a count in place of a share. Raises InputError where it does not fit the model."""
    if request.keep is not None:
        count = int(blocks * (1 - request.keep) + 1e-9) // (request.size - 1)
        if not count:
            raise InputError(f"--keep {request.keep:g} of {blocks} blocks ties no group of {request.size}", "keep less")
        request = replace(request, groups=count, keep=None)
    most, after = 0, 0  # groups side by side, from the left, are as many as there can be
    for group in candidates:
        if group.first >= after:
            most, after = most + 1, group.first + group.size
    if request.groups is not None and request.groups > most:
        raise InputError(f"cannot tie {request.groups} groups of {request.size} blocks", f"ask for 1 to {most}")
    return request


def _search(
    request: TieRequest, measuring: _Measuring, best: Sequence[Group], importance: Sequence[float]
) -> tuple[RemovalStep, ...]:
    def measure(sets: Sequence[frozenset[int]]) -> Tensor:
        return measuring.tied([[best[place] for place in some] for some in sets])

    def apart(some: frozenset[int]) -> bool:
        blocks = [index for place in some for index in best[place].blocks]
        return len(blocks) == len(set(blocks))

    chooser = Chooser(measure, importance, request.search, allowed=apart)
    steps = choose(chooser, count=request.groups, max_kld=request.limit)
    if not steps:
        step = _named(chooser.cheapest(), best)
        raise InputError(
            f"nothing can be tied within KL {request.limit:g}: blocks {step.removed[0]} cost the least, "
            f"{step.kld:.4g} (at most {step.upper:.4g})",
            f"ask for --groups 1{or_limit(step.upper)}",
        )
    if request.groups is not None and len(steps) < request.groups and request.max_kld is None:
        raise InputError(f"only {len(steps)} groups fit beside the best ones", "look further with --beam")
    return steps


def _named(step: RemovalStep, best: Sequence[Group]) -> RemovalStep:
    """A step of the search in the words of the user."""
    removed, rival = (tuple(str(best[int(place)]) for place in some) for some in (step.removed, step.rival))
    return step.model_copy(update={"removed": removed, "rival": rival})


def _instead(request: TieRequest, measuring: _Measuring, chosen: Sequence[Group], klds: Sequence[float]) -> Instead:
    """The best blocks to remove for at least the same bytes, chosen and judged on the same text."""
    skeleton, wanted = measuring.opened.skeleton, sum(map(measuring.ties.saved_bytes, chosen))
    entries, blocks = skeleton.files.tensors, len(skeleton.blocks)
    sizes = [sum(entries[n].stop - entries[n].start for n in skeleton.block_tensors(i)) for i in range(blocks)]
    count = min(max(-(-wanted * blocks // sum(sizes)), 1), blocks - 1)
    single = measuring.removed([frozenset({index}) for index in range(blocks)]).mean(1).tolist()
    step = choose(Chooser(measuring.removed, single, request.search), count=count, max_kld=None)[-1]
    removed = tuple(map(int, step.removed))
    found = measuring.removed([frozenset(removed)], measuring.judging)[0].tolist()
    gaps = [mine - its for mine, its in zip(klds, found, strict=True)]
    return Instead(
        removed=removed,
        saved_bytes=sum(sizes[index] for index in removed),
        kld=mean(found),
        standard_error=_error(found),
        more=mean(gaps),
        more_error=_error(gaps),
    )


def _error(values: Sequence[float]) -> float:
    return standard_error(values) if len(values) > 1 else 0.0


def _record(
    request: TieRequest,
    measuring: _Measuring,
    chosen: Sequence[Group],
    *,
    steps: Sequence[RemovalStep],
    singles: dict[Group, float],
) -> TyingRecord:
    """Judged on text that the choice did not see."""
    klds = measuring.tied([chosen], measuring.judging)[0].tolist()
    opened, batches, groups = measuring.opened, measuring.batches, sorted(chosen)
    return TyingRecord(
        llmcompress=__version__,
        origin=Origin.of(request.source, opened.digest()),
        command=request.command,
        size=request.size,
        rank=request.rank,
        single={f"{group} {group.base}": kld for group, kld in singles.items()},
        steps=tuple(steps),
        groups=tuple(map(str, groups)),
        bases=tuple(group.base for group in groups),
        blocks=len(opened.trace.blocks),
        bytes_before=opened.source_bytes,
        bytes_after=opened.source_bytes - sum(map(measuring.ties.saved_bytes, groups)),
        kld=mean(klds),
        standard_error=_error(klds),
        upper=upper_bound(klds) if len(klds) > 1 else mean(klds),
        instead=_instead(request, measuring, chosen, klds),
        sequences=len(klds),
        calibration=batches.source,
        calibration_digest=batches.digest,
        seed=request.recipe.seed,
    )


def _publish(
    request: TieRequest, writing: Writing, record: TyingRecord, *, probe: Tensor, batches: Batches
) -> tuple[TyingRecord, int]:
    """Write everything aside, compare, and let it appear at once; the record with the true bytes, and all bytes."""
    output = Path(str(request.output))
    journal = Journal(output)
    with journal.in_one_go():
        check_output(output, request.source.path, request.force)
        journal.prepare()
        folder = journal.partial
        write_tied(writing, folder)
        logits = check_tied(writing, folder, probe)
        copy_side_files(request.source.path, folder)
        shards = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        record = record.model_copy(update={"bytes_after": shards})
        commit_json(folder / TYING_NAME, record.model_dump(mode="json"))
        commit_bytes(folder / "README.md", model_card(record, environment()).encode())
        whole = OutputRecord(
            llmcompress=__version__,
            origin=record.origin,
            request=_asked(request, record, batches),
            calibration_text_digest=batches.text_digest,
            probe=probe_of(probe, logits),
            environment=environment(),
            files=file_records(folder),
        )
        commit_json(folder / RECORD_NAME, whole.model_dump(mode="json"))
        require(verify(folder, request.device))
        size = folder_bytes(folder)
        journal.publish(request.force)
    return record, size


def _asked(request: TieRequest, record: TyingRecord, batches: Batches) -> dict[str, str]:
    """What was asked, as digests."""
    names = ("size", "rank", "groups", "keep", "max_kld", "exclude", "search")
    text = json.dumps({name: getattr(request, name) for name in names}, sort_keys=True, default=asdict)
    return {
        "model": record.origin.model_digest,
        "calibration tokens": batches.digest,
        "settings": hashlib.sha256(text.encode()).hexdigest(),
        "algorithm": "1",
    }
