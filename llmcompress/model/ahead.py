"""The next block is read from disk while this one is computed: into the system's cache, not into memory of ours."""

import threading
from collections.abc import Iterable
from contextlib import suppress

from llmcompress.preflight.header import TensorEntry

PIECE_BYTES = 1 << 20


class ReadAhead:
    """Reads files on a thread of its own and drops what it reads; whoever reads them next finds them in memory.

    Nothing depends on it: what cannot be read is left to that reader to complain of.
    """

    def __init__(self) -> None:
        self._thread = threading.Thread()
        self._over = threading.Event()

    def begin(self, entries: Iterable[TensorEntry]) -> None:
        """Read these tensors from now on, and no longer what was asked for before."""
        self._over.set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=_read, args=(list(entries), self._over), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until all that was asked for has been read."""
        if self._thread.ident is not None:
            self._thread.join()


def _read(entries: list[TensorEntry], over: threading.Event) -> None:
    piece = memoryview(bytearray(PIECE_BYTES))
    for entry in entries:
        with suppress(OSError), entry.path.open("rb", buffering=0) as stream:
            stream.seek(entry.start)
            for start in range(entry.start, entry.stop, PIECE_BYTES):
                if over.is_set() or not stream.readinto(piece[: entry.stop - start]):
                    return


class Direction:
    """Which block is likely to be wanted after one, from the order in which they were wanted so far."""

    def __init__(self) -> None:
        self._last = -1

    def after(self, index: int) -> int | None:
        """The neighbour on the far side of the block before; None where there was no neighbour before."""
        step, self._last = index - self._last, index
        return index + step if abs(step) == 1 else None
