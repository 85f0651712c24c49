"""Signals at random moments, once or several times, then the same command: nothing half-written, equal bytes."""

import random
import signal
import time

from tests.torture.jobs import Bench, Job, Tally, complaints
from tests.torture.starts import Ended, Running, whole

PATIENCE_SECONDS = 10.0  # from a polite signal to the end


def kills(bench: Bench, jobs: list[Job], times: int, seed: int) -> Tally:
    """`times` runs, each killed with SIGKILL up to three times before it may finish."""
    tally, source = Tally("SIGKILL at random moments"), random.Random(f"kill {seed}")
    for place in range(times):
        job = jobs[place % len(jobs)]
        bench.expected(job)
        bench.fresh(job)
        wrong: list[str] = []
        for _ in range(source.choice((1, 1, 1, 2, 3))):
            running = Running(job.words, bench.trial)
            time.sleep(source.uniform(0.02, 1.02) * bench.seconds(job))
            running.strike(signal.SIGKILL)
            found = running.wait()
            tally.add("killed" if found.status == -9 else "had finished")
            wrong += bench.half_written(job)
        _finish(bench, job, tally, wrong, f"{job.name}, run {place} of seed {seed}")
    return tally


def whole_kills(bench: Bench, job: Job, times: int, seed: int) -> Tally:
    """The same for the installed program with all its imports, as a user starts it."""
    tally, source = Tally("SIGKILL, started from nothing"), random.Random(f"whole {seed}")
    bench.expected(job)
    bench.fresh(job)
    began = time.monotonic()
    if whole(job.words, bench.trial).wait(timeout=300):
        raise RuntimeError(f"{job.name} fails when started from nothing")
    seconds = time.monotonic() - began
    for place in range(times):
        bench.fresh(job)
        process = whole(job.words, bench.trial)
        time.sleep(source.uniform(0.3, 1.0) * seconds)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        tally.add("killed" if process.returncode == -9 else "had finished")
        _finish(bench, job, tally, bench.half_written(job), f"{job.name} from nothing, run {place} of seed {seed}")
    return tally


def polite(bench: Bench, jobs: list[Job], times: int, seed: int) -> Tally:
    """SIGINT and SIGTERM at random moments: 130 or 143 soon after, advice, and the same command finishes."""
    tally, source = Tally("SIGINT, SIGTERM at random moments"), random.Random(f"polite {seed}")
    for place in range(times):
        job, number = jobs[place % len(jobs)], source.choice((signal.SIGINT, signal.SIGTERM))
        bench.expected(job)
        bench.fresh(job)
        running = Running(job.words, bench.trial)
        time.sleep(source.uniform(0.05, 1.0) * bench.seconds(job))
        began = time.monotonic()
        running.strike(number)
        found = running.wait()
        waited = time.monotonic() - began
        early = found.status == -number and "error:" not in found.err  # before the program listens
        wrong = [] if early else complaints(found, {0, 128 + number})
        if not early and found.status and "the same command again" not in found.err:
            wrong.append(f"no advice: {found.err[-200:]}")
        if waited > PATIENCE_SECONDS:
            wrong.append(f"{waited:.1f} s from the signal to the end")
        tally.add("early" if early else "had finished" if not found.status else signal.Signals(number).name)
        wrong += bench.half_written(job)
        _finish(bench, job, tally, wrong, f"{job.name}, {signal.Signals(number).name}, run {place} of seed {seed}")
    return tally


def races(bench: Bench, jobs: list[Job], times: int, seed: int) -> Tally:
    """Three runs of the same command at once, in every second race one of them killed on the way."""
    tally, source = Tally("three at once"), random.Random(f"race {seed}")
    for place in range(times):
        job = jobs[place % len(jobs)]
        bench.expected(job)
        bench.fresh(job)
        runs = []
        for _ in range(3):
            runs.append(Running(job.words, bench.trial))
            time.sleep(source.choice((0.0, 0.05, 0.3)) * bench.seconds(job))
        victim = source.randrange(3) if place % 2 else None
        if victim is not None:
            time.sleep(source.uniform(0, 1) * bench.seconds(job))
            runs[victim].strike(signal.SIGKILL)
        found = [one.wait() for one in runs]
        wrong = bench.half_written(job)
        for number, one in enumerate(found):
            wrong += _racer(one, job, killed=number == victim)
        if victim is None and not any(one.status == 0 for one in found):
            wrong.append(f"nobody won: {[one.status for one in found]}")
        tally.add(*(f"ended with {one.status}" for one in found))
        _finish(bench, job, tally, wrong, f"{job.name}, race {place} of seed {seed}")
    return tally


def _racer(found: Ended, job: Job, *, killed: bool) -> list[str]:
    """What is wrong with how one of three ended: it won, was turned away, or came after the winner had published."""
    allowed = {0} if job.rewrites else {0, 6}
    if found.status == 2 and "already exists" in found.err:
        allowed |= {2}
    return complaints(found, allowed | ({-9} if killed else set()))


def _finish(bench: Bench, job: Job, tally: Tally, wrong: list[str], where: str) -> None:
    """Run the command once more and note everything that was wrong."""
    ended, more = bench.rerun(job)
    tally.add("runs")
    if "resuming" in ended.err:
        tally.add("gone on with")
    for text in wrong + more:
        tally.wrong(f"{where}: {text}")
