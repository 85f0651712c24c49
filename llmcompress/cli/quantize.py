"""`llmcompress quantize`: the whole chain."""

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from llmcompress.cli.crew import crewed, rank
from llmcompress.cli.options import (
    MEMORY,
    RUNTIME,
    find_model,
    memory_of,
    pick_device,
    read_recipe,
    recipe_options,
    speaking,
    trusting,
)
from llmcompress.cli.planning import SCORES, read_scores
from llmcompress.cli.progress import BlockProgress
from llmcompress.cli.push import check_original, check_target, push_options, pushed
from llmcompress.cli.rewrite import tell_rewriting
from llmcompress.cli.say import Speaker, command_line, dropping_lines, megabytes, path_word, typed
from llmcompress.cli.trackers import Tracker, block_numbers, tracking


@dataclass(frozen=True)
class Told:
    """What a run ended with, how often it was not rounded as asked, and its seconds."""

    finished: Any
    adjusted: int
    seconds: float


def default_output(model: str, budget: str) -> Path:
    """Where the result goes when -o is not given: the model's last name and the budget, in this folder."""
    name = model.rstrip("/").rsplit("/", 1)[-1].replace("@", "-")
    return Path(f"{name}-{re.sub(r'[^0-9A-Za-z.]+', '-', budget).strip('-')}")


@click.command("quantize")
@click.argument("model")
@click.option(
    "--budget",
    required=True,
    help="3.5bits (linears), 3.5bits/file (whole checkpoint), 4.2GB, 300MiB, 'kld<=0.05', 'ppl<=+2%'.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Default: MODEL-BUDGET in this folder.")
@SCORES
@RUNTIME
@recipe_options
@MEMORY
@click.option("--dry-run", is_flag=True, help="Print sizes and needs, write nothing.")
@click.option("--force", is_flag=True, help="Replace an existing output, atomically, once the new one is complete.")
@click.option("--restart", is_flag=True, help="Discard an unfinished run instead of going on with it.")
@push_options
@trusting
@crewed
@speaking
@tracking
def quantize_command(model: str, budget: str, output: Path | None, speaker: Speaker, **flags: Any) -> None:
    """Compress MODEL to a bit budget: trace, score, plan, quantize, verify.

    MODEL is a directory, org/name[@revision], a short name (`llmcompress list models`), or demo.
    The same command goes on where an interrupted run stopped.
    """
    if rank() == 0:
        check_target(flags["repository"], flags["public"])
    request = _request(model, budget, output, flags)
    if request.source.repository:
        speaker.talk(f"{request.source.repository} at {request.source.revision}")
    check_original(flags["repository"], request.source.repository)
    if flags["dry_run"] and rank() == 0:
        _dry_run(request, speaker)
    elif not flags["dry_run"]:
        flags["tracker"].start(request.output.name, _facts(request))
        told = _run(request, speaker, flags["tracker"])
        repository = None if rank() else flags["repository"]
        sent = None if repository is None else pushed(request.output, repository, flags["public"], speaker)
        _tell_result(request, told, sent=sent, speaker=speaker)


def _facts(request: Any) -> dict[str, str | int | float]:
    """What was asked, for those who compare runs."""
    recipe = request.recipe
    facts: dict[str, str | int | float] = {"model": request.source.name, "budget": request.budget.text}
    return facts | {"recipe": recipe.name, "quantizer": recipe.quantizer, "scorer": recipe.scorer, "seed": recipe.seed}


