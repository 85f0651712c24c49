"""`llmcompress bench`: the machine's own figures, for a checkpoint and without one."""

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from llmcompress.cli import bench, cli
from llmcompress.kernels.samples import random_codes
from llmcompress.kernels.stored import tensors_of
from llmcompress.runtime.timing import Contender, dense, packed, race
from llmcompress.spec import LinearSpec


def test_a_checkpoint_is_timed_by_format_and_size(llama: Path, tmp_path: Path) -> None:
    words = ["quantize", str(llama), "--budget", "3.4bits", "--recipe", "fast", "--set", "plan.group_size=64"]
    CliRunner().invoke(cli, [*words, "-o", str(tmp_path / "out")], catch_exceptions=False)
    command = ["bench", str(tmp_path / "out"), "--seconds", "0.05", "--threads", "1"]
    told = json.loads(CliRunner().invoke(cli, [*command, "--json"], catch_exceptions=False).stdout)
    assert told["threads"] == 1
    assert sum(row["count"] for row in told["rows"]) == 21
    assert all(row["low"] <= row["microseconds"] <= row["high"] for row in told["rows"])
    assert all(row["error"] < 5e-3 and row["speedup"] > 0 for row in told["rows"])
    assert "all linears" in CliRunner().invoke(cli, command, catch_exceptions=False).stdout


def test_without_a_checkpoint_every_usual_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "TYPICAL", (64, 256))
    told = CliRunner().invoke(cli, ["bench", "--seconds", "0.05", "--json"], catch_exceptions=False).stdout
    assert [row["format"] for row in json.loads(told)["rows"]] == [
        "int2", "int3", "int4", "int8", "nf4", "asymmetric4"
    ]  # fmt: skip


def test_a_race_runs_every_copy_and_knows_errors() -> None:
    spec, x = LinearSpec(bits=4, group_size=64), torch.randn(1, 64)
    seen: list[int] = []
    calls = tuple((lambda _, place=place: seen.append(place)) for place in range(3))
    ours = packed("int4", spec, [tensors_of("", random_codes(spec, 32, 64))], x)
    plain = dense("bf16", [torch.randn(32, 64).bfloat16()], x.bfloat16())
    timings = race([Contender("mine", calls, 8), ours, plain], x, 0.0)  # type: ignore[arg-type]
    assert set(seen) == {0, 1, 2}
    assert timings[1].error is not None
    assert timings[1].error < 1e-5
    assert timings[2].error is not None
    assert 1e-4 < timings[2].error < 5e-3
