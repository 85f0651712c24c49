"""What goes wrong with the machine in the middle of a run: said with advice, nothing half-written, work kept."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ended, llama_config, save_model
from safetensors.torch import load_file, save_file

from llmcompress.compress import rounds
from llmcompress.compress.runlog import LogFile

WORDS = ["--recipe", "fast", "--budget", "4.5bits", "-o", "out", "--set", "plan.bits=[4]"]
FAULTS: dict[str, tuple[Callable[[], BaseException], str, str]] = {
    "no memory": (MemoryError, "out of memory", "batch_size"),
    "no memory for torch": (
        lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate"),
        "memory",
        "batch",
    ),
    "no memory on the device": (lambda: torch.OutOfMemoryError("CUDA out of memory."), "out of memory", "batch_size"),
    "a dead device": (
        lambda: torch.AcceleratorError("CUDA error: unspecified launch failure\nmore"),
        "device",
        "again",
    ),
    "an older word for it": (lambda: RuntimeError("CUDA error: device-side assert"), "device failed", "--device"),
}


@pytest.fixture
def second_block_fails(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    def arm(error: BaseException) -> None:
        genuine, blocks = rounds.BlockRounds.rounded, []

        def rounded(self: Any) -> Any:
            blocks.append(self)
            if len(blocks) == 2:
                raise error
            return genuine(self)

        monkeypatch.setattr(rounds.BlockRounds, "rounded", rounded)

    return arm


@pytest.mark.parametrize("fault", FAULTS)
def test_trouble_keeps_what_is_done_and_says_what_helps(
    fault: str,
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    second_block_fails: Callable[[BaseException], None],
) -> None:
    monkeypatch.chdir(tmp_path)
    make, what, hint = FAULTS[fault]
    second_block_fails(make())
    assert ended(["quantize", str(llama), *WORDS]) == 3
    found = capsys.readouterr()
    told = found.err[found.err.index("error:") :].splitlines()
    assert len(told) == 2
    assert what in told[0]
    assert hint in told[1]
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / ".out.llmcompress").glob("commit-*.json"))
    log = (tmp_path / ".out.llmcompress" / "run.log").read_text()
    assert "INFO block 1/3" in log
    assert "ERROR ended by\nTraceback" in log
    if fault == "no memory":
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
        assert ended(["quantize", str(llama), *WORDS]) == 0
        assert "resuming: 1 of" in capsys.readouterr().err
        assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("recipe", ["fast", "layerwise"])
def test_a_model_that_overflows_is_refused_with_block_and_linear(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights are finite, what they compute is not: nothing after that block could be told from noise.

    Found where the model is first run, not when its last block is rounded.
    """
    model = save_model(tmp_path / "model", llama_config(num_hidden_layers=2), shard_size="1GB")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 1e38
    weights["model.layers.1.mlp.up_proj.weight"].clamp_(-3e38, 3e38)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.chdir(tmp_path)
    short = ("calibration.samples=4", "calibration.sequence_length=16", "plan.trials=false", "plan.bits=[3,4]")
    words = ["--recipe", recipe, *WORDS[2:], *(word for change in short for word in ("--set", change))]
    assert ended(["quantize", str(model), *words]) == 2
    told = capsys.readouterr().err
    assert "error: model.layers.1: what leaves it is NaN, infinite or beyond" in told
    assert ("block 1/2" in told) == (recipe == "fast")
    assert "overflows" in told
    assert not (tmp_path / "out").exists()


def test_a_log_needs_a_folder(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert ended(["quantize", str(llama), *WORDS, "--log-file", "nowhere/run.log"]) == 2
    assert not list(tmp_path.iterdir())


def test_a_log_that_cannot_be_written_stops_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    handler = LogFile(Path("/dev/full"))
    record = logging.LogRecord("llmcompress", logging.INFO, "", 0, "x" * 100_000, (), None)
    handler.emit(record)
    handler.close()
    LogFile(Path("/nowhere/run.log")).emit(record)
    assert capsys.readouterr().err == ""


FILES = {
    "score": ["score", "MODEL", "-o", "nowhere/scores.json"],
    "plan": ["plan", "MODEL", "--budget", "4bits", "-o", "nowhere/plan.json"],
    "gate": ["gate", "report.json", "--junit", "nowhere/junit.xml"],
    "gate with a model": ["gate", "MODEL", "--ref", "MODEL", "-o", "file/eval"],
    "eval": ["eval", "MODEL", "--ref", "MODEL", "-o", "file/eval"],
}


@pytest.mark.parametrize("command", FILES)
def test_a_place_for_the_result_is_looked_for_before_work(
    command: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    assert ended([str(llama) if word == "MODEL" else word for word in FILES[command]]) == 2
    assert "no such folder for the output" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_names_that_are_no_text_are_refused_and_odd_ones_work(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    bad, odd = os.fsdecode(b"bad-\xff"), "größe 模型\n[red]"
    for name in (bad, odd):
        (tmp_path / name).symlink_to(llama)
    for model, output in ((bad, "out"), (odd, bad + "-out")):
        assert ended(["quantize", model, *WORDS[:-4], "-o", output, *WORDS[-2:]]) == 2
        assert "not a name in UTF-8" in capsys.readouterr().err
    assert ended(["quantize", odd, *WORDS[:-4], "-o", f"{odd} out", *WORDS[-2:]]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([bad, odd, f"{odd} out"])
    record = json.loads((tmp_path / f"{odd} out" / "llmcompress.json").read_text(encoding="utf-8"))
    assert record["origin"]["name"] == odd.replace("\n", "?")