def _request(model: str, budget: str, output: Path | None, flags: dict[str, Any]) -> Any:
    from llmcompress.compress.allocate.budget import parse_budget
    from llmcompress.errors import InputError

    words = (flags["recipe"], flags["changes"], flags["calibration"], flags["seed"])
    recipe = read_recipe(*words, runtime=flags["runtime"])
    spent = parse_budget(budget)
    memory = memory_of(flags["max_memory"])
    if spent.measured and not recipe.plan.trials:
        raise InputError(f"budget {spent.text} is measured, and plan.trials is off", "leave plan.trials on")
    scores = None if flags["scores_path"] is None else read_scores(flags["scores_path"])
    from llmcompress.compress.journal import check_output

    source = find_model(model)
    target = output or default_output(source.name, budget)
    if rank() == 0:
        check_output(target, source.path, force=True)
    from llmcompress.compress.run import QuantizeRequest
    from llmcompress.model.crew import ALONE

    return QuantizeRequest(
        source=source,
        output=target,
        recipe=recipe,
        budget=spent,
        device=pick_device(flags["device"]),
        command=command_line(),
        force=flags["force"],
        restart=flags["restart"],
        scores=scores,
        max_memory=memory,
        crew=flags["crew"] or ALONE,
    )


def _forecast_lines(found: Any) -> list[str]:
    return [
        f"{found.blocks} blocks, {found.parameters:,} parameters, {megabytes(found.source_bytes)} of weights",
        f"result about {megabytes(found.output_bytes)}: {found.bits_per_weight:.3f} bits per weight over "
        f"{found.quantized_weights:,} quantized weights, {found.file_bits_per_weight:.3f} over the whole checkpoint",
        f"needs about {megabytes(found.peak_memory_bytes)} of memory and {megabytes(found.disk_bytes)} of disk",
        f"memory is highest at {found.memory_stage}: "
        + ", ".join(f"{k} {megabytes(v)}" for k, v in found.memory.items()),
    ]


def _dry_run(request: Any, speaker: Speaker) -> None:
    from llmcompress.compress.forecast import check_disk, fitted
    from llmcompress.compress.journal import check_output
    from llmcompress.compress.pipeline import open_model

    check_output(request.output, request.source.path, request.force)
    budget = request.budget
    opened = open_model(request.source, request.recipe, request.device, whole_file=budget.whole_file)
    _, found = fitted(opened, request.recipe, budget, limit=request.max_memory, scored=request.scores is not None)
    check_disk(found, request.output)
    speaker.result(found.document(), _forecast_lines(found))


def _run(request: Any, speaker: Speaker, tracker: Tracker) -> Told:
    """Carry it out, and say what happens."""
    from llmcompress.compress.forecast import Forecast
    from llmcompress.compress.run import Finished, Planned, Resumed, Rewrote, Warned, quantize
    from llmcompress.types import BlockOutcome, Dropping

    began = time.monotonic()
    finished, adjusted, blocks = None, 0, 1
    with BlockProgress(speaker) as progress:
        for event in quantize(request):
            match event:
                case str():
                    progress.stage(event)
                case Forecast():
                    for line in _forecast_lines(event):
                        speaker.talk(line)
                case Rewrote():
                    tell_rewriting(event.record, speaker)
                case Dropping():
                    for line in dropping_lines(event):
                        speaker.talk(line)
                case Planned():
                    _tell_plan(event, speaker)
                    progress.blocks(blocks := len(event.opened.trace.blocks))
                case Resumed():
                    speaker.talk(f"resuming: {event.blocks} of {event.total} blocks are already done")
                case Warned():
                    speaker.talk(f"warning: {event.text}")
                case BlockOutcome():
                    progress.block(event)
                    adjusted += len(event.fallbacks)
                    tracker.log(block_numbers(event, blocks), event.block)
                case Finished():
                    finished = event
                    tracker.log(_numbers(event.plan) | {"seconds": time.monotonic() - began})
    return Told(finished, adjusted, time.monotonic() - began)


def _numbers(plan: Any) -> dict[str, float | None]:
    """What the run came to."""
    allocation = plan.allocation
    measured = min((trial.measured_kld for trial in plan.trials), default=None)
    return {
        "bits_per_weight": allocation.bits_per_weight,
        "file_bits_per_weight": allocation.file_bits_per_weight,
        "shard_bytes": allocation.file_bytes,
        "calibration_kld": measured,
    }


