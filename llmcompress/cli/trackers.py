"""`--log-to`: the numbers of a run to wandb, mlflow or trackio while it goes on. What fails there is a warning here."""

import contextlib
import importlib
import os
import resource
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import wraps
from types import TracebackType
from typing import Any, Self

import click

from llmcompress.cli.crew import rank
from llmcompress.cli.say import Speaker
from llmcompress.errors import InputError, MachineError

Values = Mapping[str, float | None]
Facts = Mapping[str, str | int | float]
PROJECT = "llmcompress"


@dataclass(frozen=True)
class Target:
    """A run begun in a library: what takes numbers at a step, and what ends it, well or not."""

    log: Callable[[dict[str, float], int | None], object]
    finish: Callable[[bool], object]


def _wandb(library: Any, project: str, name: str, facts: dict[str, Any]) -> Target:
    run = library.init(project=project, name=name, config=facts)
    return Target(lambda values, step: run.log(values, step=step), lambda well: run.finish(exit_code=int(not well)))


def _mlflow(library: Any, project: str, name: str, facts: dict[str, Any]) -> Target:
    library.set_experiment(project)
    library.start_run(run_name=name)
    library.log_params(facts)
    return Target(
        lambda values, step: library.log_metrics(values, step=step),
        lambda well: library.end_run("FINISHED" if well else "FAILED"),
    )


def _trackio(library: Any, project: str, name: str, facts: dict[str, Any]) -> Target:
    library.init(project=project, name=name, config=facts)
    return Target(lambda values, step: library.log(values, step=step), lambda well: library.finish())


BEGIN = {"wandb": _wandb, "mlflow": _mlflow, "trackio": _trackio}


def _library(name: str) -> Any:
    """The library, imported. Raises MachineError where it is not installed, or only half."""
    library, doubt = None, _Doubt()
    with doubt:
        if name == "wandb":
            library = importlib.import_module("wandb")
        elif name == "mlflow":
            library = importlib.import_module("mlflow")
        else:
            library = importlib.import_module("trackio")
    if isinstance(doubt.error, ModuleNotFoundError) and doubt.error.name == name:
        raise MachineError(f"--log-to {name}: not installed", f"pip install 'llmcompress[{name}]'")
    if doubt.error is not None:
        raise MachineError(f"--log-to {name}: cannot be imported: {doubt.words}", f"pip install --upgrade {name}")
    if getattr(library, "__file__", "") is None:  # a folder of the name, as the one that wandb writes to
        raise MachineError(f"--log-to {name}: not installed", f"pip install 'llmcompress[{name}]'")
    return library


class Tracker:
    """Numbers of one command for one library, or for none; after the first failure for none.

    word  what --log-to was given: a library, or LIBRARY:PROJECT
    """

    def __init__(self, word: str | None, speaker: Speaker) -> None:
        self._name, _, project = (word or "").partition(":")
        self._project, self._speaker = project or PROJECT, speaker
        self._target: Target | None = None
        if word is not None and self._name not in BEGIN:
            raise InputError(f"--log-to {word}: no such library", f"use one of {', '.join(BEGIN)}")
        self._module = None if word is None else _library(self._name)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with self._forgiving():
            if self._target is not None:
                self._target.finish(error is None)

    def start(self, name: str, facts: Facts) -> None:
        """Begin a run under a name, with what it was asked."""
        with self._forgiving():
            if self._module is not None:
                self._target = BEGIN[self._name](self._module, self._project, name, dict(facts))

    def log(self, values: Values, step: int | None = None) -> None:
        """Numbers at a step of the run, or of its end; those that are None are left out."""
        with self._forgiving():
            if self._target is not None:
                self._target.log({name: value for name, value in values.items() if value is not None}, step)

    @contextlib.contextmanager
    def _forgiving(self) -> Iterator[None]:
        """Nobody is asked anything, nothing is printed on stdout, and no failure reaches the run."""
        doubt = _Doubt()
        with open(os.devnull, encoding="utf-8") as nothing, contextlib.redirect_stdout(sys.stderr):
            before, sys.stdin = sys.stdin, nothing
            try:
                with doubt:
                    yield
            finally:
                sys.stdin = before
        if doubt.error is not None:
            self._target = self._module = None
            self._speaker.talk(f"warning: --log-to {self._name}: {doubt.words}; the run goes on")


class _Doubt:
    """Keeps whatever error ends its block; signals and exits pass."""

    error: BaseException | None = None

    @property
    def words(self) -> str:
        """The first line of what it says."""
        return str(self.error).strip().partition("\n")[0][:160] or type(self.error).__name__

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> bool:
        if not isinstance(error, Exception):
            return False
        self.error = error
        return True


def tracking(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --log-to, and hand the command a Tracker: to the first of several processes. Goes below `speaking`."""

    @click.option("--log-to", metavar="LIBRARY[:PROJECT]", help="Send numbers to wandb, mlflow or trackio.")
    @wraps(function)
    def with_tracker(*args: Any, log_to: str | None, speaker: Speaker, **rest: Any) -> Any:
        with Tracker(None if rank() else log_to, speaker) as tracker:
            return function(*args, speaker=speaker, tracker=tracker, **rest)

    return with_tracker


def block_numbers(outcome: Any, blocks: int) -> Values:
    """What a finished block is worth knowing by."""
    return {
        "progress": (outcome.block + 1) / blocks,
        "block_seconds": outcome.seconds,
        "largest_relative_error": max((linear.relative_loss for linear in outcome.linears), default=None),
        "adjusted": len(outcome.fallbacks),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def report_numbers(report: Any) -> Values:
    """What an evaluation found."""
    found, size = report.summary, report.footprint
    return {
        "kld": found.kld.mean,
        "kld_low": found.kld.low,
        "kld_high": found.kld.high,
        "perplexity_reference": found.perplexity_reference,
        "perplexity": found.perplexity_candidate,
        "perplexity_ratio": found.perplexity_ratio.mean,
        "top1": found.top1.mean,
        "bits_per_weight": size.bits_per_weight,
        "file_bits_per_weight": size.file_bits_per_weight,
        "shard_bytes": size.shard_bytes,
    }
