"""Exports: what they write decodes, by a reader as slow as it is obvious, to what the checkpoint stands for."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import llama_config, save_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import llmcompress
from llmcompress.cli import cli
from llmcompress.compress.allocate.budget import parse_budget
from llmcompress.compress.export.checkpoint import Options, changed_scales, half_scales
from llmcompress.compress.export.formats import gptq
from llmcompress.compress.export.run import Exported, ExportRequest, export
from llmcompress.compress.run import QuantizeRequest, quantize
from llmcompress.compress.verify import VerifyError
from llmcompress.errors import InputError
from llmcompress.hub.source import Source
from llmcompress.kernels.codes import Codes
from llmcompress.recipes import load_recipe
from llmcompress.spec import LinearSpec

TOKENS = torch.tensor([list(range(40))])
MIXED = ("plan.bits=[2,3,4,8]", "plan.group_size=32")


def quantized(source: Path, output: Path, budget: str, *changes: str, recipe: str = "fast") -> Path:
    request = QuantizeRequest(
        Source(source, source.name), output, load_recipe(recipe, changes), parse_budget(budget), "cpu", "made by a test"
    )
    list(quantize(request))
    return output


def exported(source: Path, output: Path, format_: str, **options: Any) -> Exported:
    request = ExportRequest(Source(source, source.name), output, format_, "made by a test", Options(**options))
    last = list(export(request))[-1]
    assert isinstance(last, Exported)
    return last


@pytest.fixture(scope="module")
def mixed(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in several widths."""
    return quantized(llama, tmp_path_factory.mktemp("export") / "mixed", "4.2bits", *MIXED)


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    found: Tensor = model(TOKENS).logits.float()
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_plain_export_is_the_dequantized_model(tied: bool, dtype: str, mixed: Path, tmp_path: Path) -> None:
    import transformers

    if tied:
        source = save_model(tmp_path / "tied", llama_config(tie_word_embeddings=True, num_hidden_layers=2))
        mixed = quantized(source, tmp_path / "packed", "4.2bits", *MIXED)
    done = exported(mixed, tmp_path / "plain", "bf16", dtype=dtype)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.dtype == getattr(torch, dtype)
    assert torch.equal(logits_of(theirs), logits_of(llmcompress.load(mixed, dense=True, dtype=theirs.dtype)))
    tensors = {name for shard in (tmp_path / "plain").glob("*.safetensors") for name in load_file(shard)}
    assert ("lm_head.weight" in tensors) is not tied
    assert done.record.lossless is (dtype == "float32")
    assert 0 <= done.record.largest_error <= 2**-8


