"""The command line: read, call, say. Nothing heavy is imported until a command runs."""

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, Self

import click

from llmcompress import __version__
from llmcompress.cli.bench import bench_command
from llmcompress.cli.crew import leave_word, several, silent
from llmcompress.cli.export import export_command
from llmcompress.cli.gate import gate_command
from llmcompress.cli.heal import heal_command
from llmcompress.cli.judge import eval_command, verify_command
from llmcompress.cli.look import env_command, inspect_command, list_command
from llmcompress.cli.planning import plan_command
from llmcompress.cli.prune import prune_command
from llmcompress.cli.push import push_command
from llmcompress.cli.quantize import quantize_command
from llmcompress.cli.report import report_command
from llmcompress.cli.rewrite import rewrite_command
from llmcompress.cli.say import tell_bug, tell_error, tell_where
from llmcompress.cli.scoring import score_command
from llmcompress.cli.streams import outlive_readers
from llmcompress.cli.trouble import exit_code, understood
from llmcompress.cli.tune import tune_command
from llmcompress.errors import CompressError, InputError, Stopped

COMMANDS = (
    quantize_command,
    rewrite_command,
    prune_command,
    heal_command,
    export_command,
    push_command,
    score_command,
    plan_command,
    verify_command,
    eval_command,
    report_command,
    gate_command,
    bench_command,
    inspect_command,
    list_command,
    env_command,
    tune_command,
)

CREWED = ("quantize", "score", "eval")  # several processes can share them
AGAIN_SECONDS = 0.05


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="llmcompress")
@click.pass_context
def cli(context: click.Context) -> None:
    """Make a Hugging Face language model small, and prove what was lost.

    \b
    llmcompress quantize demo --budget 3.5bits -o out
    llmcompress eval out --ref demo

    Exit codes: 0 done or gate passed, 1 gate failed, 2 your input, 3 the machine (work kept), 4 gate undecided,
    5 a bug, 6 output in use, 130/143 interrupted.
    """
    if several() and context.invoked_subcommand not in CREWED:
        words = ", ".join(CREWED)
        raise InputError(f"{context.invoked_subcommand} runs in one process", f"several can share {words}")


for command in COMMANDS:
    cli.add_command(command)


def _interrupt(number: int, _: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second signal ends the program at once
    raise Stopped(number)


def _lost(found: Any) -> None:
    """A signal that arrives in what Python cannot stop for, as a weak reference's callback, is sent again."""
    if not isinstance(found.exc_value, Stopped):
        sys.__unraisablehook__(found)
        return
    number = found.exc_value.signal_number
    signal.signal(number, _interrupt)
    again = threading.Timer(AGAIN_SECONDS, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()


class _Manners:
    """Turns whatever escapes a command into a message and an exit code."""

    code = 0

    def __enter__(self) -> Self:
        signal.signal(signal.SIGINT, _interrupt)
        signal.signal(signal.SIGTERM, _interrupt)
        sys.unraisablehook = _lost
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        if error is None:
            return True
        if isinstance(error, SystemExit):
            return False
        self.code = self._answer(error)
        return True

    @staticmethod
    def _answer(error: BaseException) -> int:
        if isinstance(error, click.exceptions.Exit):
            return int(error.exit_code)
        leave_word(error)
        if silent(error):
            return exit_code(error)
        if isinstance(error, click.ClickException):
            error.show()
            return 2
        error = understood(error)
        if isinstance(error, CompressError) and type(error) is not CompressError:
            tell_error(error)
            if os.environ.get("LLMCOMPRESS_DEBUG", "0") not in ("", "0"):
                tell_where(error)
        else:
            tell_bug(error)
        return exit_code(error)


def main(arguments: list[str] | None = None) -> Any:
    """Run the program and exit with the documented code."""
    from llmcompress.model.heap import use_huge_pages

    use_huge_pages()
    outlive_readers()
    manners = _Manners()
    with manners:
        cli.main(args=arguments, prog_name="llmcompress", standalone_mode=False)
    sys.exit(manners.code)
