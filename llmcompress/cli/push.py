"""`llmcompress push`, and `--push`: an output to the Hub, verified, with its evaluation on the card."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from llmcompress.cli.options import pick_device, speaking
from llmcompress.cli.say import Speaker, path_word

Command = Callable[..., Any]
PUBLIC = "Push to a public repository. Default: a private one."


def push_options(function: Command) -> Command:
    """Add --push and --public."""
    for option in (
        click.option("--public", is_flag=True, help=f"With --push: {PUBLIC[0].lower()}{PUBLIC[1:]}"),
        click.option(
            "--push", "repository", metavar="ORG/NAME", help="Push the output to the Hub once it is verified."
        ),
    ):
        function = option(function)
    return function


@click.command("push")
@click.argument("output", type=click.Path(path_type=Path))
@click.argument("repository", metavar="ORG/NAME")
@click.option("--public", is_flag=True, help=PUBLIC)
@click.option(
    "--report",
    "report_path",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="A report.json, or the folder of one, for the model card. Default: that of OUTPUT-eval, where there is one.",
)
@click.option("--device", default=None, help="Where it is verified: cpu or cuda. Default: cpu.")
@speaking
def push_command(
    output: Path, repository: str, public: bool, report_path: Path | None, device: str | None, speaker: Speaker
) -> None:
    """Push OUTPUT, what quantize, prune, heal or export wrote, to the Hub as ORG/NAME.

    It is verified first. All files go in one commit: a push that is interrupted leaves none, and the same command
    goes on with what is not uploaded yet. What eval measured is put on the model card, and report.html beside it.
    """
    from llmcompress.errors import InputError
    from llmcompress.hub.push import look_at

    if not output.is_dir():
        raise InputError(f"no such output: {output}", "give a folder that quantize, prune, heal or export wrote")
    look_at(repository, public)
    from llmcompress.compress.sealed import record_of, verify_output
    from llmcompress.compress.verify import require

    _, record = record_of(output)
    check_original(repository, getattr(record, "base", record.origin).repository)
    speaker.talk(f"verifying {output.name} ...")
    require(verify_output(output, pick_device(device)))
    document, lines = push_output(output, repository, public=public, report_path=report_path, speaker=speaker)
    speaker.result(document, lines)


def check_target(repository: str | None, public: bool) -> None:
    """Where --push was given, refuse a push that could not succeed before there is any work for it.

    Raises what `hub.push.look_at` raises, and InputError for --public alone.
    """
    from llmcompress.errors import InputError
    from llmcompress.hub.push import look_at

    if repository is not None:
        look_at(repository, public)
    elif public:
        raise InputError("--public says nothing without --push", "add --push ORG/NAME, or leave it out")


def check_original(repository: str | None, original: str | None) -> None:
    """Refuse to push over the model that was compressed. Raises InputError."""
    from llmcompress.errors import InputError

    if repository is not None and original is not None and original.lower() == repository.lower():
        raise InputError(f"{repository} is the original", "push to another name, so that nothing of it is replaced")


def pushed(output: Path, repository: str, public: bool, speaker: Speaker) -> tuple[dict[str, Any], list[str]]:
    """`push_output` of what was just written: an error says that it is complete, and how to push it later."""
    from llmcompress.errors import CompressError, InputError, MachineError

    try:
        return push_output(output, repository, public=public, report_path=None, speaker=speaker)
    except (InputError, MachineError) as error:
        again = f"{output.name} is complete: llmcompress push {path_word(output)} {repository}" + " --public" * public
        found: CompressError = type(error)(error.what, f"{error.hint}; {again}")
        raise found from None


def push_output(
    output: Path, repository: str, *, public: bool, report_path: Path | None, speaker: Speaker
) -> tuple[dict[str, Any], list[str]]:
    """Push a verified output; what to say of it. Raises what `hub.push.push` raises."""
    from huggingface_hub.utils import disable_progress_bars

    from llmcompress.cli.packing import pack
    from llmcompress.hub.push import Pushed, push

    if speaker.quiet or speaker.json or not speaker.err.is_terminal:
        disable_progress_bars()
    packed = pack(output, repository, report_path=report_path, public=public)
    for remark in packed.remarks:
        speaker.talk(remark)
    for event in push(repository, packed.items, public=public, message=packed.message):
        if isinstance(event, Pushed):
            return _said(event, packed.evaluated, output)
        speaker.talk(event)
    raise RuntimeError("a push ended without an end")


def _said(done: Any, evaluated: bool, output: Path) -> tuple[dict[str, Any], list[str]]:
    where = "public" if done.public else "private"
    document = {
        "repository": done.repository,
        "commit": done.commit,
        "url": done.url,
        "public": done.public,
        "files": done.files,
        "removed": list(done.removed),
        "changed": done.changed,
        "evaluated": evaluated,
    }
    lines = [f"pushed      {done.repository}, {where}, {done.files} files in commit {done.commit[:12]}"]
    if not done.changed:
        lines = [f"unchanged   {done.repository} has these files already, in commit {done.commit[:12]}"]
    if done.removed:
        lines.append(f"removed     {', '.join(done.removed)}, of an earlier push")
    if not evaluated:
        command = f"llmcompress eval {path_word(output)} --ref MODEL"
        lines.append(f"next        {command}, and push again: the card has no figures yet")
    return document, [*lines, f"page        {done.url}"]