def test_a_plain_export_of_transposed_weights_opens_too(tmp_path: Path) -> None:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1
    )
    out = quantized(save_model(tmp_path / "gpt2", config), tmp_path / "out", "4.2bits", *MIXED)
    exported(out, tmp_path / "plain", "bf16", dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(logits_of(theirs), logits_of(llmcompress.load(out, dense=True)))
    with pytest.raises(InputError, match="Conv1D"):
        exported(out, tmp_path / "gptq", "gptq")


def bit(words: Tensor, place: int) -> int:
    """One bit of a row of int32 words, the lowest of the first word first."""
    return int(words[place // 32]) >> (place % 32) & 1


def slow_gptq(tensors: dict[str, Tensor], bits: int, first: int) -> Tensor:
    """The weights `(rows, columns)` that four tensors of the format stand for, bit by bit."""
    rows, columns = tensors[".scales"].shape[1], len(tensors[".g_idx"])
    found = torch.zeros(rows, columns)
    for row in range(rows):
        for column in range(columns):
            group = int(tensors[".g_idx"][column])
            code = sum(bit(tensors[".qweight"][:, row], column * bits + i) << i for i in range(bits))
            zero = sum(bit(tensors[".qzeros"][group], row * bits + i) << i for i in range(bits)) + first
            found[row, column] = (code - zero) * tensors[".scales"][group, row].float()
    return found


@given(data=st.data(), bits=st.sampled_from(gptq.WIDTHS), kind=st.sampled_from(["int", "asymmetric", "row"]))
@settings(max_examples=15, deadline=None)
def test_gptq_tensors_decode_to_the_weights(data: st.DataObject, bits: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1000)))
    columns, size = 64, 64 if kind == "row" else 32
    codes = torch.randint(0, 1 << bits, (32, columns), generator=generator, dtype=torch.uint8)
    scale = torch.randn(32, columns // size, generator=generator).to(torch.bfloat16)
    zero = None
    if kind == "asymmetric":
        zero = torch.randint(0, 1 << bits, scale.shape, generator=generator) << (8 - bits)
        zero[0, 0] = 0
    spec = LinearSpec(bits=bits, group_size=size, kind="asymmetric" if zero is not None else "int")
    found = Codes(codes, half_scales(scale, "w"), spec, zero=None if zero is None else zero.to(torch.uint8))
    for version in (1, 2) if zero is None else (2,):
        tensors = gptq.tensors_of(found, version=version)
        assert torch.equal(slow_gptq(tensors, bits, 2 - version), replace(found, scale=scale).dequantize())


def test_version_one_says_one_less_than_the_middle(mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "gptq"
    done = exported(quantized_four(mixed, tmp_path), out, "gptq")
    tensors = {k: v for shard in out.glob("*.safetensors") for k, v in load_file(shard).items()}
    zeros = [tensor for name, tensor in tensors.items() if name.endswith(".qzeros")]
    assert zeros
    assert all(bool((tensor == 0x77777777).all()) for tensor in zeros)
    section = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (section["checkpoint_format"], section["bits"], "dynamic" in section) == ("gptq", 4, False)
    assert done.record.lossless


@pytest.mark.parametrize("word", gptq.VERSIONS)
@pytest.mark.parametrize("lowest", [0, 1, None])
def test_either_version_says_the_same_weights_or_refuses(word: str, lowest: int | None, tmp_path: Path) -> None:
    """Codes with zero-points of their own, the least of which is `lowest`, and symmetric ones."""
    source = save_model(tmp_path / "source", llama_config(num_hidden_layers=1))
    more = () if lowest is None else ("quantizer=hqq",)
    four = quantized(source, tmp_path / "four", "5bits", "plan.bits=[4]", "plan.group_size=32", *more)
    if lowest is not None:
        whole_zeros(four, lowest)
    out, version = tmp_path / "out", gptq.VERSIONS[word]
    if (version, lowest) == (1, 0):
        with pytest.raises(InputError, match="a zero-point of 0, which version 1 cannot say"):
            exported(four, out, "gptq", checkpoint_format=word)
        assert [path.name for path in tmp_path.glob("*out*")] == []
        return
    assert exported(four, out, "gptq", checkpoint_format=word).record.lossless
    section = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (section["checkpoint_format"], section["format"]) == (word, word)
    name = "model.layers.0.mlp.down_proj"
    tensors = {k: v for shard in out.glob("*.safetensors") for k, v in load_file(shard).items()}
    part = {end: tensors[name + end] for end in gptq.PARTS}
    part |= {end: part[end][:, :32] for end in (".qweight", ".scales")}
    weight = llmcompress.load(four, dense=True).get_submodule(name).weight
    assert torch.equal(slow_gptq(part, 4, 2 - version), weight[:32])


def whole_zeros(folder: Path, lowest: int) -> None:
    """Zero-points of a 4-bit output of ours made whole codes, from `lowest` up; the weights change with them."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in [name for name in tensors if name.endswith(".weight_zero")]:
            tensors[name] = (torch.arange(tensors[name].numel()) % 4 + lowest).to(torch.uint8).view_as(
                tensors[name]
            ) * 16
        save_file(tensors, path, metadata={"format": "pt"})


def quantized_four(mixed: Path, folder: Path) -> Path:
    source = save_model(folder / "source", llama_config(num_hidden_layers=1))
    return quantized(source, folder / "four", "4.6bits", "plan.bits=[4]", "plan.group_size=32")


def test_mixed_widths_are_found_by_the_patterns(mixed: Path, tmp_path: Path) -> None:
    out = tmp_path / "gptq"
    done = exported(mixed, out, "gptq")
    assert done.record.lossless
    section = json.loads((out / "config.json").read_text())["quantization_config"]
    tensors = {k: v for shard in out.glob("*.safetensors") for k, v in load_file(shard).items()}
    model = llmcompress.load(mixed, dense=True)
    widths = set()
    for name in (n.removesuffix(".qweight") for n in tensors if n.endswith(".qweight")):
        layers = [v for pattern, v in section["dynamic"].items() if re.match(pattern[2:], name)]
        assert len(layers) <= 1
        layer = layers[0] if layers else section
        parts = {part: tensors[name + part] for part in gptq.PARTS}
        columns = len(parts[".g_idx"])
        assert parts[".qweight"].shape[0] * 32 == columns * layer["bits"]
        assert parts[".scales"].shape[0] == columns // layer["group_size"]
        if layer["bits"] not in widths:  # one of each width bit by bit, which is slow
            weight = model.get_submodule(name).weight
            rows = slice(0, 32)
            part = {
                ".qweight": parts[".qweight"][:, rows], ".qzeros": parts[".qzeros"], ".g_idx": parts[".g_idx"],
                ".scales": parts[".scales"][:, rows],
            }  # fmt: skip
            assert torch.equal(slow_gptq(part, layer["bits"], 1), weight[rows])
        widths.add(layer["bits"])
    assert len(widths) > 1


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"bits": 5, "group_size": 32}, "5-bit"),
        ({"bits": 4, "group_size": 64, "kind": "nf4"}, "nf4"),
        ({"bits": 3, "group_size": 0, "kind": "codebook"}, "codebook3"),
        ({"bits": 3, "group_size": 32, "high_share": 0.1}, "two widths"),
        ({"bits": 4, "group_size": 48}, "groups of 48"),
        ({"bits": 4, "group_size": 32}, "do not fill"),
    ],
)
def test_gptq_says_why_it_cannot_hold_a_format(spec: dict[str, Any], reason: str) -> None:
    rows = 30 if reason == "do not fill" else 32
    assert reason in (gptq.refusal(LinearSpec(**spec), rows, 96) or "")
    assert gptq.refusal(LinearSpec(bits=4, group_size=96), 32, 96) is None


def test_zero_points_between_codes_are_refused() -> None:
    spec, codes = LinearSpec(bits=4, group_size=32, kind="asymmetric"), torch.zeros(32, 32, dtype=torch.uint8)
    between = Codes(codes, torch.ones(32, 1), spec, zero=torch.full((32, 1), 17, dtype=torch.uint8))
    assert gptq.zeros_of(between) is None
    with pytest.raises(InputError, match="between codes"):
        gptq.tensors_of(between, version=2)


def test_scales_that_float16_does_not_hold() -> None:
    exact = torch.tensor([2.0**-17 * 1.9921875, -1.5, 65280.0], dtype=torch.bfloat16)
    assert changed_scales(exact) == 0
    assert changed_scales(torch.tensor([2.0**-18 * 1.9921875, 1.0], dtype=torch.bfloat16)) == 1
    with pytest.raises(InputError, match="65504"):
        half_scales(torch.tensor([65536.0], dtype=torch.bfloat16), "w")


def test_what_reads_back_differently_is_not_published(
    mixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = gptq.tensors_of

    def wrong(codes: Codes, *, version: int) -> dict[str, Tensor]:
        return true(codes, version=2)  # zero-points as version 2 has them, in a file of version 1

    monkeypatch.setattr(gptq, "tensors_of", wrong)
    with pytest.raises(VerifyError, match="was meant"):
        exported(mixed, tmp_path / "out", "gptq")
    assert [path.name for path in tmp_path.iterdir()] == []


def test_bitsandbytes_is_carried_over_or_made_and_said(llama: Path, mixed: Path, tmp_path: Path) -> None:
    import transformers
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    source = quantized(llama, tmp_path / "source", "8bits", "quantize.double=false", recipe="nf4")
    same = exported(source, tmp_path / "same", "bnb")
    assert same.record.lossless
    assert "none has changed" in same.record.notes[0]
    for shard in source.glob("*.safetensors"):
        ours, theirs = load_file(shard), load_file(tmp_path / "same" / shard.name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours if "quant_state" not in name)
    section = [json.loads((f / "config.json").read_text())["quantization_config"] for f in (source, tmp_path / "same")]
    assert section[0] == section[1]
    again = exported(mixed, tmp_path / "again", "bnb", kind="fp4")
    assert 0.05 < again.record.largest_error < 0.3
    assert "once more" in again.record.notes[0]
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = llmcompress.load(tmp_path / "again", dense=True)
    linears = [(name, module) for name, module in theirs.named_modules() if isinstance(module, Linear4bit)]
    assert len(linears) == 3 * 7
    for name, module in linears:
        weight = dequantize_4bit(module.weight.data, module.weight.quant_state)
        assert torch.equal(weight, ours.get_submodule(name).weight)
    with pytest.raises(InputError, match="nothing in it is quantized"):
        exported(llama, tmp_path / "plain", "bnb")


def test_rounded_inputs_are_refused(llama: Path, tmp_path: Path) -> None:
    out = quantized(llama, tmp_path / "w8a8", "8.6bits", recipe="int8")
    with pytest.raises(InputError, match="inputs are rounded"):
        exported(out, tmp_path / "plain", "bf16")


def test_the_command(mixed: Path, tmp_path: Path) -> None:
    runner, out = CliRunner(), tmp_path / "plain"
    found = runner.invoke(cli, ["export", str(mixed), "--format", "bf16", "-o", str(out), "--json", "-q"])
    assert found.exit_code == 0, found.output
    document = json.loads(found.stdout)
    assert document["format"] == "bf16"
    assert document["weights"] == json.loads((out / "export.json").read_text())["weights"]
    card = (out / "README.md").read_text()
    assert "Read back" in card
    assert f"| bits per weight, whole checkpoint | {document['file_bits_per_weight']:.4f} |" in card
    assert document["bits_per_weight"] == 16
    assert document["weight_bytes"] == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert runner.invoke(cli, ["verify", str(out)]).exit_code == 0
    again = runner.invoke(
        cli, ["export", str(mixed), "--format", "gptq", "-o", str(tmp_path / "x"), "--dtype", "float16"]
    )
    assert isinstance(again.exception, InputError)
    assert "--dtype" in again.exception.what
