"""The program in a process of its own, without the seconds its imports take: forked from one that has made them.

    python tests/forked.py     reads requests from its standard input, one JSON document a line, and answers them

A request has `words`, `folder`, `changes` to the environment, and the files that standard output and error go to; the
answer is the exit status. Nothing has run in the process that is forked but imports; it has one thread.
"""

import importlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

POLL_SECONDS = 0.005
NOTHING: Mapping[str, str] = {}
IMPORTED = (
    *("llmcompress.compress.run", "llmcompress.compress.verify", "llmcompress.compress.prune.run"),
    *("llmcompress.eval.run", "transformers.models.llama.modeling_llama"),
)


class Forker:
    """Runs of the program, one after another."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__).resolve())]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(
        self,
        words: Sequence[str | Path],
        folder: Path,
        *,
        changes: Mapping[str, str] | None = None,
        timeout: float = 240,
    ) -> subprocess.CompletedProcess[str]:
        """One run, as `subprocess.run` would tell it, killed after `timeout` seconds."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.TemporaryDirectory() as place:
            said = {name: os.path.join(place, name) for name in ("out", "err")}
            request: dict[str, object] = {
                "words": [*map(str, words)],
                "folder": str(folder),
                "changes": dict(changes or {}),
            }
            request |= {"timeout": timeout, **said}
            print(json.dumps(request), file=self._process.stdin, flush=True)
            status = json.loads(self._process.stdout.readline())
            out, err = (Path(path).read_text(encoding="utf-8", errors="replace") for path in said.values())
        return subprocess.CompletedProcess([*map(str, words)], status, out, err)

    def close(self) -> None:
        """End it."""
        self._process.communicate()


def child(request: dict[str, object]) -> int:
    """The program, in a fork."""
    os.chdir(str(request["folder"]))
    changes = request["changes"]
    assert isinstance(changes, dict)
    os.environ.update(changes)
    for number, path in ((1, request["out"]), (2, request["err"])):
        handle = os.open(str(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
        os.close(handle)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    sys.stdin, sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.FileIO(number, mode, closefd=False), "utf-8", line_buffering=True)
        for number, mode in ((0, "r"), (1, "w"), (2, "w"))
    )
    words = request["words"]
    assert isinstance(words, list)
    sys.argv = ["llmcompress", *words]
    from llmcompress.cli import main

    try:
        main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def begin(request: dict[str, object], ready: int | None = None) -> int:
    """Start one run; its process id. With `ready`, a file descriptor, it waits until there is something to read."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if ready is not None:
                os.read(ready, 1)
            status = child(request)
        finally:
            if sys.exc_info()[0] is not None:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return pid


def ended(pid: int, timeout: float) -> int:
    """The exit status of one run, which is killed after `timeout` seconds; that of a signal is negative."""
    end = time.monotonic() + timeout
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            os.kill(pid, 9)
            end = float("inf")
        time.sleep(POLL_SECONDS)


def serve() -> None:
    """Import what takes long, then answer."""
    for name in IMPORTED:
        importlib.import_module(name)
    talk = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        print(ended(begin(request), request["timeout"]), file=talk, flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    serve()
