"""A Hadamard matrix on what `down` reads while the model runs: exact, stored, read back, refused where it cannot be."""

import json
from pathlib import Path

import pytest
import torch
from conftest import SMALL, llama_config, save_model
from scipy.linalg import hadamard
from test_inputs import same_linears
from test_layouts import logits_of, quantized, section_of, strangers_stop
from transformers import Gemma2Config, GPT2Config, MixtralConfig, Qwen3Config

import llmcompress
from llmcompress.compress.online import last_linear, mix_inputs, with_mixed_inputs
from llmcompress.compress.rewriting.exact import exact
from llmcompress.compress.verify import VerifyError, probe_logits, require, verify
from llmcompress.errors import InputError
from llmcompress.kernels.hadamard import block_of, transformed
from llmcompress.kernels.inputs import InputQuantizer
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.trace import trace
from llmcompress.runtime.inputs import detach
from llmcompress.spec import InputSpec
from llmcompress.types import LinearSpec

TOKENS = tuple(range(40))
SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
FAMILIES = {
    "llama": llama_config(intermediate_size=96),
    "qwen3": Qwen3Config(**SIZES),
    "gemma2": Gemma2Config(**SIZES),
    "gpt2": GPT2Config(
        vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1
    ),
}  # fmt: skip
MIXED = ("quantize.online_hadamard=true", "plan.group_size=32", "plan.trials=false", "scorer=zd")


@pytest.mark.parametrize("block", [1, 2, 16, 64])
def test_the_transform_is_the_matrix(block: int) -> None:
    values = torch.randn(3, 2, 192, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = torch.from_numpy(hadamard(block)).double()
    wanted = (values.view(3, 2, -1, block) @ matrix / block**0.5).reshape(3, 2, 192)
    found = transformed(values, block)
    assert torch.allclose(found, wanted, atol=1e-12)
    assert torch.allclose(transformed(found, block), values, atol=1e-12)


def test_the_block_is_the_largest_that_divides() -> None:
    assert [block_of(columns) for columns in (172, 704, 96, 4096, 11)] == [4, 64, 32, 4096, 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_computes_what_it_did(family: str, tmp_path: Path) -> None:
    """In float64, within 1e-8 of its largest logit; and the weights are not what they were."""
    skeleton = Skeleton.open(save_model(tmp_path / "model", FAMILIES[family]))
    found = trace(skeleton)
    skeleton.load_rest()
    for info in found.blocks:
        skeleton.load_block(info.index)
    model = skeleton.model.double()
    with exact():
        before = logits_of(model)
        for info, block in zip(found.blocks, skeleton.blocks, strict=True):
            linear = last_linear(info)
            size = block_of(linear.columns)
            spec = LinearSpec(bits=4, group_size=32, inputs=InputSpec(hadamard=size))
            weight = model.get_submodule(linear.name).weight.clone()
            mix_inputs(block, info, {linear.name: spec})
            assert not torch.allclose(model.get_submodule(linear.name).weight, weight)
        after = logits_of(model)
        detach(model)
        without = logits_of(model)
    scale = float(before.abs().max())
    assert float((after - before).abs().max()) < 1e-8 * scale
    assert float((without - before).abs().max()) > 1e-2 * scale


def test_an_outlier_is_spread_over_its_block() -> None:
    """Rounded to 4 bits under one scale, values beside an outlier survive only where they are mixed with it."""
    values = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    values[:, 5] *= 50
    plain, mixed = InputSpec(bits=4, scale="token"), InputSpec(bits=4, scale="token", hadamard=128)
    left = InputQuantizer(plain)(values) - values
    right = InputQuantizer(mixed)(values) - transformed(values, 128)
    assert float(right.square().sum()) < 0.5 * float(left.square().sum())
    codes, scale = InputQuantizer(mixed).codes(values)
    assert torch.allclose(codes * scale, InputQuantizer(mixed)(values))


def test_gradients_pass_through_the_matrix() -> None:
    values = torch.randn(2, 32, generator=torch.Generator().manual_seed(2), requires_grad=True)
    upstream = torch.randn(2, 32, generator=torch.Generator().manual_seed(3))
    (found,) = torch.autograd.grad(InputQuantizer(InputSpec(hadamard=32, scale="token"))(values), values, upstream)
    assert torch.allclose(found, transformed(upstream, 32), atol=1e-6)


@pytest.mark.parametrize(
    ("bits", "inputs"), [("[4]", "int4"), ("[4]", "int8-token"), ("[8]", "int8")], ids=["w4a4", "w4a8", "w8a8"]
)
def test_it_is_stored_and_read_back(bits: str, inputs: str, llama: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    changes = (*SMALL[1:-1:2], *MIXED, f"calibration.source={text_file}", f"plan.bits={bits}")
    finished = quantized(llama, out, "10bits", *changes, f"quantize.inputs={inputs}", recipe="balanced")
    mixed = {a.linear for a in finished.plan.allocation.assigned if a.spec.inputs and a.spec.inputs.hadamard == 128}
    assert mixed == {f"model.layers.{place}.mlp.down_proj" for place in range(3)}
    expected = probe_logits(out, TOKENS, "cpu")
    packed, dense = (llmcompress.load(out, dtype=torch.float32, dense=dense) for dense in (False, True))
    assert float((logits_of(dense) - expected).abs().max()) < 1e-5
    assert mixed < set(same_linears(packed, dense))
    if inputs != "int4":
        return
    strangers_stop(out)
    config = json.loads((out / "config.json").read_text())
    assert section_of(out)["quant_method"] == "llmcompress"
    for group in config["quantization_config"]["groups"].values():
        group["spec"]["inputs"].pop("hadamard", None)
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerifyError):
        require(verify(out))
    assert float((probe_logits(out, TOKENS, "cpu") - expected).abs().max()) > 1e-2


def test_models_without_such_a_linear_are_refused(tmp_path: Path) -> None:
    mixtral = MixtralConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1)
    odd = llama_config(intermediate_size=72)
    for name, config, reason in (("mixtral", mixtral, "experts"), ("odd", odd, "72 inputs")):
        found = trace(Skeleton.open(save_model(tmp_path / name, config)))
        with pytest.raises(InputError, match=reason):
            with_mixed_inputs(found, {})


def test_without_rounded_inputs_it_is_refused(llama: Path) -> None:
    found = trace(Skeleton.open(llama))
    specs = {linear.name: (LinearSpec(bits=4, group_size=32),) for linear in found.linears}
    with pytest.raises(InputError, match="inputs are not rounded"):
        with_mixed_inputs(found, specs)
