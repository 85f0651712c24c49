"""`llmcompress verify` and `llmcompress eval`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from llmcompress.cli.crew import crewed, rank
from llmcompress.cli.figures import lines_of
from llmcompress.cli.options import (
    MEMORY,
    Finite,
    Whole,
    check_place,
    evaluation_folder,
    find_model,
    given,
    memory_of,
    pick_device,
    speaking,
    trusting,
    with_half,
)
from llmcompress.cli.report import PAGE_NAME
from llmcompress.cli.say import Speaker, command_line
from llmcompress.cli.trackers import Tracker, report_numbers, tracking
from llmcompress.errors import InputError


@click.command("verify")
@click.argument("output")
@click.option("--device", default=None, help="cpu or cuda. Default: cpu.")
@trusting
@speaking
def verify_command(output: str, device: str | None, speaker: Speaker) -> None:
    """Reopen OUTPUT: hashes, index, true bits against the plan, NaN, logits against the stored codes.

    OUTPUT is what quantize, prune, heal or export wrote, here or on the Hub (org/name[@revision]).
    """
    from llmcompress.hub.source import resolve
    from llmcompress.preflight import check_source

    folder = resolve(output).path
    if not (folder / "export.json").is_file():
        check_source(folder, packed=True)
    from llmcompress.compress.sealed import verify_output
    from llmcompress.compress.verify import require

    checks = require(verify_output(folder, pick_device(device)))
    document = [{"name": c.name, "passed": c.passed, "found": c.found} for c in checks]
    speaker.result(document, [f"{check.name:<18} ok  {check.found}" for check in checks])


@click.command("eval")
@click.argument("model")
@click.option("--ref", required=True, help="The original: a directory, org/name[@revision], a short name or demo.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder for the report. Default: MODEL-eval, beside it."
)
@click.option("--data", default="builtin", show_default=True, help="builtin (held-out files), or a text file.")
@click.option("--samples", type=Whole(2), default=64, show_default=True, help="Sequences.")
@click.option("--sequence-length", type=Whole(8), default=512, show_default=True, help="Tokens in each.")
@click.option("--batch-size", type=Whole(1), default=8, show_default=True)
@click.option("--seed", type=Whole(0), default=0, show_default=True)
@click.option("--sweep", is_flag=True, help="Also KL at temperatures, and where greedy continuations part.")
@click.option("--speed", is_flag=True, help="Also tokens per second and memory of both, as users load them.")
@click.option("--tasks", metavar="NAME[=FILE],...", help="Also tasks of lm-evaluation-harness; FILE has the documents.")
@click.option("--task-limit", type=Whole(1), help="Documents of each task. Default: all.")
@click.option("--skip-voids", is_flag=True, help="Also run MODEL with blocks skipped per token, where they are voids.")
@click.option("--void-alpha", type=Finite(0), default=0.8, show_default=True, help="Larger: more voids.")
@click.option("--device", default=None, help="cpu or cuda. Default: cpu.")
@MEMORY
@trusting
@crewed
@speaking
@tracking
def eval_command(model: str, ref: str, output: Path | None, speaker: Speaker, **flags: Any) -> None:
    """Compare MODEL with its original on held-out text: KL divergence, perplexity, agreement, single tokens, blocks."""
    request = _request(model, ref, flags)
    folder = output or evaluation_folder(request.model)
    check_place(folder / PAGE_NAME, made=True)
    from llmcompress.cli.report import write_page
    from llmcompress.eval.run import run_eval, write_report
    from llmcompress.pages.reading import run_of

    speaker.talk(f"comparing {request.model.name} with {request.reference.name} ...")
    size, crew = request.batch_size, request.crew
    report = with_half(lambda size: run_eval(replace(request, batch_size=size)), size, speaker, crew=crew)
    if rank():
        return
    if flags["skip_voids"]:
        from llmcompress.eval.skipping import with_voids

        speaker.talk("running it with voids skipped ...")
        report = with_voids(report, request, flags["void_alpha"])
    _track(flags["tracker"], report)
    path = write_report(report, folder)
    page = path.with_name(PAGE_NAME)
    write_page([run_of(report, request.model.path, path.parent)], page)
    speaker.result(report.model_dump(mode="json"), [*lines_of(report), f"written to  {path} and {page.name}"])


def _track(tracker: Tracker, report: Any) -> None:
    tracker.start(f"eval {report.model.name}", {"model": report.model.name, "reference": report.ref.name})
    for cost in report.costs:
        found = {"reference_seconds": cost.reference_seconds, "candidate_seconds": cost.candidate_seconds}
        tracker.log(found | {"resident_bytes": cost.resident_bytes}, cost.block)
    tracker.log(report_numbers(report))


def _check_flags(flags: dict[str, Any], tasks: tuple[str, ...]) -> None:
    """Raises InputError for options that nothing would read."""
    if flags["tasks"] is not None and not tasks:
        raise InputError("--tasks names no task", "for example --tasks piqa, or leave it out")
    if flags["task_limit"] is not None and not tasks:
        raise InputError("--task-limit says nothing without --tasks", "name tasks, or leave it out")
    if not flags["skip_voids"] and given("void_alpha"):
        raise InputError("--void-alpha says nothing without --skip-voids", "add --skip-voids, or leave it out")


def _request(model: str, ref: str, flags: dict[str, Any]) -> Any:
    tasks = tuple(filter(None, (flags["tasks"] or "").split(",")))
    _check_flags(flags, tasks)
    sources = find_model(model, packed=True), find_model(ref, packed=True)
    from llmcompress.eval.run import EvalRequest
    from llmcompress.model.crew import ALONE
    from llmcompress.model.text import TextRequest

    size = flags["samples"], flags["sequence_length"]
    text = TextRequest(flags["data"], *size, flags["seed"], "evaluation", "options")
    return EvalRequest(
        *sources, text, flags["batch_size"], pick_device(flags["device"]), command_line(),
        sweep=flags["sweep"], speed=flags["speed"], tasks=tasks, task_limit=flags["task_limit"],
        max_memory=memory_of(flags["max_memory"]),
        crew=flags["crew"] or ALONE,
    )  # fmt: skip
