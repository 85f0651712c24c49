"""Checkpoints with several formats, opened without unpacking them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llmcompress
from llmcompress.errors import InputError
from llmcompress.hub.source import Source
from llmcompress.kernels import backends
from llmcompress.kernels.samples import random_codes
from llmcompress.kernels.stored import tensors_of
from llmcompress.preflight import check_source
from llmcompress.runtime.modules import PackedLinear
from llmcompress.runtime.shards import ShardReader
from llmcompress.spec import LinearSpec
from tests.conftest import save_model

TOKENS = torch.arange(3, 33)[None]
CONFIGS = {
    "mixed": ("rtn", ("plan.bits=[2, 3, 4, 8]", "plan.group_size=64"), "3.4bits"),
    "nf4": ("nf4", ("quantize.double=true",), "7bits"),
    "hqq": ("hqq", ("plan.group_size=64",), "7bits"),
    "twotier": ("twotier", ("plan.bits=[2, 3, 4]", "quantize.high_share=0.125", "plan.group_size=64"), "7bits"),
}


def gpt2_config() -> Any:
    import transformers

    return transformers.GPT2Config(
        vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1
    )


def mamba_config() -> Any:
    """A family that starts weights from the module above a linear."""
    import transformers

    return transformers.MambaConfig(vocab_size=96, hidden_size=64, num_hidden_layers=2, state_size=8)


@pytest.fixture(scope="module")
def outputs(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Every layout of a Llama, and two of a GPT-2."""
    from llmcompress.compress.allocate.budget import parse_budget
    from llmcompress.compress.run import QuantizeRequest, quantize
    from llmcompress.recipes import load_recipe

    folder = tmp_path_factory.mktemp("outputs")
    sources = {"llama": llama, "gpt2": save_model(folder / "gpt2", gpt2_config())}
    sources["mamba"] = save_model(folder / "mamba", mamba_config())
    wanted = [("llama", name) for name in CONFIGS] + [("gpt2", "mixed"), ("gpt2", "hqq"), ("mamba", "mixed")]
    for family, name in wanted:
        quantizer, changes, budget = CONFIGS[name]
        recipe = load_recipe("nf4" if quantizer == "nf4" else "fast", (f"quantizer={quantizer}", *changes))
        source = Source(sources[family], family)
        list(quantize(QuantizeRequest(source, folder / f"{family}-{name}", recipe, parse_budget(budget), "cpu", "")))
    return {(family, name): folder / f"{family}-{name}" for family, name in wanted}


@pytest.fixture(params=[("llama", name) for name in CONFIGS] + [("gpt2", "mixed"), ("gpt2", "hqq")], ids="-".join)
def output(request: pytest.FixtureRequest, outputs: dict[tuple[str, str], Path]) -> Path:
    return outputs[request.param]


def contents(folder: Path) -> dict[str, Tensor]:
    reader = ShardReader(check_source(folder, packed=True).paths)
    return {name: reader.read(name) for name in reader.names()}


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    found: Tensor = model(TOKENS).logits
    return found


def test_a_family_that_asks_linears_for_their_weight_opens(outputs: dict[tuple[str, str], Path]) -> None:
    packed, dense = (llmcompress.load(outputs["mamba", "mixed"], dtype=torch.float32, dense=x) for x in (False, True))
    found = [module for module in packed.modules() if isinstance(module, PackedLinear)]
    assert found
    assert not any(hasattr(module, "weight") for module in found)
    assert float((logits_of(packed) - logits_of(dense)).abs().max()) < 1e-4


