"""What goes wrong with the machine in the middle of a run: said with advice, nothing half-written, work kept."""

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import llama_config, save_model
from safetensors.torch import load_file, save_file

from llmcompress.cli import main
from llmcompress.compress import rounds

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


def ended(words: list[str]) -> int:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.raises(SystemExit) as end:
        main(words)
    for number, handler in before.items():
        signal.signal(number, handler)
    return int(end.value.code or 0)


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
    """Weights are finite, what they compute is not: nothing after that block could be told from noise."""
    model = save_model(tmp_path / "model", llama_config(num_hidden_layers=2), shard_size="1GB")
    weights = load_file(model / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] *= 1e38
    weights["model.layers.1.mlp.up_proj.weight"].clamp_(-3e38, 3e38)
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.chdir(tmp_path)
    short = ("calibration.samples=4", "calibration.sequence_length=16", "plan.trials=false")
    words = ["--recipe", recipe, *WORDS[2:], *(word for change in short for word in ("--set", change))]
    assert ended(["quantize", str(model), *words]) == 2
    told = capsys.readouterr().err
    assert "error: model.layers.1.mlp." in told
    assert "overflows" in told
    assert not (tmp_path / "out").exists()
