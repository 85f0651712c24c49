"""One progress bar with an ETA on a terminal, one line per block elsewhere."""

import time
from types import TracebackType
from typing import Any, Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from llmcompress.cli.say import Speaker


class BlockProgress:
    """Progress over the blocks of a model."""

    def __init__(self, speaker: Speaker) -> None:
        self._speaker = speaker
        self._bar: Progress | None = None
        self._began = time.monotonic()
        self._total = 0
        self._seen = 0
        self._done = 0
        if speaker.err.is_terminal and not speaker.quiet:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=speaker.err,
                transient=True,
            )
            self._task = self._bar.add_task("opening", total=None)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._bar is not None:
            self._bar.stop()

    def stage(self, name: str) -> None:
        """A new stage of the run."""
        if self._bar is not None:
            self._bar.update(self._task, description=name)
        else:
            self._speaker.talk(f"{name} ...")

    def blocks(self, total: int) -> None:
        """How many blocks there will be; the clock of the ETA starts here."""
        self._total = total
        self._began = time.monotonic()
        if self._bar is not None:
            self._bar.reset(self._task, total=total, description="quantizing blocks")

    def block(self, outcome: Any) -> None:
        """One block is finished."""
        self._seen += 1
        self._done += not outcome.resumed
        if self._speaker.verbose:
            for linear in outcome.linears:
                loss = f"relative output error {linear.relative_loss:.2%}"
                self._speaker.talk(f"  {linear.linear}  {linear.bits} bits  {loss}")
        reasons: dict[str, list[str]] = {}
        for fallback in outcome.fallbacks:
            reasons.setdefault(fallback.reason, []).append(fallback.where)
        for reason, places in reasons.items():
            more = f" and {len(places) - 1} more" if len(places) > 1 else ""
            self._speaker.talk(f"  {places[0]}{more}: {reason}")
        if self._bar is not None:
            self._bar.advance(self._task)
        elif not outcome.resumed:
            left = (time.monotonic() - self._began) / self._done * (self._total - self._seen)
            worst = max((linear.relative_loss for linear in outcome.linears), default=0.0)
            self._speaker.talk(
                f"block {outcome.block + 1}/{self._total}  {outcome.seconds:.1f} s  "
                f"largest relative output error {worst:.2%}  about {left:.0f} s left"
            )
