"""Memory that runs out once is met with half the batch; what is refused otherwise goes through where users say so."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import SMALL, TEXT
from safetensors.torch import load_file, save_file

from llmcompress.cli import cli
from llmcompress.compress import pipeline, rounds
from llmcompress.eval import run as evaluating
from llmcompress.files import ALLOW_EXTERNAL

Run = Callable[..., subprocess.CompletedProcess[str]]
SHORT = ("--calibration", "text.txt", *SMALL, "--set", "plan.bits=[4]", "--set", "plan.trials=false")
QUANTIZE = ("quantize", "model", "--budget", "4.5bits", "-o", "out", *SHORT)


@pytest.fixture
def folder(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a model, and text."""
    shutil.copytree(llama, tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT * 60)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def failing(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, times: tuple[int, ...]) -> list[int]:
    """Make a function run out of memory the given times it is called; the calls are counted in what is returned."""
    genuine, calls = getattr(owner, name), []

    def fails(*args: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) in times:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return genuine(*args, **more)

    monkeypatch.setattr(owner, name, fails)
    return calls


def test_a_run_out_of_memory_goes_on_with_half_the_batch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, rounds.BlockRounds, "rounded", (2,))
    found = CliRunner().invoke(cli, QUANTIZE, catch_exceptions=False)
    assert found.exit_code == 0
    assert "memory ran out: batches of 4; last bits may differ" in found.stderr
    assert "resuming: 1 of 3" in found.stderr
    record = json.loads((folder / "out" / "llmcompress.json").read_text())
    assert record["recipe"]["calibration"]["batch_size"] == 4
    assert not (folder / ".out.llmcompress").exists()


def test_it_gives_up_the_second_time_and_the_next_run_keeps_to_the_half(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = failing(monkeypatch, rounds.BlockRounds, "rounded", (2, 3))
    found = CliRunner().invoke(cli, QUANTIZE)
    assert isinstance(found.exception, torch.OutOfMemoryError)
    assert len(calls) == 3
    assert not (folder / "out").exists()
    found = CliRunner().invoke(cli, QUANTIZE, catch_exceptions=False)
    assert "batches of 4" in found.stderr
    assert json.loads((folder / "out" / "llmcompress.json").read_text())["recipe"]["calibration"]["batch_size"] == 4


def test_scores_and_evaluations_try_once_more(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    score = failing(monkeypatch, pipeline, "run_scorers", (1,))
    found = CliRunner().invoke(cli, ["score", "model", *SHORT], catch_exceptions=False)
    assert len(score) == 2
    assert "again with batches of 4" in found.stderr
    failing(monkeypatch, evaluating, "token_batches", (1,))
    words = ["eval", "model", "--ref", "model", "--samples", "4", "--sequence-length", "16", "--data", "text.txt"]
    found = CliRunner().invoke(cli, [*words, "-o", "eval"], catch_exceptions=False)
    assert "again with batches of 4" in found.stderr
    assert json.loads((folder / "eval" / "report.json").read_text())["environment"]["batch_size"] == "4"


def damaged(folder: Path, tensor: str, place: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Put a NaN into a tensor of the model, whichever shard it is in."""
    for path in (folder / "model").glob("*.safetensors"):
        weights = load_file(path)
        if tensor in weights:
            weights[tensor][place] = float("nan")
            save_file(weights, path, metadata={"format": "pt"})
            return weights
    raise KeyError(tensor)


FAST = ("quantize", "model", "--recipe", "fast", "--budget", "5bits", "-o", "out")


def test_nan_that_nothing_reads_is_kept_where_the_user_allows_it(folder: Path, run: Run) -> None:
    damaged(folder, "model.embed_tokens.weight", (95, 3))
    assert run(*FAST).returncode == 2
    found = run(*FAST, "--allow-nonfinite")
    assert found.returncode == 0, found.stderr
    assert "warning: NaN or infinity, kept as it is, in model.embed_tokens.weight" in found.stderr
    refused = run("verify", "out")
    assert refused.returncode == 2
    assert "model.embed_tokens.weight" in refused.stderr
    allowed = run("verify", "out", "--allow-nonfinite")
    assert allowed.returncode == 0
    assert "NaN or infinity, as allowed, in model.embed_tokens.weight" in allowed.stdout


def test_nan_in_a_linear_is_no_candidate_and_shows_in_what_is_computed(folder: Path, run: Run) -> None:
    damaged(folder, "model.layers.1.self_attn.k_proj.weight", (0, 0))
    planned = run("plan", "model", "--recipe", "fast", "--budget", "5bits", "--allow-nonfinite", "--json")
    kept = {x["linear"]: x["reason"] for x in json.loads(planned.stdout)["allocation"]["kept"]}
    assert {name.rpartition(".")[2] for name in kept} == {"q_proj", "k_proj", "v_proj"}
    assert all("NaN" in reason for reason in kept.values())
    found = run(*FAST, "--allow-nonfinite")
    assert found.returncode == 2
    assert "model.layers.1" in found.stderr
    assert not (folder / "out").exists()


def test_links_that_lead_out_are_followed_where_the_user_allows_it(folder: Path, run: Run) -> None:
    for path in list((folder / "model").glob("*.safetensors")):
        path.rename(folder / path.name)
        path.symlink_to(folder / path.name)
    refused = run(*FAST)
    assert refused.returncode == 2
    assert "--allow-external-files" in refused.stderr
    assert run(*FAST, "--allow-external-files").returncode == 0
    (folder / "model" / "LICENSE").symlink_to("/dev/zero")
    assert "not a regular file" in run(*FAST, "--allow-external-files", "--force").stderr
    assert ALLOW_EXTERNAL not in os.environ
