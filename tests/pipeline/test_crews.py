"""Several processes on one model: the bytes of one, and one that is killed ends all."""

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import llama_config, program, save_model

from llmcompress.cli.crew import launch
from llmcompress.errors import InputError
from tests.experts_help import family
from tests.forked import Forker

FEW = (
    "--set", "calibration.samples=5", "--set", "calibration.sequence_length=32", "--set", "calibration.batch_size=1",
    "--set", "calibration.score_samples=3", "--set", "plan.bits=[3, 4]",
)  # fmt: skip
PATIENCE = 120


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def quantize(model: Path, text: Path, *more: str) -> tuple[str | Path, ...]:
    return ("quantize", model, "--budget", "3.3bits", "-o", "out", "--calibration", text, *FEW, *more)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two blocks."""
    return save_model(tmp_path_factory.mktemp("models") / "model", llama_config(num_hidden_layers=2))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, forker: Forker, model: Path, text_file: Path) -> Path:
    """What one process makes."""
    folder = tmp_path_factory.mktemp("alone")
    assert forker.run(quantize(model, text_file), folder).returncode == 0
    return folder / "out"


@pytest.mark.parametrize("ranks", [2, 4])
def test_quantize_gives_the_bytes_of_one(
    alone: Path, forker: Forker, model: Path, text_file: Path, tmp_path: Path, ranks: int
) -> None:
    found = forker.run(quantize(model, text_file), tmp_path, ranks=ranks)
    assert found.returncode == 0, found.stderr
    assert contents(tmp_path / "out") == contents(alone)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert found.stdout.count("written to") == found.stderr.count("opening") == 1  # only one speaks


def test_memory_that_runs_out_in_one_process_halves_the_batches_of_all(
    forker: Forker, model: Path, text_file: Path, tmp_path: Path
) -> None:
    made = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        words = quantize(model, text_file, "--set", "calibration.batch_size=4")
        changes = {"SCARCE_RANK": str(ranks - 1)}
        found = forker.run(words, folder, ranks=ranks, changes=changes, call="tests.crew_cases:short_of_memory")
        assert found.returncode == 0, found.stderr
        assert found.stderr.count("memory ran out: batches of 2; last bits may differ") == 1
        assert "resuming: 1 of 2" in found.stderr
        made.append(contents(folder / "out"))
        assert sorted(p.name for p in folder.iterdir()) == ["out"]
    assert made[0] == made[1]


VARIANTS = {
    "head, inputs, cache and exchange": (
        "--set", "quantize.inputs=int8", "--set", "quantize.input_clip=grid", "--set", "quantize.kv_cache=int8",
        "--set", "plan.exchange=1", "--set", "calibration.samples=8", "--budget", "6.6bits/file",
    ),
    "rewritten": ("--recipe", "int8"),
    "without blocks": ("--set", "plan.voids=true", "--set", "plan.trials=false"),
    "learned": ("--recipe", "best", "--set", "quantize.iterations=2", "--set", "plan.trials=false"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(VARIANTS))
def test_other_recipes_give_the_bytes_of_one(
    forker: Forker, model: Path, text_file: Path, tmp_path: Path, name: str
) -> None:
    made = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        found = forker.run(quantize(model, text_file, *VARIANTS[name]), folder, ranks=ranks)
        assert found.returncode == 0, found.stderr
        made.append(contents(folder / "out"))
    assert made[0] == made[1]


def test_scores_are_those_of_one(forker: Forker, model: Path, text_file: Path, tmp_path: Path) -> None:
    scorers = ("--scorer", "fisher", "--scorer", "hessian", "--scorer", "lim", "--set", "score.fisher.draws=2")
    made = []
    for ranks in (1, 2, 4):
        words = ("score", model, "-o", f"{ranks}.json", "--calibration", text_file, *FEW, *scorers)
        found = forker.run(words, tmp_path, ranks=ranks)
        assert found.returncode == 0, found.stderr
        made.append(((tmp_path / f"{ranks}.json").read_bytes(), found.stdout))
    assert made[0] == made[1] == made[2]


def test_experts_give_the_bytes_of_one(forker: Forker, text_file: Path, tmp_path: Path) -> None:
    """Experts that some batches do not reach, and some that none does."""
    source, scorers, made = family("mixtral", tmp_path / "model"), ("--scorer", "fisher", "--scorer", "hessian"), []
    for ranks in (1, 3):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        for words in (
            quantize(source, text_file, "--budget", "4.2bits", "--set", "score.fisher.reduce=dot"),
            ("score", source, "-o", "scores.json", "--calibration", text_file, *FEW, *scorers),
        ):
            found = forker.run(words, folder, ranks=ranks)
            assert found.returncode == 0, found.stderr
        made.append(contents(folder))
    assert made[0] == made[1]


def test_a_limit_of_memory_is_kept_together(
    alone: Path, forker: Forker, model: Path, text_file: Path, tmp_path: Path
) -> None:
    """Hidden states in files, the groups of a block scored in turn: the bytes of one process, limited or not."""
    refused = forker.run(quantize(model, text_file, "--max-memory", "1MB"), tmp_path, ranks=2)
    said = re.search(r"give --max-memory (\d+)MB or more", refused.stderr)
    assert refused.returncode == 2
    assert said is not None, refused.stderr
    found = forker.run(quantize(model, text_file, "--max-memory", f"{said[1]}MB"), tmp_path, ranks=2)
    assert found.returncode == 0, found.stderr
    made, expected = contents(tmp_path / "out"), contents(alone)
    shards = [name for name in expected if name.endswith(".safetensors")]
    assert shards
    assert all(made[name] == expected[name] for name in (*shards, "scores.json"))


def test_eval_measures_what_one_does(alone: Path, forker: Forker, model: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "held-out.txt"
    held_out.write_text("What does the lazy dog return at night? Nothing that a clock minds, left or right.\n" * 40)
    made = []
    for ranks in (1, 2, 4):
        words = ("eval", alone, "--ref", model, "-o", str(ranks), "--data", held_out, "--samples", "7",
                 "--sequence-length", "24", "--batch-size", "2")  # fmt: skip
        found = forker.run(words, tmp_path, ranks=ranks)
        assert found.returncode == 0, found.stderr
        report = json.loads((tmp_path / str(ranks) / "report.json").read_text())
        assert len(report.pop("costs")) == 2  # seconds
        del report["date"], report["command"]
        made.append(report)
    assert made[0] == made[1] == made[2]


def test_errors_are_told_once(forker: Forker, model: Path, text_file: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    found = forker.run(quantize(model, text_file), tmp_path, ranks=2)
    assert found.returncode == 2
    assert found.stderr.count("error:") == found.stderr.count("already exists") == 1
    assert list((tmp_path / "out").iterdir()) == []


def test_other_commands_are_refused(forker: Forker, model: Path, tmp_path: Path) -> None:
    found = forker.run(("prune", model, "--blocks", "1"), tmp_path, ranks=2)
    assert found.returncode == 2
    assert found.stderr == "error: prune runs in one process\n  hint: several can share quantize, score, eval\n"


def when_committed(step: int, folder: Path) -> None:
    end = time.monotonic() + PATIENCE
    while not (folder / ".out.llmcompress" / f"commit-{step:05d}.json").exists() and time.monotonic() < end:
        time.sleep(0.005)


def test_a_killed_process_ends_all_and_fewer_go_on(
    alone: Path, forker: Forker, model: Path, text_file: Path, tmp_path: Path
) -> None:
    """The second of three is killed, then the first of two; nobody ends the others, who have to see it themselves."""
    for step, (ranks, victim) in enumerate(((3, 1), (2, 0))):

        def kill(step: int = step, victim: int = victim) -> None:
            when_committed(step, tmp_path)
            os.kill(forker.children()[victim], signal.SIGKILL)

        thread = threading.Thread(target=kill)
        thread.start()
        found = forker.run(quantize(model, text_file), tmp_path, ranks=ranks, timeout=PATIENCE)
        thread.join()
        assert found.returncode == (-signal.SIGKILL if victim == 0 else 3), found.stderr
        assert "finished blocks are kept" in found.stderr
        assert not (tmp_path / "out").exists()
    last = forker.run(quantize(model, text_file), tmp_path)
    assert last.returncode == 0, last.stderr
    assert "resuming" in last.stderr
    assert contents(tmp_path / "out") == contents(alone)


@pytest.fixture
def launched(model: Path, text_file: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """The program as a user starts it, with two processes."""
    words = program(*quantize(model, text_file), "--nproc", "2")
    running = subprocess.Popen(words, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    yield running
    running.kill()
    running.communicate()


def test_nproc_starts_processes_and_ends_them(
    alone: Path, launched: subprocess.Popen[str], forker: Forker, model: Path, text_file: Path, tmp_path: Path
) -> None:
    when_committed(0, tmp_path)
    started = Path(f"/proc/{launched.pid}/task/{launched.pid}/children").read_text().split()
    assert len(started) == 2
    os.kill(int(started[1]), signal.SIGKILL)
    out, err = launched.communicate(timeout=PATIENCE)
    assert launched.returncode == 3, err
    assert "process 1 was killed by signal 9" in err
    assert not any(word in err + out for word in ("Traceback", "frame #", "Exception"))
    assert not any(Path(f"/proc/{pid}").exists() for pid in started)
    assert not (tmp_path / "out").exists()
    assert forker.run(quantize(model, text_file), tmp_path, ranks=2).returncode == 0
    assert contents(tmp_path / "out") == contents(alone)


def test_a_slip_of_the_finger_does_not_fill_the_machine_with_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    started = Mock(side_effect=OSError)
    monkeypatch.setattr(subprocess, "Popen", started)
    with pytest.raises(InputError, match="too many for this machine"):
        launch(1000)
    started.assert_not_called()
