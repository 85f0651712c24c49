"""What a run says, kept in a file: `run.log` beside the state of an unfinished run, or where `--log-file` says."""

import logging
import traceback
from pathlib import Path
from types import TracebackType
from typing import Self

LOG = logging.getLogger("llmcompress")
NAME = "run.log"


class LogFile(logging.FileHandler):
    """Lines with their times. A log that cannot be written is no reason for a run to stop."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, encoding="utf-8", delay=True)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, if the disk takes it."""
        try:
            super().emit(record)
        except OSError:
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        """Without a word: the error that filled the disk is told by the run."""


class RunLog:
    """The log of one run: from `start` on to the end of the block, with the error that ends it."""

    def __init__(self, path: Path) -> None:
        self._handler = LogFile(path)

    def start(self) -> None:
        """From here on everything is kept."""
        LOG.addHandler(self._handler)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._handler in LOG.handlers and error is not None:
            LOG.error("ended by\n%s", "".join(traceback.format_exception(error)).rstrip())
        LOG.removeHandler(self._handler)
        self._handler.close()
