"""Run one command to its end, with its wall time and the peak memory of it and its children."""

import os
import signal
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

LOG_TAIL = 2000


class Failed(Exception):
    """A command that did not end well; the text is the end of its log."""


@dataclass(frozen=True)
class Made:
    """What a finished command took. `peak_mib` is of the largest process among it and the children it waited for."""

    wall_seconds: float
    cpu_seconds: float
    peak_mib: float


def environment(threads: int, home: Path | None) -> dict[str, str]:
    """Same threads for everybody, no network, no packages of ours in the path of a peer, a home of its own."""
    kept = dict(os.environ)
    if home is not None:
        home.mkdir(parents=True, exist_ok=True)
        kept.pop("PYTHONPATH", None)
        kept |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / ".cache")}
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        kept[name] = str(threads)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        kept[name] = "1"
    return kept | {"TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "", "PYTHONHASHSEED": "0"}


def launch(words: list[str], outside: dict[str, str], log: Path, timeout: float, *, stdout: Path | None = None) -> Made:
    """Run a command; its output goes to `log`, what it says on stdout to `stdout` where given.

    Raises Failed with the end of the log when it fails or takes too long; its children are ended with it.
    """
    began = time.monotonic()
    for path in {log, stdout or log}:
        path.write_bytes(b"")
    with log.open("ab") as errors, (stdout or log).open("ab") as said:
        process = subprocess.Popen(words, env=outside, stdout=said, stderr=errors, start_new_session=True)
        timer = threading.Timer(timeout, os.killpg, (process.pid, signal.SIGKILL))
        timer.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            timer.cancel()
            if process.returncode is None:  # interrupted
                os.killpg(process.pid, signal.SIGKILL)
    if process.returncode != 0:
        text = log.read_text(errors="replace")[-LOG_TAIL:]
        raise Failed(f"exit {process.returncode} after {time.monotonic() - began:.0f} s: {text}")
    return Made(time.monotonic() - began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)
