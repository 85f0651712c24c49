"""Standard output and error that may lose their readers: `| head` ends nothing and changes no exit code."""

import os
import sys
from typing import Any


class Outliving:
    """A text stream that goes on into nowhere once nobody reads it any more; letters that its coding lacks become `?`.

    leaves  the errors after which it does
    """

    def __init__(self, stream: Any, leaves: type[OSError] = BrokenPipeError) -> None:
        self._stream, self._leaves = stream, leaves
        if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        """Write it, for as long as somebody reads."""
        try:
            return int(self._stream.write(text))
        except self._leaves:
            self._leave()
        return len(text)

    def flush(self) -> None:
        """Hand over what is held back."""
        try:
            self._stream.flush()
        except self._leaves:
            self._leave()

    def _leave(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive_readers() -> None:
    """Let the program finish, with the exit code of what it did, when what it says is no longer read.

    click and rich would end it with 1, which is a gate that failed. What is said on stderr is no result: there a disk
    that is full ends nothing either.
    """
    if sys.stdout is not None:
        sys.stdout = Outliving(sys.stdout)
    if sys.stderr is not None:
        sys.stderr = Outliving(sys.stderr, OSError)