def _tell_plan(event: Any, speaker: Speaker) -> None:
    allocation, trace = event.plan.allocation, event.opened.trace
    proof = "least expected damage"
    if event.plan.scorer == "none":
        proof = "the only formats allowed"
    elif allocation.status != "optimal":
        proof = f"expected damage within {allocation.gap:.1%}"
    trials = event.plan.trials
    if trials:
        proof += f"; best of {len(trials)} measured"
    speaker.talk(
        f"plan: {allocation.bits_per_weight:.4f} bits per weight ({proof}), "
        f"{megabytes(allocation.file_bytes)} of shards"
    )
    if speaker.verbose or (trials and trials[0].measured_kld > min(t.measured_kld for t in trials)):
        for trial in trials:
            speaker.talk(f"  measured KL {trial.measured_kld:.5f} at {trial.bits_per_weight:.4f} bits: {trial.label}")
    if event.plan.program == "ratio":
        from llmcompress.compress.ratios import shares_in_words

        specs = [a.spec for a in allocation.assigned]
        speaker.talk(f"  linears by columns with 2 bits more: {shares_in_words(specs, min(s.bits for s in specs))}")
    if event.plan.output_feedback is not None:
        speaker.talk(f"  {event.plan.output_feedback.words}")
    if allocation.under_budget_reason:
        speaker.talk(f"  under the budget by {1 - allocation.storage_bits / allocation.budget_bits:.2%}: "
                     f"{allocation.under_budget_reason}")  # fmt: skip
    for facts in (allocation.kept, allocation.fallbacks):
        reasons: dict[str, list[str]] = {}
        for fact in facts:
            reasons.setdefault(fact.reason, []).append(fact.linear if hasattr(fact, "linear") else fact.where)
        for reason, names in reasons.items():
            what = "left at the source precision" if facts is allocation.kept else "adjusted"
            speaker.talk(f"  {len(names)} linear(s) {what}: {reason} ({names[0]}{', ...' if len(names) > 1 else ''})")
    if trace.untraced:
        speaker.talk(f"  {trace.untraced}")


def _tell_result(request: Any, told: Told, *, sent: Any, speaker: Speaker) -> None:
    finished = told.finished
    allocation = finished.plan.allocation
    document = {
        "output": request.output.name,
        "budget": allocation.budget,
        "bits_per_weight": allocation.bits_per_weight,
        "file_bits_per_weight": allocation.file_bits_per_weight,
        "shard_bytes": allocation.file_bytes,
        "directory_bytes": finished.directory_bytes,
        "expected_damage": allocation.expected_damage,
        "status": allocation.status,
        "adjusted": told.adjusted,
        "kept": [kept.linear for kept in allocation.kept],
        "checks": [{"name": c.name, "passed": c.passed, "found": c.found} for c in finished.checks],
        "seconds": round(told.seconds, 2),
    }
    lines = _lines(request, told)
    if sent is not None:
        document["push"], more = sent
        lines += more
    speaker.result(document, lines)


def _lines(request: Any, told: Told) -> list[str]:
    """What the run came to, for a reader."""
    finished, allocation, adjusted = told.finished, told.finished.plan.allocation, told.adjusted
    dropping = finished.plan.dropping
    of_original = (
        []
        if dropping is None or not dropping.dropped
        else [
            f"original    {allocation.storage_bits / dropping.weights:.4f} bits per weight over its linears, those of "
            f"dropped blocks {', '.join(map(str, dropping.dropped))} counted"
        ]
    )
    return [
        f"asked       {allocation.budget}",
        *of_original,
        f"linears     {allocation.bits_per_weight:.4f} bits per weight, codes, scales and shapes counted",
        f"checkpoint  {allocation.file_bits_per_weight:.4f} bits per weight, {allocation.file_bytes:,} bytes of shards"
        f" ({megabytes(finished.directory_bytes)} with tokenizer and records)",
        *(
            [f"adjusted    {adjusted} linear(s) were not rounded as asked; llmcompress.json says why"]
            if adjusted
            else []
        ),
        f"verified    {', '.join(check.name for check in finished.checks)}",
        f"written to  {request.output}  in {told.seconds:.0f} s",
        f"next        llmcompress eval {path_word(request.output)} --ref {typed(request.source)}",
    ]
