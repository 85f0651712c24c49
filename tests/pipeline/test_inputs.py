"""Linears that round what they read, end to end: ranges, files, what strangers make of them, integer products."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SMALL, llama_config, save_model
from safetensors.torch import load_file
from test_layouts import logits_of, quantized, section_of, strangers_stop
from torch import Tensor, nn

import llmcompress
from llmcompress.compress.pipeline import calibration, open_model
from llmcompress.compress.verify import probe_logits
from llmcompress.eval.run import EvalRequest, run_eval
from llmcompress.hub.source import Source
from llmcompress.model.stream import linear_modules
from llmcompress.model.text import TextRequest
from llmcompress.recipes import load_recipe
from llmcompress.runtime.inputs import MultiplyIntegers, RoundInputs, detach
from llmcompress.runtime.modules import PackedLinear

TOKENS = tuple(range(40))
SMALLER = (*SMALL[1::2], "plan.group_size=64", "plan.trials=false", "scorer=zd")


@pytest.fixture(scope="module")
def made(llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """An output for some settings; the same settings are quantized once."""
    known: dict[tuple[str, ...], Path] = {}

    def make(*changes: str) -> Path:
        if changes not in known:
            out = tmp_path_factory.mktemp("made") / "out"
            quantized(llama, out, "10bits", f"calibration.source={text_file}", *SMALLER, *changes, recipe="balanced")
            known[changes] = out
        return known[changes]

    return make


CASES = [
    ("int-quantized", ("plan.bits=[8]", "quantize.inputs=int8")),
    ("int-quantized", ("plan.bits=[8]", "quantize.inputs=int8-symmetric", "quantizer=rtn")),
    ("int-quantized", ("plan.bits=[8]", "quantize.inputs=int8-token")),
    ("float-quantized", ("plan.bits=[8]", "quantize.inputs=fp8", "quantizer=fp8")),
    ("float-quantized", ("plan.bits=[8]", "quantize.inputs=fp8-token", "quantizer=fp8")),
    ("pack-quantized", ("plan.bits=[4]", "quantize.inputs=int4-token")),
    ("mixed-precision", ("plan.bits=[4]", "plan.pin.down_proj=8", "quantize.inputs=int8")),
]


def inputs_and_outputs(model: nn.Module, linears: dict[str, nn.Module]) -> dict[str, tuple[Tensor, Tensor]]:
    """What each linear of a model is given and what it returns."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Callable[..., None]:
        def after(_: nn.Module, args: Any, output: Tensor) -> None:
            found[name] = (args[0], output)

        return after

    for name, module in linears.items():
        module.register_forward_hook(watch(name))
    logits_of(model)
    return found


@pytest.mark.parametrize(("layout", "changes"), CASES, ids=lambda x: x if isinstance(x, str) else x[1])
def test_strangers_open_rounded_inputs(layout: str, changes: tuple[str, ...], made: Callable[..., Path]) -> None:
    from transformers import AutoModelForCausalLM

    out = made(*changes)
    assert section_of(out)["format"] == layout
    assert "Rounded while it runs: inputs of linears" in (out / "README.md").read_text()
    theirs, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    dense = llmcompress.load(out, dtype=torch.float32, dense=True)
    assert float((logits_of(dense) - probe_logits(out, TOKENS, "cpu")).abs().max()) < 1e-5
    ours = llmcompress.load(out, dtype=torch.float32)
    expected = logits_of(theirs)  # decompresses on the way
    linears = {name: module for name, module in theirs.named_modules() if "proj" in name.rpartition(".")[2]}
    compared = inputs_and_outputs(theirs, linears)
    assert len(compared) == 21
    with torch.no_grad():
        for name, (given, wanted) in compared.items():
            error = (ours.get_submodule(name)(given) - wanted).abs().amax(-1) / wanted.abs().max()
            # a number on the edge between two codes may fall either way: at most one token in twenty
            assert float((error > 1e-5).float().mean()) <= 0.05, name
    difference = (logits_of(dense) - expected).abs().amax(-1).flatten()
    assert float(difference.median()) < 1e-4
    assert float(difference.max()) < 0.2


@torch.no_grad()
def same_linears(model: nn.Module, dense: nn.Module) -> dict[str, PackedLinear]:
    """The packed linears of a model, each found to compute what the same model's dense one does."""
    packed = {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}
    for name, module in packed.items():
        given = torch.randn(40, module.in_features, generator=torch.Generator().manual_seed(len(name)))
        wanted = dense.get_submodule(name)(given)
        assert float((module(given) - wanted).abs().max() / wanted.abs().max()) < 1e-5, name
    return packed


