"""The program in a process of its own, without the seconds its imports take: forked from one that has made them.

    python tests/forked.py     reads requests from its standard input, one JSON document a line, and answers them

A request has `words`, `folder`, `changes` to the environment, and the files that standard output and error go to; the
answer is the exit status. Nothing has run in the process that is forked but imports; it has one thread.
"""

import importlib
import io
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
        ranks: int = 1,
        call: str = "",
    ) -> subprocess.CompletedProcess[str]:
        """One run, as `subprocess.run` would tell it, killed after `timeout` seconds.

        ranks  how many processes make it together; what they say comes one after the other
        call   `module:function` to be called, without arguments, in place of the program
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with tempfile.TemporaryDirectory() as place:
            said = {name: os.path.join(place, name) for name in ("out", "err")}
            request: dict[str, object] = {
                "words": [*map(str, words)],
                "folder": str(folder),
                "changes": dict(changes or {}),
            }
            request |= {"timeout": timeout, "ranks": ranks, "call": call, **said}
            print(json.dumps(request), file=self._process.stdin, flush=True)
            status = json.loads(self._process.stdout.readline())
            out, err = (
                "".join(Path(f"{path}{n or ''}").read_text(encoding="utf-8", errors="replace") for n in range(ranks))
                for path in said.values()
            )
        return subprocess.CompletedProcess([*map(str, words)], status, out, err)

    def children(self) -> list[int]:
        """The process ids of the run that is going on, in the order of its processes."""
        pid = self._process.pid
        return sorted(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))

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

    if call := request.get("call"):
        module, _, name = str(call).partition(":")
        return int(getattr(importlib.import_module(module), name)() or 0)
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


def together(request: dict[str, Any]) -> int:
    """The exit status of one run of several processes, once all have ended: the first that is not 0.

    What process n says goes to files of its own, `out` and `err` with n after them.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    size = request["ranks"]
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    requests = [
        request
        | {"changes": request["changes"] | shared | {"RANK": str(rank)}}
        | ({key: f"{request[key]}{rank}" for key in ("out", "err")} if rank else {})
        for rank in range(size)
    ]
    pids = [begin(one) for one in requests]
    statuses = [ended(pid, request["timeout"]) for pid in pids]
    return next((status for status in statuses if status), 0)


def serve() -> None:
    """Import what takes long, then answer."""
    for name in IMPORTED:
        importlib.import_module(name)
    talk = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        print(together(request) if request["ranks"] > 1 else ended(begin(request), request["timeout"]), file=talk)
        talk.flush()


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    serve()
