"""`quantize`: the whole chain on one output, resumable, published by one rename."""

import platform
from collections.abc import Generator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import transformers

from llmcompress import __version__
from llmcompress.compress.allocate.budget import Budget
from llmcompress.compress.apply import apply, finished_logits
from llmcompress.compress.card import write_card
from llmcompress.compress.carried import carried_out, difference
from llmcompress.compress.chain import ApplyJob, split_text
from llmcompress.compress.forecast import Forecast, check_disk, fitted, unread
from llmcompress.compress.journal import Journal, check_output
from llmcompress.compress.kept import sealed
from llmcompress.compress.output import (
    Origin,
    Story,
    drop_strays,
    write_record,
    write_small_files,
)
from llmcompress.compress.pipeline import (
    NO_DATA,
    NO_SCORER,
    Opened,
    as_score_file,
    calibration,
    needs_data,
    open_model,
    probe_tokens,
    request_of,
    score,
)
from llmcompress.compress.planning import make_plan
from llmcompress.compress.remade import (
    SCORES_NAME,
    as_halved,
    dropped_once,
    dropping_once,
    halve,
    made_digest,
    rewritten_once,
)
from llmcompress.compress.reuse import expected, reuse
from llmcompress.compress.shards import outside_linears
from llmcompress.compress.together import begun, kept, publish, published_before, verified_before
from llmcompress.compress.verify import Check, probe_of, require, verify
from llmcompress.errors import InputError, MachineError, out_of_memory
from llmcompress.files import commit_bytes
from llmcompress.hub.source import Source
from llmcompress.model.checkpoint import folder_bytes
from llmcompress.model.crew import ALONE, Crew
from llmcompress.model.shelf import Shelf
from llmcompress.model.text import Batches
from llmcompress.recipes import Recipe
from llmcompress.runtime.skipping import SkipRecord
from llmcompress.types import BlockOutcome, Dropping, Plan, RewriteRecord, ScoreFile, Scores

PLAN_NAME = "plan.json"


@dataclass(frozen=True)
class QuantizeRequest:
    """Everything `quantize` was told. `command` is printed in the model card; `scores` are taken instead of scoring.

    `max_memory` is in bytes, see `fitted`. `crew` are the processes that do it together, each with the same request.
    """

    source: Source
    output: Path
    recipe: Recipe
    budget: Budget
    device: str
    command: str
    force: bool = False
    restart: bool = False
    scores: ScoreFile | None = None
    max_memory: int | None = None
    crew: Crew = ALONE


@dataclass(frozen=True)
class Resumed:
    """An unfinished run on this output is gone on with; `blocks` of `total` are already done."""

    blocks: int
    total: int


@dataclass(frozen=True)
class Warned:
    """Something the user should know that does not stop the run."""

    text: str


@dataclass(frozen=True)
class Rewrote:
    """The model was rewritten before it is scored, in this run or the one that is gone on with."""

    record: RewriteRecord


@dataclass(frozen=True)
class Planned:
    """The plan is made; blocks follow."""

    plan: Plan
    opened: Opened


@dataclass(frozen=True)
class Finished:
    """The output is published, by this run or by one that died just afterwards."""

    plan: Plan
    checks: tuple[Check, ...]
    directory_bytes: int


Stage = str
Event = Stage | Forecast | Resumed | Warned | Rewrote | Dropping | Planned | BlockOutcome | Finished


