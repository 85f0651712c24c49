"""A disk too small for the work: a tmpfs of every size from nearly nothing to nearly enough."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from llmcompress.compress import run as quantizing
from llmcompress.compress.forecast import Forecast
from tests.torture.jobs import Bench, Job, Tally, complaints
from tests.torture.starts import run

SMALLEST_BYTES = 16 << 10
LARGE = "64m"


class NoMountError(Exception):
    """Nothing may be mounted here."""


def rooms(bench: Bench, jobs: list[Job], sizes: int) -> Tally:
    """Each job on a disk of `sizes` sizes, then with more room. Raises NoMountError where nothing may be mounted."""
    tally = Tally("a disk too small")
    for job in jobs:
        need = _need(bench, job)
        for place in range(sizes):
            size = SMALLEST_BYTES + (need - SMALLEST_BYTES) * place // max(sizes - 1, 1)
            bench.fresh(job)
            with _mounted(bench.trial, size):
                _room(bench, job, tally, size)
    return tally


def _need(bench: Bench, job: Job) -> int:
    """Bytes, in pages, of what an undisturbed run leaves."""
    page = os.sysconf("SC_PAGE_SIZE")
    return sum((len(data) + 2 * page - 1) // page * page for data in bench.expected(job).values())


def _room(bench: Bench, job: Job, tally: Tally, size: int) -> None:
    with _unforeseen():
        found = run(job.words, bench.trial)
    where = f"{job.name} in {size:,} bytes"
    wrong = complaints(found, {0, 3}) + bench.half_written(job)
    if job.words[0] == "quantize":
        told = run([*job.words, "--restart"], bench.trial)
        early = told.status == 3 and "disk" in told.err
        if not (early or told.status in (0, 2)):
            wrong.append(f"too small a disk is not said before work: {told.status} {told.err[-200:]}")
        tally.add("said before work" if early else "enough")
    subprocess.run(["mount", "-o", f"remount,size={LARGE}", str(bench.trial)], check=True)
    with _unforeseen():
        _, more = bench.rerun(job)
    tally.add("runs", "enough" if found.status == 0 else "was full")
    for text in wrong + more:
        tally.wrong(f"{where}: {text}")


@contextlib.contextmanager
def _unforeseen() -> Iterator[None]:
    """Runs begun here do not look at the disk beforehand, so that it fills in the middle of their work."""
    genuine = quantizing.check_disk

    def blind(needed: Forecast, output: Path) -> None:
        """Whatever is needed is believed to be there."""

    quantizing.check_disk = blind
    try:
        yield
    finally:
        quantizing.check_disk = genuine


@contextlib.contextmanager
def _mounted(folder: Path, size: int) -> Iterator[None]:
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        found = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise NoMountError("mount is not installed") from None
    if found.returncode:
        raise NoMountError(f"nothing may be mounted here: {found.stderr.strip()[:120]}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)