def test_the_same_function_in_the_memory_of_the_file(output: Path) -> None:
    packed, dense = (llmcompress.load(output, dtype=torch.float32, dense=dense) for dense in (False, True))
    assert any(isinstance(module, PackedLinear) for module in packed.modules())
    assert float((logits_of(packed) - logits_of(dense)).abs().max()) < 1e-4
    prompt = {"inputs": TOKENS[:, :6], "attention_mask": torch.ones(1, 6), "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(packed.generate(**prompt), dense.generate(**prompt))  # type: ignore[operator]
    stored = {name: tensor for name, tensor in contents(output).items() if tensor.dtype != torch.float32}
    held = [b for m in packed.modules() if isinstance(m, PackedLinear) for b in m.buffers()]
    weights = sum(t.numel() * t.element_size() for t in held)
    assert weights <= 1.02 * sum(t.numel() * t.element_size() for t in stored.values()) + 1024 * len(held)


def test_saving_gives_the_same_file_contents(output: Path, tmp_path: Path) -> None:
    model = llmcompress.load(output)
    expected = logits_of(model)
    model.save_pretrained(tmp_path / "again")  # type: ignore[operator]
    before, after = contents(output), contents(tmp_path / "again")
    assert set(before) == set(after)
    assert all(before[n].dtype == after[n].dtype and torch.equal(before[n], after[n]) for n in before)
    old, new = (json.loads((f / "config.json").read_text()) for f in (output, tmp_path / "again"))
    assert old["quantization_config"] == new["quantization_config"]
    assert torch.equal(logits_of(llmcompress.load(tmp_path / "again")), expected)


def test_a_forward_compiles_whole(outputs: dict[tuple[str, str], Path]) -> None:
    model = llmcompress.load(outputs["llama", "mixed"], dtype=torch.float32)
    expected = logits_of(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits_of(compiled), expected, atol=1e-4, rtol=1e-4)


def test_plain_transformers_opens_ours_after_the_import(outputs: dict[tuple[str, str], Path]) -> None:
    from transformers import AutoModelForCausalLM

    from llmcompress.runtime.hf import packed_config

    native, shared = outputs["llama", "hqq"], outputs["llama", "mixed"]
    ours = AutoModelForCausalLM.from_pretrained(native, dtype=torch.float32)
    assert float((logits_of(ours) - logits_of(llmcompress.load(native, dtype=torch.float32))).abs().max()) < 1e-5
    plain = AutoModelForCausalLM.from_pretrained(shared, dtype=torch.float32)
    packed = AutoModelForCausalLM.from_pretrained(shared, dtype=torch.float32, config=packed_config(shared))
    assert isinstance(packed.model.layers[0].mlp.up_proj, PackedLinear)
    assert float((logits_of(packed) - logits_of(plain)).abs().max()) < 1e-3


def test_gradients_and_hooks_pass_through(outputs: dict[tuple[str, str], Path]) -> None:
    model = llmcompress.load(outputs["llama", "mixed"], dtype=torch.float32)
    seen: list[int] = []
    linear = model.get_submodule("model.layers.0.mlp.down_proj")
    linear.register_forward_pre_hook(lambda module, given: seen.append(given[0].shape[-1]))
    embedded = model.get_submodule("model.embed_tokens").weight
    model(TOKENS).logits.sum().backward()
    assert seen == [128]
    assert embedded.grad is not None
    assert float(embedded.grad.abs().max()) > 0


@pytest.mark.parametrize("bias", [False, True])
def test_a_module_moves_and_casts_without_touching_codes(bias: bool) -> None:
    spec = LinearSpec(bits=4, group_size=64)
    codes = random_codes(spec, 32, 128)
    tensors = tensors_of("", codes)
    module = PackedLinear(spec, tensors, (32, 128), nn.Parameter(torch.randn(32)) if bias else None)
    x = torch.randn(2, 128)
    expected = x @ codes.dequantize().T + (module.bias if bias else 0)
    torch.testing.assert_close(module(x), expected, atol=1e-3, rtol=1e-4)
    half = module.to(torch.float16)
    assert all(torch.equal(half._buffers[f"weight_{part}"], tensors[f".weight_{part}"]) for part in ("packed", "scale"))  # type: ignore[arg-type]
    assert half(x.half()).dtype == torch.float16
    torch.testing.assert_close(half.dequantize(), codes.dequantize())
    assert "in_features=128, out_features=32, int4" in repr(module)


def test_settled_in_a_layout_of_a_backend_it_saves_that_of_the_file() -> None:
    spec = LinearSpec(bits=3, group_size=64)
    codes = random_codes(spec, 32, 128)
    module = PackedLinear(spec, tensors_of("", codes), (32, 128))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    x = torch.randn(2, 128).bfloat16()
    with backends.use("torch_cpu"):
        module.settle(x)
    assert ".int4" in module._working()[0]
    exact = x.double() @ codes.dequantize().double().T
    assert float((module(x).double() - exact).norm() / exact.norm()) < 4e-3
    torch.testing.assert_close(module.dequantize(), codes.dequantize(), atol=2e-2, rtol=2e-2)
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    module.to(torch.float32)
    assert module._working()[0].startswith("file:")


def test_weights_that_do_not_fit_the_model_are_refused(outputs: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(outputs["llama", "mixed"], broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    with pytest.raises(InputError, match="weights, the model has"):
        llmcompress.load(broken)
