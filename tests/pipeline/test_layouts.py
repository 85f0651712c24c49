"""Formats other than plain integers, end to end: what is written, what strangers make of it, and what reads it back."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import llama_config, save_model
from torch import Tensor

import llmcompress
from llmcompress.cli import cli
from llmcompress.compress.allocate.budget import parse_budget
from llmcompress.compress.pipeline import open_model
from llmcompress.compress.run import Finished, QuantizeRequest, quantize
from llmcompress.compress.verify import probe_logits
from llmcompress.errors import InputError
from llmcompress.eval.run import EvalRequest, run_eval
from llmcompress.hub.source import Source
from llmcompress.model.checkpoint import CheckpointReader
from llmcompress.model.text import TextRequest
from llmcompress.preflight import check_source
from llmcompress.recipes import load_recipe
from llmcompress.runtime.packed import PackedReader

TOKENS = tuple(range(40))


def quantized(source: Path, output: Path, budget: str, *changes: str, recipe: str = "nf4") -> Finished:
    """One run of the whole chain, in this process; it verifies what it wrote."""
    request = QuantizeRequest(
        Source(source, source.name), output, load_recipe(recipe, changes), parse_budget(budget), "cpu", "made by a test"
    )
    last = list(quantize(request))[-1]
    assert isinstance(last, Finished)
    assert all(check.passed for check in last.checks)
    return last


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> Tensor:
    found: Tensor = model(torch.tensor([TOKENS])).logits
    return found


@pytest.fixture(scope="module")
def sources(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A Llama, and a GPT-2, which keeps its weights transposed."""
    import transformers

    gpt2 = transformers.GPT2Config(
        vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1
    )
    return {"llama": llama, "gpt2": save_model(tmp_path_factory.mktemp("models") / "gpt2", gpt2)}


def section_of(output: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((output / "config.json").read_text())["quantization_config"]
    return found


@pytest.mark.parametrize(("name", "kind", "double"), [("llama", "nf4", True), ("gpt2", "fp4", False)])
def test_strangers_open_four_bit_tables(
    name: str, kind: str, double: bool, sources: dict[str, Path], tmp_path: Path
) -> None:
    import transformers
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    out = tmp_path / "out"
    quantized(sources[name], out, "8bits", f"quantizer={kind}", f"quantize.double={str(double).lower()}")
    section = section_of(out)
    assert (section["bnb_4bit_quant_type"], section["bnb_4bit_use_double_quant"]) == (kind, double)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = llmcompress.load(out, dense=True)
    compared = 0
    for module_name, module in theirs.named_modules():
        if isinstance(module, Linear4bit):  # before any forward, which may repack the weights
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
            mine = ours.get_submodule(module_name).weight
            assert torch.equal(mine if name == "llama" else mine.T, weight), module_name
            module.support_avx512bf16_for_cpu = False
            compared += 1
    assert compared == (21 if name == "llama" else 8)
    assert float((logits_of(ours) - logits_of(theirs)).abs().max()) < 1e-4
    assert float((probe_logits(out, TOKENS, "cpu") - logits_of(theirs)).abs().max()) < 1e-4


def test_the_nf4_recipe_is_read_back_by_every_command(llama: Path, tmp_path: Path, text_file: Path) -> None:
    out = tmp_path / "out"
    words = ["quantize", str(llama), "--budget", "6.1bits", "--recipe", "nf4", "-o", str(out), "--json"]
    told = json.loads(CliRunner().invoke(cli, words, catch_exceptions=False).stdout)
    contents = json.loads(CliRunner().invoke(cli, ["inspect", str(out), "--json"], catch_exceptions=False).stdout)
    assert contents["bits_per_weight"] == told["bits_per_weight"]
    assert {f["format"]: f["weights"] for f in contents["formats"]}["nf4"] == 110_592
    text = TextRequest(str(text_file), 4, 32, 0, "evaluation")
    report = run_eval(EvalRequest(Source(out, "out"), Source(llama, "llama"), text, 4, "cpu", ""))
    assert report.footprint.bits_per_weight == told["bits_per_weight"]
    assert 0 < report.summary.kld.mean < 0.5
    assert "bitsandbytes" in (out / "README.md").read_text()


def test_a_budget_below_the_only_format_names_the_least(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the smallest possible is 6\.076bits"):
        quantized(llama, tmp_path / "out", "4.2bits")


@pytest.mark.parametrize("change", ["plan.bits=[2, 3]", "plan.pin.q_proj=8", "plan.candidates.q_proj=[8]"])
def test_widths_a_quantizer_does_not_make_are_refused(llama: Path, change: str) -> None:
    with pytest.raises(InputError, match="no format of such a width") as caught:
        open_model(Source(llama, "llama"), load_recipe("nf4", (change,)), "cpu")
    assert "it can make: 4 bits" in caught.value.hint


def test_rows_that_are_not_whole_blocks_are_left_alone(tmp_path: Path) -> None:
    source = save_model(tmp_path / "odd", llama_config(intermediate_size=96, num_hidden_layers=2))
    plan = quantized(source, tmp_path / "out", "8bits").plan
    kept = {k.linear: k.reason for k in plan.allocation.kept}
    assert set(kept) == {f"model.layers.{index}.mlp.down_proj" for index in range(2)}
    assert all("96 inputs are not divisible" in reason for reason in kept.values())
    assert set(kept) < set(section_of(tmp_path / "out")["llm_int8_skip_modules"])


REFUSED = """
import sys, transformers
assert "llmcompress" not in sys.modules
try:
    transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
except (RuntimeError, ValueError) as error:
    sys.exit(f"refused: {error}")
"""


def strangers_stop(out: Path) -> None:
    """Plain transformers, without our package, stops at a size that does not fit."""
    words = [sys.executable, "-c", REFUSED, str(out)]
    stranger = subprocess.run(words, capture_output=True, text=True, check=False, cwd=out.parent)
    assert stranger.returncode == 1
    assert "refused" in stranger.stderr
    assert "size mismatch" in stranger.stderr or "mismatched" in stranger.stderr


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", ("quantizer=codebook", "plan.bits=[3, 4]")),
        ("gpt2", ("quantizer=hqq",)),
        ("llama", ("quantizer=twotier", "plan.bits=[2, 3, 4]", "quantize.high_share=0.125")),
        ("gpt2", ("quantize.correction_rank=3", "plan.bits=[2, 3]")),
    ],
)
def test_native_checkpoints_are_ours_alone(
    name: str, changes: tuple[str, ...], sources: dict[str, Path], tmp_path: Path, text_file: Path
) -> None:
    out = tmp_path / "out"
    usual = (f"calibration.source={text_file}", "calibration.samples=8", "calibration.sequence_length=32")
    finished = quantized(
        sources[name], out, "7bits", *usual, "scorer=zd", "plan.group_size=64", *changes, recipe="balanced"
    )
    section = section_of(out)
    assert (section["quant_method"], section["version"]) == ("llmcompress", 1)
    for text in (json.dumps(section), (out / "README.md").read_text()):
        assert "llmcompress.load" in text
    strangers_stop(out)
    ours = llmcompress.load(out, dense=True)
    reader = PackedReader(CheckpointReader(check_source(out, packed=True).tensors), json.loads(config_text(out)))
    specs = {a.linear: a.spec for a in finished.plan.allocation.assigned}
    for stem in reader.stems():
        linear = reader.linear(stem)
        module = next(n for n in specs if n.endswith(stem))
        assert linear.spec == specs[module]
        weight = ours.get_submodule(module).weight
        assert torch.equal(weight.T if name == "gpt2" else weight, linear.dequantize())
    assert float((logits_of(ours) - probe_logits(out, TOKENS, "cpu")).abs().max()) < 1e-4
    assert float((logits_of(ours) - logits_of(llmcompress.load(out, dtype=torch.float32))).abs().max()) < 1e-4
    shown = CliRunner().invoke(cli, ["inspect", str(out), "--json"], catch_exceptions=False).stdout
    assert json.loads(shown)["bits_per_weight"] == finished.plan.allocation.bits_per_weight


