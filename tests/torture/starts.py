"""The program in processes of its own, many after another: forked from this one, traced and disturbed by strace.

This process makes the imports that take seconds and does nothing else that leaves threads behind.
"""

import gc
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.forked import IMPORTED, begin, ended

MORE = (
    *("llmcompress.cli", "llmcompress.cli.figures", "rich.table", "llmcompress.compress.heal.run"),
    *("llmcompress.compress.export.run", "llmcompress.pages.single", "llmcompress.pages.reading"),
    *("llmcompress.compress.decide", "llmcompress.compress.scoring", "llmcompress.eval.skipping"),
)
TIMEOUT_SECONDS = 120.0
ATTACH_SECONDS = 20.0


class NoStraceError(Exception):
    """There is no strace, or it may not trace."""


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit status, negative for a signal, what it said, how long it took."""

    status: int
    out: str
    err: str
    seconds: float


class Running:
    """A run that has begun. With `gate` it waits until `go` is called."""

    def __init__(self, words: Sequence[str], folder: Path, *, gate: bool = False) -> None:
        self._talk = Path(tempfile.mkdtemp(prefix="torture-talk-"))
        request: dict[str, object] = {"words": [*words], "folder": str(folder), "changes": {}}
        request |= {name: str(self._talk / name) for name in ("out", "err")}
        self._ready, self._gate = os.pipe() if gate else (None, None)
        self._began = time.monotonic()
        self.pid = begin(request, self._ready)

    def go(self) -> None:
        """Let a run with a gate begin."""
        if self._gate is not None:
            os.write(self._gate, b"x")
        self._began = time.monotonic()

    def strike(self, number: int) -> None:
        """Send a signal, if it still runs."""
        os.kill(self.pid, number)

    def wait(self, timeout: float = TIMEOUT_SECONDS) -> Ended:
        """Its end; it is killed after `timeout` seconds."""
        status = ended(self.pid, timeout)
        seconds = time.monotonic() - self._began
        for handle in (self._ready, self._gate):
            if handle is not None:
                os.close(handle)
        said = [
            path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
            for path in (self._talk / "out", self._talk / "err")
        ]
        shutil.rmtree(self._talk)
        return Ended(status, *said, seconds)


def prepare() -> None:
    """Import what takes long, once."""
    for name in (*IMPORTED, *MORE):
        importlib.import_module(name)
    conversions = importlib.import_module("transformers.conversion_mapping")
    conversions.get_checkpoint_conversion_mapping("llama")  # a third of a run, and the same in each
    gc.freeze()


def run(words: Sequence[str], folder: Path) -> Ended:
    """One undisturbed run."""
    return Running(words, folder).wait()


def whole(words: Sequence[str], folder: Path) -> "subprocess.Popen[str]":
    """One run of the installed program, imports and all."""
    command = [sys.executable, "-m", "llmcompress", *words]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def need_strace() -> None:
    """Raises NoStraceError with the reason where runs cannot be traced."""
    if shutil.which("strace") is None:
        raise NoStraceError("strace is not installed (apt-get install strace)")
    found = subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True, text=True, check=False)
    if found.returncode:
        raise NoStraceError(f"strace may not trace here: {found.stderr.strip()[:120]}")


def traced(words: Sequence[str], folder: Path, options: Sequence[str], log: Path) -> Ended:
    """One run under strace with `options`, which writes its log to `log`."""
    running = Running(words, folder, gate=True)
    tracer = subprocess.Popen(
        ["strace", "-f", "-qq", "-o", str(log), *options, "-p", str(running.pid)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _until(lambda: _tracer_of(running.pid) == tracer.pid or tracer.poll() is not None, ATTACH_SECONDS)
        running.go()
        found = running.wait()
    finally:
        if tracer.poll() is None:
            try:
                tracer.wait(5)
            except subprocess.TimeoutExpired:
                tracer.send_signal(signal.SIGINT)
        _, said = tracer.communicate()
    if tracer.returncode not in (0, -signal.SIGINT, None) and "exited" not in said and said.strip():
        raise NoStraceError(said.strip()[:200])
    return found


def _tracer_of(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("TracerPid:"):
            return int(line.split()[1])
    return 0


def _until(true: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.002)


def quiet_environment() -> Mapping[str, str]:
    """What every run here is told."""
    return {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
