"""A sample of scripts/torture, and that it would notice."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.torture.changes import flip
from tests.torture.jobs import JOBS, Bench, comparable, complaints
from tests.torture.mutations import mutations
from tests.torture.starts import Ended, NoStraceError, need_strace

ROOT = Path(__file__).resolve().parents[2]
WHOLE = {"out/": b"", "out/config.json": b"{}", "out/model.safetensors": b"weights"}


def torture(*words: str) -> str:
    """What it says, having found nothing."""
    found = subprocess.run(
        [sys.executable, "-m", "tests.torture", *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "\n0 violations" in found.stdout
    return found.stdout


def test_killed_raced_and_disturbed_runs_lose_nothing() -> None:
    said = torture("--only", "kills", "polite", "races", "faults", "--jobs", "quantize fast", "--times", "2",
                   "--share", "7/70", "--seed", str(random.Random().randrange(1000)))  # fmt: skip
    assert said.count("2 runs") == 3
    try:
        need_strace()
    except NoStraceError as error:
        pytest.skip(f"faults of the disk: {error}")
    assert "EIO" in said.partition("faults ")[2]


def test_mutated_documents_are_refused_or_read(tmp_path: Path) -> None:
    tally = mutations(tmp_path, 240, 1)
    assert tally.violations == []
    assert sum(tally.counts.values()) >= 240
    assert all(any(word.startswith(kind) for word in tally.counts) for kind in ("shard", "index", "recipe", "config"))


def bench(tmp_path: Path) -> Bench:
    """A bench that knows what a quantize leaves, without having run one."""
    found = Bench(tmp_path)
    found._expected["quantize fast"] = (WHOLE, 1.0)
    found.fresh()
    (found.trial / "out").mkdir()
    (found.trial / "out" / "config.json").write_bytes(b"{}")
    (found.trial / "out" / "model.safetensors").write_bytes(b"weights")
    return found


def test_what_is_half_written_is_noticed(tmp_path: Path) -> None:
    job, found = JOBS["quantize fast"], bench(tmp_path)
    assert found.half_written(job) == []
    flip(found.trial / "out" / "model.safetensors", random.Random(0))
    assert any("model.safetensors" in text for text in found.half_written(job))
    os.unlink(found.trial / "out" / "model.safetensors")
    assert any("model.safetensors" in text for text in found.half_written(job))
    (found.trial / "out" / "config.json").unlink()
    (found.trial / "out").rmdir()
    assert found.half_written(job) == []


@pytest.mark.parametrize(
    "ended",
    [
        Ended(5, "", "error: a bug", 0.1),
        Ended(3, "", "error: the disk\nTraceback (most recent call last):", 0.1),
        Ended(3, "", "error: a\n" * 7, 0.1),
    ],
)
def test_what_ends_badly_is_noticed(ended: Ended) -> None:
    assert complaints(ended, {0, 3})
    assert not complaints(Ended(3, "", "opening ...\nerror: the disk is full\n  hint: free space", 0.1), {0, 3})


def test_reports_are_compared_without_their_times() -> None:
    one, two = b'{"date": "1", "kld": 2}', b'{"date": "2", "kld": 2}'
    assert comparable("out/report.json", one) == comparable("out/report.json", two)
    assert comparable("out/report.json", one) != comparable("out/report.json", one.replace(b"2}", b"3}"))
    assert comparable("out/report.json", one[:-1]) == one[:-1]
    assert comparable("out/report.html", b"<html>") != comparable("out/report.html", b"<html></html>\n")