def config_text(output: Path) -> str:
    return (output / "config.json").read_text()


def test_damaged_native_checkpoints_are_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantized(sources["llama"], out, "7bits", "quantizer=hqq", "plan.bits=[4]", "plan.group_size=64")
    config = json.loads(config_text(out))
    section = config["quantization_config"]
    damages = [
        ({"version": 2}, "layout version 2"),
        ({"groups": {}}, "no group lists"),
        ({"groups": {"group_00": {"targets": ["x"], "spec": {"bits": 17}}}}, "damaged"),
        ({"quant_method": "else"}, "not a checkpoint this can read"),
    ]
    for change, said in damages:
        (out / "config.json").write_text(json.dumps({**config, "quantization_config": section | change}))
        with pytest.raises(InputError, match=said):
            llmcompress.load(out)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_loading_opens_pack_quantized_too(name: str, sources: dict[str, Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    quantized(sources[name], tmp_path / "out", "4bits", "plan.group_size=64", recipe="fast")
    ours = llmcompress.load(tmp_path / "out", dtype=torch.float32)
    expected = probe_logits(tmp_path / "out", TOKENS, "cpu")
    if name == "llama":
        expected = logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32))
    assert not ours.training
    assert float((logits_of(ours) - expected).abs().max()) < 1e-4


def test_a_head_in_a_four_bit_table_is_opened_by_strangers(llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    quantized(llama, out, "9bits/file")
    assert section_of(out)["llm_int8_skip_modules"] == []
    theirs = AutoModelForCausalLM.from_pretrained(out)
    for module in theirs.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    assert type(theirs.lm_head).__name__ == "Linear4bit"
    assert float((logits_of(llmcompress.load(out)) - logits_of(theirs)).abs().max()) < 1e-4


def test_loading_refuses_what_is_no_quantized_checkpoint(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a quantized checkpoint"):
        llmcompress.load(llama)
    with pytest.raises(InputError, match=r"config\.json"):
        llmcompress.load(tmp_path)
    words = [sys.executable, "-c", "import llmcompress, sys; print('torch' in sys.modules)"]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip() == "False"
