"""Mixtures of experts through the whole chain: each expert on its own tokens, one file that everybody opens."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import llmcompress
from llmcompress.compress.exporters.compressed_tensors import SEVERAL
from llmcompress.compress.group import FEW
from llmcompress.compress.lowrank import UNSEEN
from llmcompress.compress.quantizers import gptq, rtn
from llmcompress.compress.rounding import Request, Seen
from llmcompress.compress.verify import probe_logits
from llmcompress.kernels.codes import Codes
from llmcompress.model.checkpoint import CheckpointReader
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import BlockStream
from llmcompress.preflight import check_source
from llmcompress.runtime.modules import PackedLinear
from llmcompress.runtime.packed import PackedReader
from llmcompress.runtime.targets import block_of_expert, blocks_of, experts_target
from llmcompress.types import LinearSpec, QuantizerOptions
from tests.conftest import SMALL
from tests.experts_help import EXPERTS, UNREACHED, family, plain_logits

Run = Callable[..., subprocess.CompletedProcess[str]]
QUANTIZED = ("mixtral", "qwen3_moe", "qwen2_moe")
TOKENS = torch.arange(40)[None] % 96


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny random models by family; do not write into them."""
    folder = tmp_path_factory.mktemp("experts")
    return lambda name: folder / name if (folder / name).is_dir() else family(name, folder / name)


def quantized(run: Run, source: Path, output: Path, text: Path, *more: str) -> subprocess.CompletedProcess[str]:
    words = ("quantize", source, "-o", output, "--budget", "4.6bits", "--calibration", text, *SMALL)
    found = run(*words, "--set", "plan.bits=[4]", "--set", "plan.trials=false", *more)
    assert found.returncode == 0, found.stderr
    return found


class ScaleDtype(PackedReader):
    """Weights of experts in the dtype of their scales, as plain transformers makes them."""

    def read(self, name: str) -> Tensor:
        found = super().read(name)
        packed = name in self.row_major and ".experts." in name
        return found.bfloat16().float() if packed else found


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def codes_of(folder: Path, stem: str) -> Codes:
    files = check_source(folder, packed=True)
    return PackedReader(CheckpointReader(files.tensors), files.config).linear(stem)


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_experts_open_everywhere_and_say_the_same(
    name: str, models: Callable[[str], Path], run: Run, tmp_path: Path, text_file: Path
) -> None:
    source, out = models(name), tmp_path / "out"
    said = quantized(run, source, out, text_file).stderr
    theirs = plain_logits(out, TOKENS)
    ours = next(iter(BlockStream(Skeleton.open(out, decode=ScaleDtype)).logits([TOKENS])))
    assert float((theirs - ours).abs().max()) < 1e-5
    exact = probe_logits(out, tuple(TOKENS[0].tolist()), "cpu")
    packed: Any = llmcompress.load(out, dtype=torch.float32)
    assert sum(isinstance(m, PackedLinear) for m in packed.modules()) >= 2 * (4 + 3 * EXPERTS)
    with torch.no_grad():
        assert float((packed(input_ids=TOKENS).logits - exact).abs().max()) < 1e-4
        dense: Any = llmcompress.load(out, dtype=torch.float32, dense=True)
        assert float((dense(input_ids=TOKENS).logits - exact).abs().max()) < 1e-5
    before, after = tensors_of(source), tensors_of(out)
    gates = [key for key in before if key.endswith(("gate.weight", "expert_gate.weight"))]
    assert gates
    assert all(torch.equal(before[key], after[key]) for key in gates)
    stems = {key.removesuffix(".weight") for key in before if ".experts." in key}
    assert {key.removesuffix("_packed").removesuffix(".weight") for key in after if ".experts." in key} >= stems
    packed.save_pretrained(tmp_path / "again")
    assert tensors_of(tmp_path / "again").keys() == after.keys()
    section = json.loads((out / "config.json").read_text())["quantization_config"]
    assert {gate.removesuffix(".weight") for gate in gates} <= set(section["ignore"])
    assert "rounded without data" in said


def test_an_expert_without_tokens_is_rounded_and_counted(
    models: Callable[[str], Path], run: Run, tmp_path: Path, text_file: Path
) -> None:
    source = models("qwen3_moe")
    for quantizer in ("gptq", "rtn"):
        quantized(run, source, tmp_path / quantizer, text_file, "--set", f"quantizer={quantizer}")
    record = json.loads((tmp_path / "gptq" / "llmcompress.json").read_text())
    outcomes = [x for block in record["blocks"] for x in block["linears"] if ".experts." in x["linear"]]
    tokens = {x["linear"]: x["tokens"] for x in outcomes}
    assert len(tokens) == 2 * 3 * EXPERTS
    fallbacks = {(x["where"], x["reason"]) for block in record["blocks"] for x in block["fallbacks"]}
    for linear, count in tokens.items():
        unreached = ".layers.0." in linear and linear.split(".experts.")[1][0] in UNREACHED
        assert (count == 0) == unreached
        assert ((linear, UNSEEN) in fallbacks) == unreached
        columns = 32 if linear.endswith("down_proj") else 64
        assert ((linear, FEW) in fallbacks) == (0 < count < columns)
        mine, plain = (codes_of(tmp_path / quantizer, linear) for quantizer in ("gptq", "rtn"))
        assert torch.equal(mine.codes, plain.codes) == unreached
    first = [count for name, count in tokens.items() if name.endswith("gate_proj") and ".layers.0." in name]
    assert sum(first) == 8 * 32 * 2  # every calibration token goes to two experts


