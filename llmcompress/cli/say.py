"""What the program says: results to stdout, talk to stderr, exactly one JSON document with --json."""

import codecs
import json
import logging
import os
import re
import shlex
import sys
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from llmcompress.errors import CompressError, Finding, InputError, Refused, one_line
from llmcompress.files import to_json
from llmcompress.pictures.words import megabytes as megabytes

MOST_LINES = 6
USUAL_WIDTH, WIDEST = 80, 10_000
BEYOND_ASCII = re.compile(r"[^\x00-\x7f]")
LOG = logging.getLogger("llmcompress")
LOG.addHandler(logging.NullHandler())


class Speaker:
    """Writes for one command. `quiet` silences talk, `silent` results too; `json` leaves one document on stdout."""

    def __init__(self, *, json: bool, quiet: bool, verbose: bool, silent: bool = False) -> None:
        self.json, self.silent = json, silent
        self.quiet = quiet
        self.verbose = verbose
        plain: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False, "soft_wrap": True}
        self.err, self.out = Console(stderr=True, **plain), Console(**plain)
        for console in (self.err, self.out):
            console.width = console.width or USUAL_WIDTH  # COLUMNS=0 says that nobody knows it

    def talk(self, text: str) -> None:
        """A remark on stderr."""
        said = one_line(text)
        LOG.info(said)
        if not self.quiet:
            self.err.print(said)

    def result(self, document: Any, lines: Iterable[str] = ()) -> None:
        """The answer: the document with --json, otherwise the lines."""
        if self.silent:
            return
        if self.json:
            click.echo(json_of(document), nl=False)
            return
        for line in lines:
            self.out.print(one_line(line))

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        """A table on stdout, nothing of which is cut; silent with --json."""
        if self.json or self.silent:
            return
        table = Table(title=one_line(title) or None, box=None, pad_edge=False, title_justify="left")
        for place, column in enumerate(columns):
            table.add_column(one_line(column), justify="left" if place == 0 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*(one_line(cell) for cell in row))
        wide = Measurement.get(self.out, self.out.options.update(max_width=WIDEST), table).maximum
        self.out.width = max(self.out.width, wide)
        self.out.print(table)


def tell_where(error: BaseException) -> None:
    """The traceback of an error to the log, or to stderr where there is none."""
    text = "".join(traceback.format_exception(error))
    LOG.error("traceback\n%s", text)
    if not any(isinstance(handler, logging.FileHandler) for handler in LOG.handlers):
        click.echo(text, err=True, nl=False)


def json_of(document: Any) -> str:
    """JSON for stdout: its letters are escaped where stdout is not in UTF-8, as JSON has to be."""
    coding = codecs.lookup(getattr(sys.stdout, "encoding", None) or "utf-8").name
    text = to_json(document)
    return text if coding == "utf-8" else BEYOND_ASCII.sub(lambda found: json.dumps(found[0])[1:-1], text)


def tell_error(error: CompressError) -> None:
    """An error and its hint on stderr; of several findings as many as fit into `MOST_LINES`. The log has all."""
    LOG.error("%s (%s)", error.what, error.hint)
    findings = error.findings if isinstance(error, Refused) else (Finding(error.what, error.hint),)
    shown = len(findings)
    while shown > 1 and len(_told(findings[:shown])) > MOST_LINES - (shown < len(findings)):
        shown -= 1
    lines = _told(findings[:shown])
    if shown < len(findings):
        lines.append(f"error: and {len(findings) - shown} more; --log-file has all of them")
    for line in lines:
        click.echo(line, err=True)


def _told(findings: Sequence[Finding]) -> list[str]:
    """A line for each finding, and one for a hint after the last of those that share it."""
    lines = []
    for place, finding in enumerate(findings):
        lines.append(f"error: {finding.what}")
        last = place + 1 == len(findings) or findings[place + 1].hint != finding.hint
        if finding.hint and last:
            lines.append(f"  hint: {finding.hint}")
    return lines


def tell_bug(error: BaseException) -> None:
    """A bug: one line for the user, the traceback to the log, or to stderr where there is none."""
    logged = any(isinstance(handler, logging.FileHandler) for handler in LOG.handlers)
    where = "in the log file" if logged else "below"
    click.echo(f"error: this is a bug in llmcompress: {type(error).__name__}; the traceback is {where}", err=True)
    tell_where(error)
    click.echo("  hint: report it with the output of `llmcompress env`", err=True)


def open_log(path: Path | None) -> None:
    """Send the log to a file. Raises InputError where there is no folder for it."""
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
    if path is None:
        return
    if not path.absolute().parent.is_dir():
        raise InputError(f"--log-file: no such folder: {path.parent}", "create it, or name another file")
    from llmcompress.compress.runlog import LogFile

    LOG.addHandler(LogFile(path))


def command_line() -> str:
    """The command as typed, paths reduced to their last part, for a model card; a shell reads it as it was meant."""
    words = ["llmcompress"]
    given = iter(sys.argv[1:])
    for word in given:
        if word == "--nproc" or word.startswith("--nproc="):  # changes nothing about the result
            next(given if word == "--nproc" else iter(()), None)
            continue
        flag, equals, value = word.partition("=")
        plain = value if equals else word
        short = (
            Path(plain).name if "/" in plain and (plain.startswith((".", "/", "~")) or Path(plain).exists()) else plain
        )
        words.append(f"{flag}={short}" if equals else short)
    return one_line(shlex.join(words))


def dropping_lines(dropping: Any) -> list[str]:
    """What dropping blocks measured beside keeping them all, and what was decided."""
    lines = []
    for trial in dropping.trials:
        word = f"without blocks {', '.join(map(str, trial.dropped))}" if trial.dropped else "with all blocks"
        lines.append(
            f"  measured KL {trial.measured_kld:.5f} ± {trial.standard_error:.5f} at {trial.bits_per_weight:.4f} bits "
            f"over the original's weights: {word}"
        )
    decided = f"drops blocks {', '.join(map(str, dropping.dropped))}" if dropping.dropped else "keeps all blocks"
    if not any(not trial.dropped for trial in dropping.trials):
        decided += "; with all of them the budget cannot be met"
    return [*lines, f"joint plan: {decided}"]


def typed(source: Any) -> str:
    """A word that names this source on a command line again."""
    named = source.repository is not None or source.name == "demo"
    return shlex.quote(str(source.name)) if named else path_word(os.path.relpath(source.path))


def path_word(path: Path | str) -> str:
    """A path as a word of a command line: quoted for a shell, and no option where it begins with a dash."""
    word = str(path)
    return shlex.quote(f"./{word}" if word.startswith("-") else word)


def as_set(names: Iterable[object]) -> str:
    """Blocks, halves or groups as a set."""
    return "{" + ", ".join(map(str, names)) + "}"


def step_line(what: str, step: Any) -> str:
    """One step of a search among blocks: what it changes, its KL, and how the runner-up compares."""
    line = f"  {what}: KL {step.kld:.5f} ± {step.standard_error:.5f}"
    if step.rival:
        clear = step.rival_more > 2 * step.rival_error
        line += f"; {as_set(step.rival)} {'' if clear else 'is no different: '}{step.rival_more:+.5f}"
    return line
