"""Every hostile or damaged model directory, given to the program as a user would: refused at once, nothing touched."""

import os
import resource
import shutil
import subprocess
from pathlib import Path

from tests.preflight import attacks
from tests.torture.faults import opened
from tests.torture.jobs import Tally
from tests.torture.starts import Ended, need_strace, traced, whole

WORDS = ("quantize", "model", "--recipe", "fast", "--budget", "4bits", "-o", "out")
READING = ("export", "model", "--format", "bf16", "-o", "out")  # for what is found when weights are read
SECONDS, LINES = 5.0, 6
SHOWN = 5  # how many of the slowest are named
PICKLES = (".bin", ".pt", ".ckpt", ".pth")
EVERY = attacks.FAULTS | attacks.WEIGHTS | attacks.MISFITS


def hostile(scratch: Path, names: list[str]) -> Tally:
    """Each attack twice: timed, from nothing; and traced, to see which files were opened."""
    need_strace()
    tally = Tally("hostile and damaged inputs")
    seconds: dict[str, float] = {}
    for name in names:
        place = scratch / "hostile"
        shutil.rmtree(place, ignore_errors=True)
        folder = attacks.good(place / "model")
        EVERY[name].damage(folder)
        before, baits = _seen(place), _baits(place)
        words = READING if name in attacks.WEIGHTS else WORDS
        timed = _timed(words, place)
        log = scratch / "hostile.log"
        found = traced(words, place, ["-e", "trace=open,openat,openat2,execve"], log)
        wrong = [*_refusal(timed, EVERY[name].word), *_refusal(found, EVERY[name].word)]
        seconds[name] = timed.seconds
        if timed.seconds > SECONDS:
            wrong.append(f"{timed.seconds:.1f} s of processor time")
        if _seen(place) != before:
            wrong.append("something was written")
        wrong += [f"{path} was opened" for path in opened(log) if _is_bait(place, path, baits)]
        tally.add("refused")
        for text in wrong:
            tally.wrong(f"{name}: {text}")
    for name in sorted(seconds, key=lambda name: -seconds[name])[:SHOWN]:
        tally.add(f"took {seconds[name]:.2f} s of processor time: {name}")
    return tally


def _timed(words: tuple[str, ...], place: Path) -> Ended:
    """How it ends, with its seconds of processor time: a busy machine is no fault of its."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = whole(words, place)
    try:
        _, said = process.communicate(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        _, said = process.communicate()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Ended(process.returncode, "", said, used)


def _refusal(found: Ended, word: str) -> list[str]:
    """What is wrong with a refusal, which should be told in few lines, for the fault that was made."""
    lines = [line for line in found.err.splitlines() if line.startswith(("error:", "  hint:"))]
    wrong = []
    if found.status != 2:
        wrong.append(f"ends with {found.status}: {found.err[-300:]}")
    if "Traceback" in found.err:
        wrong.append(f"a traceback: {found.err[-300:]}")
    if word not in "".join(lines):
        wrong.append(f"refused for something else: {lines[:3]}")
    if len(lines) > LINES:
        wrong.append(f"{len(lines)} lines: {lines[:3]}")
    return wrong


def _seen(place: Path) -> object:
    """Names and sizes of everything there, and bytes of what is small."""
    small = [path for path in sorted(place.rglob("*")) if path.is_file() and path.stat().st_size < 1 << 20]
    return sorted(path.relative_to(place).as_posix() for path in place.rglob("*")), {p: p.read_bytes() for p in small}


def _baits(place: Path) -> set[Path]:
    """What may not be opened: targets of links that lead out, files beside the model, pickles."""
    found = {Path("/etc/hostname"), Path("/etc/passwd")}
    for path in place.rglob("*"):
        beside = place / "model" not in path.parents and path != place / "model"
        if beside or path.suffix in PICKLES:
            found.add(path)
        if path.is_symlink():
            found |= {path, Path(os.path.realpath(path))}
    return found


def _is_bait(place: Path, opened_path: str, baits: set[Path]) -> bool:
    path = Path(os.path.normpath(place / opened_path))
    return path in baits or any(bait.is_symlink() and bait in path.parents for bait in baits)
