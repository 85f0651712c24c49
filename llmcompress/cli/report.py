"""`llmcompress report`: what evaluations found, as one HTML page or as Markdown. Needs no torch."""

from pathlib import Path
from typing import Any

import click

from llmcompress.cli.options import keep_apart, speaking
from llmcompress.cli.say import Speaker

PAGE_NAME = "report.html"


@click.command("report")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Default: report.html in the folder of the run; of several runs, in this folder.",
)
@click.option("--md", "markdown", is_flag=True, help="Short Markdown for a pull request, on stdout or to -o.")
@click.option(
    "--profile",
    default="standard",
    show_default=True,
    metavar="NAME",
    help="Limits to judge a single run by: near-lossless, standard, aggressive, or none.",
)
@speaking
def report_command(runs: tuple[Path, ...], output: Path | None, markdown: bool, profile: str, speaker: Speaker) -> None:
    """Show RUNS, one or several, as a self-contained HTML page.

    A run is a folder that quantize or eval wrote, or a report.json. Several are compared with each other, and those
    evaluated on the same text sequence by sequence with the first.
    """
    from llmcompress.pages.reading import read_run

    found = [read_run(path) for path in runs]
    _check(runs, found, output)
    if markdown:
        _markdown(found, output, profile, speaker=speaker)
    else:
        target = output or (found[0].folder / PAGE_NAME if len(found) == 1 else Path(PAGE_NAME))
        size = write_page(found, target, profile)
        document = {"output": target.name, "bytes": size, "runs": [run.name for run in found]}
        speaker.result(document, [f"written to  {target}"])


def _check(paths: tuple[Path, ...], runs: list[Any], output: Path | None) -> None:
    from llmcompress.errors import InputError
    from llmcompress.pages.reading import RECORD_NAME, REPORT_NAME

    if output is not None and not output.absolute().parent.is_dir():
        raise InputError(f"no such folder for the output: {output.parent}", "create it, or choose another -o")
    keep_apart(output, *paths, *(run.folder / name for run in runs for name in (REPORT_NAME, RECORD_NAME)))
    for path, run in zip(paths, runs, strict=True):
        if run.report is None and len(runs) > 1:
            hint = f"llmcompress eval {path} --ref MODEL"
            raise InputError(f"{path}: not evaluated yet, so it cannot be compared", hint)


def write_page(runs: list[Any], target: Path, profile: str = "standard") -> int:
    """Write the page of one run or several, atomically; its size in bytes. Raises InputError and MachineError."""
    from llmcompress.files import commit_bytes

    content = page_of(runs, profile)
    commit_bytes(target, content)
    return len(content)


def page_of(runs: list[Any], profile: str = "standard") -> bytes:
    """The page of one run or several. Raises InputError for a profile there is not."""
    from llmcompress.pages.compare import comparison_page
    from llmcompress.pages.single import run_page

    if len(runs) == 1:
        return run_page(runs[0], profile=profile, frontier=frontier_of(runs[0])).encode()
    return comparison_page(runs).encode()


def frontier_of(run: Any) -> Any:
    """Bits against expected damage with the plan marked, where the run has its scores; None elsewhere."""
    if run.scores is None or run.plan is None:
        return None
    from llmcompress.cli.drawing import frontier_figure
    from llmcompress.compress.decide import check_scores, desk_of, frontier, pick, point_of

    check_scores(run.scores)
    scores = pick(run.scores)
    if not any(layer.candidates for layer in scores.layers):
        return None
    desk = desk_of(run.scores, scores)
    return frontier_figure(desk, run.plan.allocation, [point_of(allocation) for allocation in frontier(desk)])


def _markdown(runs: list[Any], output: Path | None, profile: str, *, speaker: Speaker) -> None:
    from llmcompress.files import commit_bytes
    from llmcompress.pages.markdown import comparison_markdown, run_markdown

    text = run_markdown(runs[0], profile) if len(runs) == 1 else comparison_markdown(runs)
    if output is not None:
        commit_bytes(output, text.encode())
        speaker.result({"output": output.name}, [f"written to  {output}"])
    elif speaker.json:
        speaker.result({"markdown": text})
    else:
        click.echo(text, nl=False)
