"""Numbers beyond float32 in the middle of a run: a linear that cannot be rounded stays as it is, the run goes on."""

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ended, llama_config, save_model
from safetensors.torch import load_file, save_file

from llmcompress.compress.dealing import _packed, _unpacked
from llmcompress.compress.group import LEFT
from llmcompress.compress.quantizers import rtn
from llmcompress.compress.rounding import Quantized, Request, nearest
from llmcompress.types import LinearSpec, QuantizerOptions

Run = Callable[..., subprocess.CompletedProcess[str]]
BLOCK = "model.layers.1"
ATTENTION = tuple(f"{BLOCK}.self_attn.{name}_proj" for name in "qkv")
SHORT = ("calibration.samples=4", "calibration.sequence_length=16", "plan.trials=false", "plan.bits=[3,4]")
SETTINGS = [word for change in SHORT for word in ("--set", change)]
# the weights that grow, those that shrink by as much, and the linears whose inputs are then beyond squaring
LARGE = {
    "one": ((f"{BLOCK}.mlp.up_proj",), (f"{BLOCK}.mlp.down_proj",), (f"{BLOCK}.mlp.down_proj",)),
    "fused": ((f"{BLOCK}.input_layernorm",), ATTENTION, ATTENTION),
}


def scaled(folder: Path, larger: tuple[str, ...], smaller: tuple[str, ...]) -> Path:
    """A model whose function does not change, with one activation 1e21 times as large."""
    model = save_model(folder, llama_config(num_hidden_layers=2), shard_size="1GB")
    weights = load_file(model / "model.safetensors")
    for name in larger:
        weights[f"{name}.weight"] *= 1e21
    for name in smaller:
        weights[f"{name}.weight"] *= 1e-21
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    return model


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


@pytest.mark.parametrize("case", LARGE)
def test_linears_whose_inputs_cannot_be_squared_stay_as_they_are(
    case: str, run: Run, text_file: Path, tmp_path: Path
) -> None:
    larger, smaller, left = LARGE[case]
    model = scaled(tmp_path / "model", larger, smaller)
    words = ("quantize", model, "--recipe", "layerwise", "--calibration", text_file, *SETTINGS)
    found = run(*words, "--budget", "4bits", "-o", "out", "--json")
    assert found.returncode == 0, found.stderr
    assert f"second moments of its calibration inputs are not finite: {LEFT}" in found.stderr
    assert f"warning: {len(left)} linear(s) could not be quantized ({', '.join(left)})" in found.stderr
    assert "more than asked" not in found.stderr
    told, out = json.loads(found.stdout), tmp_path / "out"
    assert tuple(told["kept"]) == left
    assert told["adjusted"] == len(left)
    assert set(left) < set(json.loads((out / "config.json").read_text())["quantization_config"]["ignore"])
    record = json.loads((out / "llmcompress.json").read_text())
    assert {x["where"] for block in record["blocks"] for x in block["fallbacks"]} == set(left)
    stored, source = tensors(out), tensors(model)
    assert all(torch.equal(stored[f"{name}.weight"], source[f"{name}.weight"]) for name in left)
    packed = {name.removesuffix("_packed") for name in stored if name.endswith("weight_packed")}
    assert len(packed) == 14 - len(left)
    assert told["shard_bytes"] == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert run("verify", out).returncode == 0


def test_a_budget_of_the_file_says_what_it_was_exceeded_by(run: Run, text_file: Path, tmp_path: Path) -> None:
    model = scaled(tmp_path / "model", *LARGE["one"][:2])
    words = ("quantize", model, "--recipe", "layerwise", "--calibration", text_file, *SETTINGS)
    found = run(*words, "--budget", "8.7bits/file", "-o", "out")
    assert found.returncode == 0, found.stderr
    assert "bytes more than planned, and more than asked" in found.stderr


class Rounding:
    """Rounding to nearest, that of some groups spoilt, and a machine that fails at one of them."""

    def __init__(self, spoil: Callable[[int, list[Quantized]], list[Quantized]], fails: int = 0) -> None:
        self.spoil, self.fails, self.calls, self.genuine = spoil, fails, 0, rtn.quantize

    def __call__(self, *args: Any, **more: Any) -> list[Quantized]:
        self.calls += 1
        if self.calls == self.fails:
            raise torch.AcceleratorError("CUDA error: unspecified launch failure")
        return self.spoil(self.calls, self.genuine(*args, **more))


def blind_to_one(call: int, found: list[Quantized]) -> list[Quantized]:
    return [replace(found[0], fallbacks=("why",), blind=True), *found[1:]] if call == 5 else found


def huge(call: int, found: list[Quantized]) -> list[Quantized]:
    if not 5 <= call < 9:
        return found
    return [replace(x, codes=replace(x.codes, scale=torch.full_like(x.codes.scale, 1e30))) for x in found]


MLP = (f"{BLOCK}.mlp.gate_proj", f"{BLOCK}.mlp.up_proj", f"{BLOCK}.mlp.down_proj")
SPOILT = {
    "one of three that share a format": (blind_to_one, ATTENTION, "why"),
    "all of a block": (huge, (*ATTENTION, f"{BLOCK}.self_attn.o_proj", *MLP), "what leaves its block"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_what_cannot_be_rounded_is_left_and_a_killed_run_goes_on(
    case: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, left, why = SPOILT[case]
    monkeypatch.chdir(tmp_path)
    words = ["quantize", str(llama), "--recipe", "fast", "--budget", "4bits", *SETTINGS, "-o"]
    monkeypatch.setattr(rtn, "quantize", Rounding(spoil))
    assert ended([*words, "whole"]) == 0
    record = json.loads((tmp_path / "whole" / "llmcompress.json").read_text())
    kept = {x["linear"]: x["reason"] for x in record["plan"]["allocation"]["kept"]}
    assert tuple(kept) == left
    assert all(reason.startswith(why) and LEFT not in reason for reason in kept.values())
    monkeypatch.setattr(rtn, "quantize", Rounding(spoil, fails=9))
    assert ended([*words, "killed"]) == 3
    monkeypatch.setattr(rtn, "quantize", Rounding(lambda _, found: found))
    assert ended([*words, "killed"]) == 0
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "killed" / path.name).read_bytes()
    assert ended(["verify", "killed"]) == 0


@pytest.mark.parametrize("scorer", ["hessian", "kurtosis", "noise"])
def test_a_linear_whose_score_is_not_finite_gets_the_widest_format(
    scorer: str, run: Run, text_file: Path, tmp_path: Path
) -> None:
    model = scaled(tmp_path / "model", *LARGE["one"][:2])
    words = ("plan", model, "--recipe", "layerwise", "--calibration", text_file, *SETTINGS, "--set", f"scorer={scorer}")
    found = run(*words, "--budget", "3.6bits", "-o", "plan.json")
    assert found.returncode == 0, found.stderr
    assert f"not scored by {scorer}: 4 bits" in found.stdout + found.stderr


@pytest.mark.parametrize("blind", [True, False])
def test_what_another_process_could_not_round_is_known_here(blind: bool) -> None:
    spec = LinearSpec(bits=4, group_size=32)
    request = Request(torch.randn(8, 32, generator=torch.Generator().manual_seed(0)), spec)
    codes = nearest(request, QuantizerOptions(), torch.bfloat16).codes
    for notes in ((), ("why", "and why else")):
        sent = Quantized(codes, notes, blind)
        (found,) = _unpacked(_packed({0: sent}), [request]).values()
        assert (found.fallbacks, found.blind) == (notes, blind)
        assert torch.equal(found.codes.dequantize(), codes.dequantize())