def environment() -> dict[str, str]:
    """Versions a result depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": str(torch.get_num_threads()),
    }


def _warnings(opened: Opened, asked: Recipe, recipe: Recipe) -> Iterator[Warned]:
    if opened.nonfinite:
        yield Warned(f"NaN or infinity, kept as it is, in {', '.join(opened.nonfinite[:8])}")
    if recipe != asked:
        yield Warned(f"batches of {recipe.calibration.batch_size}, to keep to the memory: last bits may differ")
    yield from map(Warned, unread(recipe))


def quantize(request: QuantizeRequest) -> Iterator[Event]:
    """Run the chain, yielding what happens: stage names, numbers, one outcome per block, the end.

    Raises InputError before anything is written when the input is at fault, MachineError with finished
    blocks kept when the machine is, BusyError when another run holds the output.
    """
    journal, crew = Journal(request.output), request.crew
    published = crew.first(partial(published_before, journal, request.source.path, request.force))
    yield "opening"
    opened = open_model(request.source, request.recipe, request.device, whole_file=request.budget.whole_file)
    opened.skeleton.join(crew)
    scored = request.scores is not None
    recipe, needed = fitted(opened, request.recipe, request.budget, limit=request.max_memory, scored=scored)
    crew.first(partial(check_disk, needed, request.output))
    yield needed
    yield from _warnings(opened, request.recipe, recipe)
    request = replace(request, recipe=recipe)
    yield "reading weights and text"
    digest = opened.digest()
    batches = calibration(opened, request.recipe) if needs_data(request.recipe) else NO_DATA
    if request.scores is not None and request.recipe.plan.voids:
        raise InputError("plan.voids scores the model it leaves, too", "leave --scores out")
    if not request.recipe.rewrite.methods:
        _given(request, batches, digest)
    asked = request_of(opened, request.recipe, batches, digest, request.budget)
    if request.scores is not None:
        asked["scores"] = request.scores.digest()
    with ExitStack() as stack:
        crew.first(lambda: stack.enter_context(journal.locked()))
        folder = journal.state if journal.state.is_dir() else None  # of a machine that shares no files with the first
        opened.skeleton.shelf = Shelf(folder, everything=needed.spilled)
        if published == asked:
            yield Finished(*verified_before(crew, journal, request.device), folder_bytes(request.output))
            return
        crew.first(partial(check_output, request.output, request.source.path, request.force))
        yield from _twice(request, journal, opened, batches=batches, asked=asked)


def _twice(
    request: QuantizeRequest, journal: Journal, opened: Opened, *, batches: Batches, asked: dict[str, str]
) -> Iterator[Event]:
    """The run; once more with half the batch, from the last finished block on, where memory ran out in any process."""
    crew = request.crew
    try:
        yield from _locked(request, journal, opened, batches=batches, asked=asked)
        return
    except (MemoryError, RuntimeError, MachineError) as error:
        if not out_of_memory(error):
            raise
        crew.meet_again(error)
        largest = max(map(len, split_text(request.recipe, opened.skeleton, batches)), default=0)
        if not crew.first(partial(halve, journal, largest)):
            raise
    shelf = opened.skeleton.shelf  # what was opened is half changed
    opened = open_model(request.source, request.recipe, request.device, whole_file=request.budget.whole_file)
    opened.skeleton.join(crew)
    opened.skeleton.shelf = shelf
    yield from _locked(replace(request, restart=False), journal, opened, batches=batches, asked=asked)


def _begun(
    request: QuantizeRequest, journal: Journal, asked: dict[str, str]
) -> Generator[Warned, None, tuple[bool, QuantizeRequest]]:
    """Whether an unfinished run is gone on with, and the request as that run had to change it."""
    crew = request.crew
    going_on, changed = crew.first(partial(begun, journal, asked, environment(), restart=request.restart))
    if changed:
        yield Warned(f"going on with another {', '.join(changed)}: the result may differ in its last bits")
    recipe = as_halved(crew, journal, request.recipe)
    if recipe != request.recipe:
        yield Warned(f"memory ran out: batches of {recipe.calibration.batch_size}; last bits may differ")
        request = replace(request, recipe=recipe)
    return going_on, request


def _locked(
    request: QuantizeRequest,
    journal: Journal,
    opened: Opened,
    *,
    batches: Batches,
    asked: dict[str, str],
) -> Iterator[Event]:
    going_on, request = yield from _begun(request, journal, asked)
    dropping = None
    if request.recipe.plan.voids:
        yield "weighing blocks against bits"
        recipe, budget = request.recipe, request.budget
        dropping = dropping_once(recipe, budget, journal, opened=opened, batches=batches, digest=asked["model"])
        yield dropping
        opened, budget = dropped_once(recipe, budget, journal, opened=opened, dropping=dropping)
        request = replace(request, budget=budget)
    if request.recipe.rewrite.methods:
        yield f"rewriting with {', '.join(request.recipe.rewrite.methods)}"
        whole_file = request.budget.whole_file
        opened = rewritten_once(request.recipe, whole_file, journal, opened=opened, batches=batches)
        if opened.rewriting is not None:
            yield Rewrote(opened.rewriting)
    yield "planning" if request.scores else f"scoring with {request.recipe.scorer} and planning"
    digest = asked["model"] if opened.source.path == request.source.path else made_digest(journal, opened)
    found = _plan(request, journal, opened, batches=batches, digest=digest)
    yield Planned(plan := found.model_copy(update={"dropping": dropping}), opened)
    job = ApplyJob(
        plan=plan,
        trace=opened.trace,
        skeleton=opened.skeleton,
        shards=opened.shards,
        batches=split_text(request.recipe, opened.skeleton, batches),
        probe=probe_tokens(opened, request.recipe.seed),
        hints=opened.hints,
    )
    if going_on:
        yield Resumed(max(len(journal.committed()) - 1, 0), len(opened.shards.shards) - 1)
    outcomes = yield from _applied(job, journal)
    planned, plan = plan, carried_out(plan, outcomes, opened.trace, opened.shards)
    if told := difference(planned, plan, whole_file=request.budget.whole_file):
        yield Warned(told)
    yield "verifying"
    story = _story(request, opened, plan, planned=planned, text_digest=batches.text_digest, asked=asked)
    checks: list[Check] = []
    request.crew.first(lambda: checks.extend(_close(request, journal, job, opened, story, outcomes=outcomes)))
    yield Finished(plan, tuple(checks), request.crew.first(partial(publish, journal, request.force)))


def _applied(job: ApplyJob, journal: Journal) -> Generator[BlockOutcome, None, tuple[BlockOutcome, ...]]:
    """Yields the outcomes of a plan as they come; all of them at the end."""
    outcomes = []
    for outcome in apply(job, journal):
        outcomes.append(outcome)
        yield outcome
    return tuple(outcomes)


def _plan(request: QuantizeRequest, journal: Journal, opened: Opened, *, batches: Batches, digest: str) -> Plan:
    """The plan of this run, or what its state already holds of it. `digest` is that of what is quantized."""
    crew, stored, planned = request.crew, journal.state / SCORES_NAME, journal.state / PLAN_NAME

    def clear() -> None:
        """A plan goes with the scores that it was made from."""
        if sealed(stored, Scores) is None:
            planned.unlink(missing_ok=True)

    def scored() -> Scores:
        return _given(request, batches, digest) or score(opened, request.recipe, batches, digest)

    crew.first(clear)
    scores = kept(crew, stored, Scores, scored)
    return kept(crew, planned, Plan, lambda: make_plan(opened, request.recipe, batches, scores, request.budget))


def _given(request: QuantizeRequest, batches: Batches, digest: str) -> Scores | None:
    """The scores the user gave, None where there are none. Raises InputError where they belong to something else."""
    if request.scores is None:
        return None
    return reuse(request.scores, request.recipe.scorer, expected(request.recipe, batches, digest))


def _story(
    request: QuantizeRequest, opened: Opened, plan: Plan, *, planned: Plan, text_digest: str, asked: dict[str, str]
) -> Story:
    """What the small files will tell."""
    return Story(
        origin=Origin.of(request.source, asked["model"]),
        recipe=request.recipe.model_dump(mode="json"),
        plan=plan,
        planned=planned,
        trace=opened.trace,
        request=asked,
        command=request.command,
        environment=environment(),
        calibration_text_digest=text_digest,
        rewriting=opened.rewriting,
        skipped=() if (skips := SkipRecord.of(opened.skeleton.files.config)) is None else skips.halves,
    )


def _close(
    request: QuantizeRequest,
    journal: Journal,
    job: ApplyJob,
    opened: Opened,
    story: Story,
    *,
    outcomes: tuple[BlockOutcome, ...],
) -> tuple[Check, ...]:
    """Write the small files and verify the whole directory, before anybody sees it."""
    logits = finished_logits(job, journal)
    if not bool(torch.isfinite(logits).all()):
        raise InputError("the quantized model gives logits that are not finite", "ask for more bits")
    drop_strays(journal.partial, job.shards)
    write_card(journal.partial, story)
    write_small_files(journal.partial, opened.source.path, job.shards, story, outside_linears(job.skeleton))
    if story.plan.scorer != NO_SCORER:
        scores = sealed(journal.state / SCORES_NAME, Scores)
        if scores is None:
            raise InputError("the scores of the unfinished run are damaged", "pass --restart to discard it")
        found = as_score_file(opened, request.recipe, (scores,))
        commit_bytes(journal.partial / SCORES_NAME, found.model_dump_json().encode(), b"\n")
    write_record(journal.partial, story, __version__, outcomes, probe_of(job.probe, logits))
    return require(verify(journal.partial, request.device))
