"""Every rename and every fsync of a run in turn: killed there, or told that the disk failed or is full."""

import re
import time
from collections.abc import Iterable
from pathlib import Path

from tests.torture.jobs import Bench, Job, Tally, complaints
from tests.torture.starts import Ended, traced

DURABLE = ("rename", "renameat2", "fsync", "fdatasync")
REMOVING = ("unlink", "rmdir", "mkdir")  # a kill there leaves less than all of a folder
CALLS = (*DURABLE, "renameat", "unlinkat", *REMOVING)
FAULTS = {"KILL": "signal=KILL", "EIO": "error=EIO", "ENOSPC": "error=ENOSPC"}


def points(bench: Bench, job: Job) -> list[tuple[str, int]]:
    """Every call of an undisturbed run that could be the last: its name and its number among those of that name."""
    log = bench.scratch / "strace.log"
    bench.fresh(job)
    found = traced(job.words, bench.trial, ["-e", f"trace={','.join(CALLS)}"], log)
    if found.status:
        raise RuntimeError(f"{job.name} fails under strace: {found.err[-300:]}")
    seen: dict[str, int] = {}
    order = []
    for line in log.read_text().splitlines():
        call = re.match(r"\d+ +(\w+)\(", line)
        if call and call[1] in CALLS:
            seen[call[1]] = seen.get(call[1], 0) + 1
            order.append((call[1], seen[call[1]]))
    return order


def faults(bench: Bench, jobs: list[Job], kinds: Iterable[str], part: tuple[int, int] = (1, 1)) -> Tally:
    """Every point of every job, with every kind of fault; of these the `part[0]`-th of `part[1]` shares."""
    kinds = tuple(kinds)
    tally = Tally(f"at every rename and fsync: {', '.join(kinds)}")
    for job in jobs:
        bench.expected(job)
        cases = [
            (call, number, kind)
            for call, number in points(bench, job)
            for kind in kinds
            if kind == "KILL" or call in DURABLE
        ]
        for call, number, kind in cases[part[0] - 1 :: part[1]]:
            _fault(bench, job, tally, call, number, kind=kind)
    return tally


def _fault(bench: Bench, job: Job, tally: Tally, call: str, number: int, *, kind: str) -> None:
    bench.fresh(job)
    log = bench.scratch / "strace.log"
    traps = ["-e", f"trace={call}", "-e", f"inject={call}:{FAULTS[kind]}:when={number}"]
    began = time.monotonic()
    found = traced(job.words, bench.trial, traps, log)
    wrong = _judged(found, kind, hit="INJECTED" in log.read_text() or found.status == -9)
    wrong += bench.half_written(job)
    _, more = bench.rerun(job)
    tally.add("runs", f"{kind} {'ended' if found.status else 'did no harm'}")
    for text in wrong + more:
        tally.wrong(f"{job.name}, {kind} at {call} {number} ({time.monotonic() - began:.1f} s): {text}")


def _judged(found: Ended, kind: str, *, hit: bool) -> list[str]:
    """A run that was killed is dead; one that was told of a fault says so with 3, or could do without that call."""
    if not hit:
        return ["the fault was not met"]
    return [] if kind == "KILL" and found.status == -9 else complaints(found, {0, 3})


def opened(log: Path) -> list[str]:
    """Every path that a run under `trace=%file` opened or ran."""
    call = re.compile(r'\d+ +(?:open|openat|openat2|execve)\((?:[^"]*, )?"((?:[^"\\]|\\.)*)"')
    return [found[1] for line in log.read_text(errors="replace").splitlines() if (found := call.match(line))]
