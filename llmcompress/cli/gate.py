"""`llmcompress gate`: a verdict on a report, for people and for CI. Needs no torch unless it evaluates first."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from llmcompress.cli.options import (
    Command,
    Whole,
    check_place,
    evaluation_folder,
    given,
    keep_apart,
    pick_device,
    speaking,
)
from llmcompress.cli.say import Speaker, command_line, json_of
from llmcompress.errors import InputError, MachineError
from llmcompress.files import parse_yaml

REPORT_NAME = "report.json"
FORMATS = ("text", "json", "github", "junit", "markdown")
LIMITS = ("profile", "max_kld", "max_ppl_increase", "max_drop", "max_top1_loss", "max_regression", "alpha", "looks")
LOOKS_WITH_REF = 3
EVALUATING = ("output", "samples", "max_samples", "sequence_length", "data", "device")  # options of --ref alone


def limit_options(function: Command) -> Command:
    """Add the flags that are fields of `Limits`, and --config."""
    flag = "LLMCOMPRESS_"
    for option in (
        click.option("--expect", metavar="WHAT=DIGEST", multiple=True, help="Of model, ref, tokens or tokenizer."),
        click.option("--looks", type=int, default=None, help="Looks at growing samples. Default: 1; 3 with --ref."),
        click.option("--alpha", type=float, default=None, help="Chance of a wrong answer. Default: 0.05."),
        click.option("--max-regression", metavar="SHARE", default=None, help="Rise of the KL over --baseline: 10%."),
        click.option("--max-top1-loss", metavar="SHARE", default=None, help="Share of changed likeliest tokens."),
        click.option(
            "--max-drop", metavar="SHARE", default=None, help="Of right answers in each task: 2% is 2 points."
        ),
        click.option("--max-ppl-increase", metavar="SHARE", default=None, help="Rise of the perplexity: 3% or 0.03."),
        click.option("--max-kld", type=float, default=None, envvar=flag + "MAX_KLD", help="Mean KL in nats per token."),
        click.option(
            "--config", type=click.Path(path_type=Path), envvar=flag + "GATE_CONFIG", help="A YAML file of limits."
        ),
        click.option(
            "--profile",
            default=None,
            envvar=flag + "PROFILE",
            metavar="NAME",
            help="near-lossless, standard (default), aggressive, or none: only the limits given.",
        ),
    ):
        function = option(function)
    return function


def evaluation_options(function: Command) -> Command:
    """Add what an evaluation before the verdict needs."""
    for option in (
        click.option("--device", default=None, help="With --ref: cpu or cuda. Default: cpu."),
        click.option("--data", default="builtin", show_default=True, help="With --ref: builtin, or a text file."),
        click.option("--sequence-length", type=Whole(8), default=512, show_default=True, help="With --ref."),
        click.option("--max-samples", type=Whole(8), default=None, help="With --ref: most sequences."),
        click.option("--samples", type=Whole(8), default=32, show_default=True, help="With --ref: of the first look."),
        click.option(
            "-o",
            "--output",
            type=click.Path(path_type=Path),
            help="With --ref: folder for report.json. Default: as of eval.",
        ),
        click.option("--ref", default=None, help="Evaluate first: SUBJECT is a model, and this the original."),
    ):
        function = option(function)
    return function


@click.command("gate")
@click.argument("subject", metavar="REPORT|MODEL")
@limit_options
@click.option("--baseline", type=click.Path(path_type=Path), help="report.json of the last release: no regressions.")
@click.option("--format", "form", type=click.Choice(FORMATS), default=None, help="Default: text; github in its CI.")
@click.option("--junit", type=click.Path(path_type=Path), help="Also write JUnit XML here.")
@click.option("--allow-undecided", is_flag=True, help="Exit with 0 instead of 4 when the sample decides nothing.")
@click.option("--suggest", is_flag=True, help="Print limits this report keeps, as a file for --config.")
@evaluation_options
@speaking
def gate_command(subject: str, speaker: Speaker, config: Path | None, suggest: bool, **flags: Any) -> None:
    """Does REPORT keep its limits? Exit codes: 0 yes, 1 no, 4 too few samples to tell.

    REPORT is a report.json or a folder with one; with --ref it is a model, which is evaluated first.
    """
    check_place(flags["junit"])
    keep_apart(flags["junit"], Path(subject), Path(subject) / REPORT_NAME, config, flags["baseline"])
    _check_flags(flags)
    limits, baseline = _limits(config, flags), _baseline(flags["baseline"])
    report, verdict = _judged(subject, limits, baseline, speaker=speaker, flags=flags)
    if suggest:
        from llmcompress.gate.suggest import suggest as suggested

        text = suggested(report, limits[0])
        asked = speaker.json or flags["form"] == "json"
        click.echo(json_of(parse_yaml(text, "limits")) if asked else text, nl=False)
        return
    _say(speaker, report, verdict, flags)
    raise SystemExit(_exit_code(verdict, flags))


def _exit_code(verdict: Any, flags: dict[str, Any]) -> int:
    return 0 if flags["allow_undecided"] and verdict.exit_code == 4 else int(verdict.exit_code)


def _check_flags(flags: dict[str, Any]) -> None:
    """Refuse what nothing would read, and a report that could not be written. Raises InputError, MachineError."""
    if flags["ref"] is None and (word := given(*EVALUATING)) is not None:
        raise InputError(f"{word} says nothing without --ref", "add --ref ORIGINAL, or leave it out")
    if flags["output"] is not None:
        check_place(flags["output"] / REPORT_NAME, made=True)
    if flags["max_regression"] is not None and flags["baseline"] is None:
        what = "--max-regression is a rise over the last release's KL"
        raise InputError(f"{what}, and there is no --baseline", "give its report.json, or leave it out")


def _limits(config: Path | None, flags: dict[str, Any]) -> Any:
    from llmcompress.gate.limits import read_limits

    given = {name: flags[name] for name in LIMITS}
    expected = dict(_expected(words) for words in flags["expect"])
    return read_limits(config, given | {"expect": expected or None}, LOOKS_WITH_REF if flags["ref"] else 1)


def _expected(words: str) -> tuple[str, str]:
    what, equals, digest = words.partition("=")
    if not equals or not digest:
        raise InputError(f"--expect {words}: write it as WHAT=DIGEST", "for example --expect tokens=4f1c...")
    return what, digest


def _read(path: Path) -> Any:
    """A report.json. Raises InputError."""
    from llmcompress.eval.report import EvalReport

    try:
        return EvalReport.parse(path.read_bytes(), path.name)
    except OSError as error:
        raise InputError(f"{path.name}: {error.strerror}", "give the report.json that `eval` wrote") from None


def _baseline(path: Path | None) -> Any:
    return None if path is None else _read(_file(str(path)))


def _file(subject: str) -> Path:
    """The report named on the command line: itself, or the one in a folder. Raises InputError."""
    path = Path(subject)
    if path.is_dir():
        if not (path / REPORT_NAME).is_file():
            raise InputError(f"{path.name}: no {REPORT_NAME} in it", "evaluate a model first: --ref ORIGINAL")
        return path / REPORT_NAME
    return path


def _judged(subject: str, asked: Any, baseline: Any, *, speaker: Speaker, flags: dict[str, Any]) -> tuple[Any, Any]:
    from llmcompress.gate.judge import judge

    limits, wants_tasks = asked
    if flags["ref"] is None:
        report = _read(_file(subject))
        if wants_tasks and not report.documents:
            raise InputError(
                "max_drop is set, but the report has no documents of tasks", "evaluate tasks, or set no max_drop"
            )
        return report, judge(report, limits, baseline)
    if wants_tasks:
        raise InputError("--ref measures no tasks, but max_drop is set", "run `eval` with tasks and gate its report")
    return _evaluated(subject, limits, baseline, speaker=speaker, flags=flags)


def _evaluated(subject: str, limits: Any, baseline: Any, *, speaker: Speaker, flags: dict[str, Any]) -> tuple[Any, Any]:
    from llmcompress.gate.looks import look_until_decided, sizes

    counts = sizes(flags["samples"], limits.looks, flags["max_samples"])
    evaluate, source = _evaluator(subject, flags)
    for report, verdict in look_until_decided(evaluate, limits, counts, baseline):
        speaker.talk(f"{report.data.sequences} sequences: {verdict.verdict}")
    from llmcompress.eval.run import write_report

    write_report(report, flags["output"] or evaluation_folder(source))
    return report, verdict


def _evaluator(subject: str, flags: dict[str, Any]) -> tuple[Callable[[int], Any], Any]:
    """What measures a model on so many sequences, and where that model is."""
    try:
        from llmcompress.eval.run import EvalRequest, run_eval
    except ModuleNotFoundError as error:
        raise InputError(f"--ref evaluates a model, which needs {error.name}", "install llmcompress whole") from None
    from llmcompress.hub.source import resolve
    from llmcompress.model.text import TextRequest

    sources, device = (resolve(subject), resolve(flags["ref"])), pick_device(flags["device"])

    def evaluate(count: int) -> Any:
        text = TextRequest(flags["data"], count, flags["sequence_length"], 0, "evaluation", "options")
        return run_eval(EvalRequest(*sources, text, 8, device, command_line()))

    return evaluate, sources[0]


def _say(speaker: Speaker, report: Any, verdict: Any, flags: dict[str, Any]) -> None:
    """Print the verdict in its format, and write the files that were asked for."""
    from llmcompress.files import commit_bytes
    from llmcompress.gate import formats

    allowed = flags["allow_undecided"]
    form = "json" if speaker.json else flags["form"]
    form = form or ("github" if os.environ.get("GITHUB_ACTIONS") == "true" else "text")
    junit = formats.junit(verdict, undecided="skipped" if allowed else "error")
    if flags["junit"] is not None:
        commit_bytes(flags["junit"], junit.encode())
    if form == "github":
        _append("GITHUB_STEP_SUMMARY", formats.step_summary(report, verdict))
        _append("GITHUB_OUTPUT", f"verdict={verdict.verdict}\n")
        annotations = formats.github(verdict, undecided="warning" if allowed else "error")
        click.echo("\n".join([*formats.text(verdict), *annotations]))
    elif form in ("junit", "markdown"):
        click.echo(junit if form == "junit" else formats.markdown(report, verdict), nl=False)
    elif form == "json":
        click.echo(json_of(verdict.model_dump(mode="json") | {"exit_code": _exit_code(verdict, flags)}), nl=False)
    else:
        click.echo("\n".join(formats.text(verdict)))


def _append(variable: str, words: str) -> None:
    """Add to the file that GitHub names in a variable, where it does. Raises MachineError."""
    path = os.environ.get(variable)
    if not path:
        return
    try:
        with open(path, "a", encoding="utf-8") as stream:
            stream.write(words)
    except OSError as error:
        raise MachineError(f"cannot write to {variable}: {error.strerror}", "check the runner's disk") from None
