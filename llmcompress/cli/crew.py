"""Commands that several processes carry out together: `--nproc` on one machine, torchrun on any number."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any

import click

from llmcompress.cli.say import tell_error
from llmcompress.cli.trouble import understood
from llmcompress.errors import CompressError, InputError, Interrupted, MachineError, Stopped

Command = Callable[..., Any]
RANK, SIZE = "RANK", "WORLD_SIZE"
HINT = "run the same command again to go on"
ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # where torchrun wants to find why a process failed
GRACE_SECONDS = 15.0  # for processes to end by themselves once one of them has
POLL_SECONDS = 0.05
CROWD = 4  # processes to a core; each takes the memory of torch and transformers before it does anything


def rank() -> int:
    """Which of the processes of a run this is; 0 where it is the only one."""
    found = os.environ.get(RANK, "0")
    return int(found) if several() and found.isdigit() else 0


def several() -> bool:
    """Whether this is one of several processes of a run."""
    return RANK in os.environ and os.environ.get(SIZE, "1") not in ("", "0", "1")


def crewed(function: Command) -> Command:
    """Add --nproc, and hand the command the crew it works in; None where it is alone."""

    @click.option(
        "--nproc", type=click.IntRange(1), default=1, metavar="N", help="Share the work among N processes here."
    )
    @wraps(function)
    def with_crew(*args: Any, nproc: int, **rest: Any) -> Any:
        if nproc > 1 and not several():
            raise SystemExit(launch(nproc))
        if not several():
            return function(*args, crew=None, **rest)
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a connection that closes is told in our words
        from llmcompress.model.crew import Joined

        with Joined(_end, _words) as crew:
            return function(*args, crew=crew, **rest)

    return with_crew


def _end(error: CompressError) -> None:
    """Say why, and end this process from whatever thread it is: nothing can be closed that others have to answer."""
    if not silent(error):
        tell_error(error)
    os._exit(error.exit_code)


def _words(error: BaseException) -> CompressError:
    """What the other processes are told of an error."""
    found = understood(error)
    if isinstance(found, CompressError):
        return found
    return MachineError(f"failed with {type(found).__name__}: {str(found)[:160]}", "its own log has the traceback")


def silent(error: BaseException) -> bool:
    """Whether another process says what is wrong: the first does, or the second where the first may be gone."""
    lost = type(error).__name__ == "LostError"
    return rank() > (1 if lost else 0)


def leave_word(error: BaseException) -> None:
    """Write why this process fails where torchrun looks for it."""
    path = os.environ.get(ERROR_FILE)
    if path:
        found = understood(error)
        what = found.what if isinstance(found, CompressError) else f"{type(found).__name__}: {found}"
        document = {"message": what, "timestamp": str(int(time.time()))}
        with suppress(OSError):
            Path(path).write_text(json.dumps(document), encoding="utf-8")


def launch(count: int) -> int:
    """Run this very command in `count` processes and wait for them; returns one exit code for all.

    Raises InputError for so many that the machine would do nothing else.
    """
    cores = os.cpu_count() or 1
    if count > cores * CROWD:
        raise InputError(
            f"--nproc {count} is too many for this machine, which has {cores} core(s)",
            f"take --nproc {cores}, or torchrun on several machines",
        )
    shared = {SIZE: str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
    shared |= {key: value for key, value in _defaults(count).items() if key not in os.environ}
    words = [sys.executable, "-m", "llmcompress", *sys.argv[1:]]
    running = [
        subprocess.Popen(words, env=os.environ | shared | {RANK: str(n), "LOCAL_RANK": str(n)}, process_group=0)
        for n in range(count)
    ]
    try:
        return _waited(running)
    except Stopped as stopped:
        _stop(running, stopped.signal_number)
        return Interrupted(stopped.signal_number).exit_code


def _defaults(count: int) -> dict[str, str]:
    threads = max((os.cpu_count() or 1) // count, 1)
    return {"OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0"}


def _free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def _waited(running: Sequence[subprocess.Popen[bytes]]) -> int:
    """The exit code of all, once all have ended: that of the first process, or of another that failed."""
    while all(process.poll() in (None, 0) for process in running):
        if all(process.poll() == 0 for process in running):
            return 0
        time.sleep(POLL_SECONDS)
    killed = [(n, -(process.poll() or 0)) for n, process in enumerate(running) if (process.poll() or 0) < 0]
    end = time.monotonic() + GRACE_SECONDS
    while any(process.poll() is None for process in running) and time.monotonic() < end:
        time.sleep(POLL_SECONDS)
    _stop(running, signal.SIGTERM)
    for number, name in killed:
        tell_error(MachineError(f"process {number} was killed by signal {name}; finished blocks are kept", HINT))
    failed = [process.returncode for process in running if process.returncode > 0]
    return failed[0] if failed else MachineError.exit_code


def _stop(running: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    """Ask those that still run to end, and end them where they do not."""
    for process in running:
        if process.poll() is None:
            process.send_signal(number)
    end = time.monotonic() + GRACE_SECONDS
    for process in running:
        try:
            process.wait(max(end - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