@pytest.mark.parametrize("place", [0, 2, 3, 5, 6])
def test_packed_linears_round_and_multiply_as_dense_ones_and_are_saved_as_they_were(
    place: int, made: Callable[..., Path], tmp_path: Path
) -> None:
    out = made(*CASES[place][1])
    model, dense = (llmcompress.load(out, dtype=torch.float32, dense=dense) for dense in (False, True))
    packed = same_linears(model, dense)
    assert len(packed) == 21
    if place in (0, 2):  # elsewhere a number on the edge between two codes moves everything after it
        assert float((logits_of(model) - logits_of(dense)).abs().amax(-1).median()) < 1e-4
    model.save_pretrained(tmp_path / "saved")
    before, after = (
        {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
        for folder in (out, tmp_path / "saved")
    )
    assert before.keys() == after.keys()
    for name in before:
        if any(name.startswith(linear + ".") for linear in packed):
            assert before[name].dtype == after[name].dtype
            assert torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8))


@pytest.mark.parametrize("place", [0, 2, 6])
def test_loading_multiplies_integers_where_both_sides_are(place: int, made: Callable[..., Path]) -> None:
    out = made(*CASES[place][1])
    model = llmcompress.load(out, dtype=torch.float32, dense=True)
    names = set(linear_modules(model)) - {"lm_head"}
    integer = {
        name for name, module in model.named_modules() if isinstance(vars(module).get("forward"), MultiplyIntegers)
    }
    assert integer == {name for name in names if place != 6 or name.endswith("down_proj")}
    rounded = logits_of(model)
    for name in integer:  # the same with dequantized weights and rounded inputs
        module = model.get_submodule(name)
        rounder = vars(module)["forward"].quantizer
        detach(module)
        module.register_forward_pre_hook(RoundInputs(rounder))
    assert float((logits_of(model) - rounded).abs().amax(-1).median()) < 1e-4
    detach(model)
    assert float((logits_of(model) - rounded).abs().max()) > 1e-3  # it did round


@pytest.mark.parametrize("quantizer", ["gptq", "rtn"])
def test_ranges_are_those_of_what_the_file_reads(
    quantizer: str, llama: Path, text_file: Path, made: Callable[..., Path]
) -> None:
    changes = ("plan.bits=[8]", "quantize.inputs=int8", "quantize.input_clip=none", f"quantizer={quantizer}")
    model = llmcompress.load(made(*changes), dtype=torch.float32)
    recipe = load_recipe("balanced", (f"calibration.source={text_file}", *SMALLER, *changes))
    tokens = calibration(open_model(Source(llama, "llama"), recipe, "cpu"), recipe).tokens
    ends: dict[str, tuple[float, float]] = {}

    def watch(name: str) -> Callable[..., None]:
        return lambda _, args: ends.update({name: (min(0.0, float(args[0].min())), max(0.0, float(args[0].max())))})

    names = [name for name in linear_modules(model) if name != "lm_head"]
    for name in names:
        model.get_submodule(name).register_forward_pre_hook(watch(name))
    with torch.no_grad():
        model(tokens)
    tensors: dict[str, Tensor] = {}
    for shard in made(*changes).glob("*.safetensors"):
        tensors |= load_file(shard)
    for name in names:
        low, high = ends[name]
        scale = (high - low) / 255
        assert float(tensors[f"{name}.input_scale"]) == pytest.approx(scale, rel=2e-2), name
        assert abs(float(tensors[f"{name}.input_zero_point"]) - (-128 - low / scale)) <= 2.1, name
    for block in range(3):
        shared = {float(tensors[f"model.layers.{block}.self_attn.{x}_proj.input_scale"]) for x in "qkv"}
        assert len(shared) == 1