def test_experts_of_several_formats_stop_plain_transformers_and_no_other_reader(
    models: Callable[[str], Path], run: Run, tmp_path: Path, text_file: Path
) -> None:
    out = tmp_path / "out"
    words = ("plan.bits=[3,4]", "plan.experts=block", "scorer=hessian")
    widths = (word for key in words for word in ("--set", key))
    quantized(run, models("mixtral"), out, text_file, *widths, "--budget", "3.9bits")
    section = json.loads((out / "config.json").read_text())["quantization_config"]
    targets = [target for group in section["config_groups"].values() for target in group["targets"]]
    patterns = [target for target in targets if "experts" in target]
    assert patterns[0] == SEVERAL
    assert sorted(map(blocks_of, patterns[1:])) == [(0,), (1,)]
    assert "plain transformers stops" in (out / "README.md").read_text()
    with pytest.raises(RuntimeError, match="issues during automatic conversion"):
        plain_logits(out, TOKENS)
    packed: Any = llmcompress.load(out, dtype=torch.float32)
    with torch.no_grad():
        found = packed(input_ids=TOKENS).logits
    assert float((found - probe_logits(out, tuple(TOKENS[0].tolist()), "cpu")).abs().max()) < 1e-4


def test_what_no_other_format_can_say_of_experts_is_refused(
    models: Callable[[str], Path], run: Run, tmp_path: Path, text_file: Path
) -> None:
    out = tmp_path / "out"
    quantized(run, models("mixtral"), out, text_file, "--set", "quantizer=rtn")
    for form in ("gptq", "bnb"):
        refused = run("export", out, "--format", form, "-o", tmp_path / form)
        assert refused.returncode == 2
        assert "packed experts" in refused.stderr
    assert run("export", out, "--format", "bf16", "-o", tmp_path / "bf16").returncode == 0
    exact = probe_logits(out, tuple(TOKENS[0].tolist()), "cpu")
    assert float((plain_logits(tmp_path / "bf16", TOKENS) - exact).abs().max()) < 0.03
    nf4 = tmp_path / "nf4"  # experts have no place in bitsandbytes' layout, so that it is our own
    quantized(run, models("mixtral"), nf4, text_file, "--set", "quantizer=nf4", "--budget", "8bits")
    assert json.loads((nf4 / "config.json").read_text())["quantization_config"]["quant_method"] == "llmcompress"
    packed: Any = llmcompress.load(nf4, dtype=torch.float32)
    with torch.no_grad():
        found = packed(input_ids=TOKENS).logits
    assert float((found - probe_logits(nf4, tuple(TOKENS[0].tolist()), "cpu")).abs().max()) < 1e-4


def test_few_tokens_do_not_make_rounding_worse_on_others() -> None:
    """Held-out error against that of rounding to nearest, over numbers of calibration tokens."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(64, 64, generator=generator) * torch.logspace(0, -1.5, 64)
    tokens, weight = (torch.randn(n, 64, generator=generator) for n in (4096, 48))
    tokens = tokens @ mixing.T
    spec, options, unseen = LinearSpec(bits=3, group_size=64), QuantizerOptions(), tokens[1024:]

    def loss(seen: Seen | None) -> float:
        quantizer = rtn if seen is None else gptq
        (found,) = quantizer.quantize([Request(weight, spec)], seen, options=options, dtype=torch.bfloat16)
        return float((unseen @ (found.codes.dequantize() - weight).T).square().mean())

    plain, trusting = loss(None), []
    for count in (2, 8, 32, 128, 1024):
        seen = Seen(tokens[:count].T @ tokens[:count] / count, count)
        trusting.append(loss(seen) / plain)
        assert loss(seen.steadied()) / plain < (1.02 if count < 64 else 0.9)
    assert max(trusting) > 1.2


def test_only_patterns_of_our_own_form_speak_of_experts() -> None:
    target = experts_target((0, 12))
    assert blocks_of(target) == (0, 12)
    for stranger in ("re:.*experts.*", "re:(a+)+$", "re:" + "(" * 50, target + "x", target[3:], ""):
        assert blocks_of(stranger) == ()
    for stem in ("model.layers.12.block_sparse_moe.experts.3.w1", "layers.12.mlp.experts.0.gate_proj"):
        assert block_of_expert(stem) == 12
    for stem in ("model.layers.1.mlp.shared_experts.up_proj", "model.layers.1.mlp.gate", "lm_head"):
        assert block_of_expert(stem) is None