def test_a_rewrite_settles_the_ranges_of_what_norms_return(made: Callable[..., Path]) -> None:
    out = made("plan.bits=[8]", "quantize.inputs=int8", "rewrite.methods=[repquant]")
    tensors: dict[str, Tensor] = {}
    for shard in out.glob("*.safetensors"):
        tensors |= load_file(shard)
    zeros = {name: int(tensor) for name, tensor in tensors.items() if name.endswith("input_zero_point")}
    fed = [name for name in zeros if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")]
    assert len(fed) == 15
    assert {zeros[name] for name in fed} == {0}  # norms without a bias are made symmetric
    assert any(zeros[name] for name in zeros if name not in fed)
    model = llmcompress.load(out, dtype=torch.float32)
    assert float((logits_of(model) - probe_logits(out, TOKENS, "cpu")).abs().max()) < 1e-5


def test_conv1d_and_mixtures_are_ours_alone(text_file: Path, tmp_path: Path, llama: Path) -> None:
    import transformers

    gpt2 = transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64)
    usual = (f"calibration.source={text_file}", *SMALLER)
    cases = [
        (save_model(tmp_path / "gpt2", gpt2), "compressed-tensors", ("plan.bits=[8]", "quantize.inputs=int8")),
        (llama, "llmcompress", ("plan.bits=[4]", "quantizer=nf4", "quantize.inputs=int8-token")),
    ]
    for place, (source, method, changes) in enumerate(cases):
        out = tmp_path / f"out{place}"
        quantized(source, out, "12bits", *usual, *changes, recipe="balanced")
        assert section_of(out)["quant_method"] == method
        strangers_stop(out)
        model = llmcompress.load(out, dtype=torch.float32, dense=True)
        rounded = logits_of(model)
        assert float((rounded - probe_logits(out, TOKENS, "cpu")).abs().max()) < 1e-4
        assert same_linears(llmcompress.load(out, dtype=torch.float32), model)
        detach(model)
        assert float((logits_of(model) - rounded).abs().max()) > 1e-3


def test_evaluation_feels_rounded_inputs(llama: Path, tmp_path: Path, made: Callable[..., Path]) -> None:
    (tmp_path / "other.txt").write_text("Four score and seven years ago, and no one reads it backwards.\n" * 20)
    text = TextRequest(str(tmp_path / "other.txt"), 4, 32, 0, "evaluation")

    def kld(out: Path) -> float:
        found = run_eval(EvalRequest(Source(out, "out"), Source(llama, "llama"), text, 4, "cpu", ""))
        assert found.summary.kld.mean is not None
        return found.summary.kld.mean

    eight = kld(made("plan.bits=[8]"))
    assert 0 < eight < kld(made(*CASES[2][1])) < kld(made("plan.bits=[8]", "quantize.inputs=int4-token"))


def test_damaged_sections_are_refused(made: Callable[..., Path], tmp_path: Path) -> None:
    out = shutil.copytree(made(*CASES[0][1]), tmp_path / "out")
    config = json.loads((out / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_00"]
    for change in ({"strategy": "group"}, {"num_bits": 7}, {"dynamic": True}):
        broken = {**group, "input_activations": group["input_activations"] | change}
        section = config["quantization_config"] | {"config_groups": {"group_00": broken}}
        (out / "config.json").write_text(json.dumps({**config, "quantization_config": section}))
        with pytest.raises(llmcompress.errors.InputError, match=r"config\.json"):
            llmcompress.load(out)


def test_the_head_reads_what_it_always_read(tmp_path: Path, text_file: Path) -> None:
    source = save_model(tmp_path / "llama", llama_config(num_hidden_layers=2))
    changes = ("plan.bits=[8]", "plan.pin.lm_head=8", "quantize.inputs=int8")
    plan = quantized(
        source, tmp_path / "out", "10bits", f"calibration.source={text_file}", *SMALLER, *changes, recipe="balanced"
    ).plan
    for assigned in plan.allocation.assigned:
        assert (assigned.spec.inputs is None) == (assigned.linear == "lm_head")


def test_rounding_is_learned_through_rounded_inputs(llama: Path, text_file: Path, tmp_path: Path) -> None:
    changes = ("plan.bits=[3]", "quantizer=signround", "quantize.iterations=20", "calibration.batch_size=2")
    rounded = ("quantize.inputs=int4-token", "quantize.softmax=log2")
    for place, more in enumerate(((), rounded)):
        out = tmp_path / f"out{place}"
        usual = (f"calibration.source={text_file}", *SMALLER, "plan.bits=[3]", *changes, *more)
        quantized(llama, out, "10bits", *usual, recipe="balanced")
    plain, other = (llmcompress.load(tmp_path / f"out{place}", dtype=torch.float32) for place in range(2))
    name = "model.layers.1.mlp.up_proj"
    assert not torch.equal(plain.get_submodule(name).dequantize(), other.get_submodule(name).dequantize())
