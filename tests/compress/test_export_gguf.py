"""GGUF exports: blocks against a decoder as slow as it is obvious, vocabularies, and whole files by strangers."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import llama_config, save_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_export import exported, quantized
from torch import Tensor

import llmcompress
from llmcompress.cli import cli
from llmcompress.compress.export import ggml
from llmcompress.compress.export.checkpoint import Checkpoint
from llmcompress.compress.export.families import FAMILIES, apart, family_of, interleaved
from llmcompress.compress.export.formats import gguf as format_
from llmcompress.compress.export.requantize import input_energies, rounded
from llmcompress.compress.export.vocabulary import LLAMA3, QWEN2, read_vocabulary
from llmcompress.errors import InputError
from llmcompress.hub.source import Source
from llmcompress.kernels.codes import Codes
from llmcompress.spec import LinearSpec

DEMO = Path(llmcompress.__file__).parent / "demo"
TEXT = "Once upon a time, there was a little cat's 123 toys.\n  def f(x): return 1"


def slow_block(data: bytes, kind: str) -> list[float]:
    """The 32 weights of one block, from the description of its type."""
    scale = float(torch.frombuffer(bytearray(data[:2]), dtype=torch.float16)[0])
    found = []
    for j in range(32):
        if kind == "Q8_0":
            value = data[2 + j] - 256 if data[2 + j] > 127 else data[2 + j]
        else:
            nibbles = data[-16:]
            value = nibbles[j % 16] >> 4 if j >= 16 else nibbles[j] & 15
            if kind == "Q5_0":
                value += (data[2 + j // 8] >> (j % 8) & 1) * 16
            value -= ggml.HALVES[kind]
        found.append(value * scale)
    return found


@given(
    bits=st.sampled_from([2, 3, 4, 5, 6, 8]),
    kind=st.sampled_from(["int", "asymmetric", "high"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_blocks_decode_to_the_weights(bits: int, kind: str, seed: int) -> None:
    if kind == "high" and bits > 6:
        kind = "int"
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (3, 128), generator=generator, dtype=torch.uint8)
    scale = torch.randn(3, 2, generator=generator).to(torch.bfloat16)
    found = Codes(codes, scale, LinearSpec(bits=bits, group_size=64))
    if kind == "high":
        high = torch.rand(128, generator=generator) < 0.25
        fine = torch.randint(0, 4 << bits, (3, 128), generator=generator, dtype=torch.uint8)
        found = replace(found, codes=torch.where(high, fine, codes), high=high)
    elif kind == "asymmetric":
        zero = torch.randint(1, 1 << (bits - 1), (3, 2), generator=generator) << (8 - bits)
        found = replace(found, spec=LinearSpec(bits=bits, group_size=64, kind="asymmetric"), zero=zero.to(torch.uint8))
    integers, real = ggml.integers_of(found) or (None, None)
    assert integers is not None
    assert real is not None
    word = ggml.type_for(integers, real)
    if word is None:
        assert (kind, bits) == ("asymmetric", 8)  # up to 254 codes above the zero-point
        return
    data = ggml.encode(integers, real.half(), word)
    size = data.shape[1] // 4
    slow = [[slow_block(bytes(row[i * size : (i + 1) * size].tolist()), word) for i in range(4)] for row in data]
    assert torch.equal(torch.tensor(slow).view(3, 128), found.dequantize())


def test_the_narrowest_type_is_taken() -> None:
    scale = torch.ones(1, 1)
    for low, high, word in ((-8, 7, "Q4_0"), (-9, 0, "Q5_0"), (0, 16, "Q8_0"), (0, 128, None)):
        integers = torch.zeros(1, 32, dtype=torch.int16)
        integers[0, 0], integers[0, 1] = low, high
        assert ggml.type_for(integers, scale) == word
    assert ggml.type_for(torch.zeros(1, 48, dtype=torch.int16), scale) is None
    assert ggml.type_for(torch.zeros(1, 64, dtype=torch.int16), torch.ones(1, 4)) is None
    between = Codes(
        torch.zeros(1, 32, dtype=torch.uint8), scale, LinearSpec(bits=4, group_size=32, kind="asymmetric"),
        zero=torch.full((1, 1), 17, dtype=torch.uint8),
    )  # fmt: skip
    assert ggml.integers_of(between) is None


def test_rows_are_interleaved_and_put_back() -> None:
    rows = torch.arange(16).view(16, 1)
    assert interleaved(rows, 2).flatten().tolist()[:8] == [0, 4, 1, 5, 2, 6, 3, 7]
    assert torch.equal(apart(interleaved(rows, 2), 2), rows)


def test_vocabularies_of_both_kinds(tmp_path: Path) -> None:
    demo = read_vocabulary(DEMO, 1540)
    assert (demo.model, demo.pre, demo.add_bos) == ("gpt2", "gpt-2", True)
    assert demo.types[:5] == (3, 3, 3, 3, 1)
    assert demo.types[-1] == 5
    document = json.loads((DEMO / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False}
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, document["pre_tokenizer"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    found = read_vocabulary(tmp_path, 1536)
    assert (found.pre, found.chat_template) == ("llama-bpe", "{{ messages }}")
    split["pattern"], document["normalizer"] = {"Regex": QWEN2}, {"type": "NFC"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    assert read_vocabulary(tmp_path, 1536).pre == "qwen2"
    split["pattern"], document["normalizer"] = {"Regex": "."}, None
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(InputError, match="split"):
        read_vocabulary(tmp_path, 1536)
    with pytest.raises(InputError, match="1536 tokens"):
        read_vocabulary(DEMO, 1000)


def test_scores_follow_the_merges(shared: Path) -> None:
    folder = shared / "models" / "stories260k"
    found = read_vocabulary(folder, 512)
    assert (found.model, found.add_bos, found.add_space) == ("llama", True, True)
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    scores = [found.scores[found.tokens.index("".join(pair))] for pair in merges]
    assert scores[0] == 0
    assert scores == sorted(scores, reverse=True)
    assert (found.types[0], found.types[1], found.types[3]) == (2, 3, 6)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "linear"), ({}, "WordLevel")],
)
def test_what_a_file_cannot_say_is_refused(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    source = save_model(tmp_path / "model", llama_config(num_hidden_layers=1, **changes))
    with pytest.raises(InputError, match=reason):
        exported(source, tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()


def test_without_the_package_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(InputError, match="gguf") as raised:
        format_.library()
    assert "llmcompress[gguf]" in raised.value.hint


@torch.no_grad()
def logits_of(model: Any) -> Tensor:
    found: Tensor = model(torch.tensor([list(range(40))])).logits.float()
    return found


SIZES = {
    "vocab_size": 1536, "num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
HEADS = {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1, "query_pre_attn_scalar": 256}
GEMMA = {**HEADS, "sliding_window": 16, "tie_word_embeddings": True, "num_hidden_layers": 6}
CONFIGS = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 128}),  # which transformers takes for granted
    "gemma2": ("Gemma2Config", {**GEMMA, "num_hidden_layers": 2}),
    "gemma3": ("Gemma3TextConfig", GEMMA),
}


def family_model(family: str, folder: Path) -> Path:
    """A random model of a family, with the tokenizer of the demo model."""
    import transformers

    name, changes = CONFIGS[family]
    source = save_model(folder, getattr(transformers, name)(**SIZES | changes))
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(DEMO / file, source / file)
    return source


@pytest.mark.parametrize("family", CONFIGS)
def test_strangers_open_the_file(family: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    import transformers

    source = family_model(family, tmp_path / "model")
    out = quantized(source, tmp_path / "out", "5bits", "plan.bits=[3,5,6]", "plan.group_size=32")
    done = exported(out, tmp_path / "gguf", "gguf", dtype="float32")
    quantized_errors = {weight.error for weight in done.record.weights if weight.type in ggml.HALVES}
    assert quantized_errors == {0.0}
    assert done.record.largest_error < 1e-6  # norms of Gemma keep 1 + weight in float32
    assert {"Q4_0", "Q5_0"} <= {weight.type for weight in done.record.weights}
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "gguf", gguf_file="model.gguf", output_loading_info=True, dtype=torch.float32
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = logits_of(llmcompress.load(out, dense=True))
    assert torch.allclose(logits_of(theirs), ours, atol=1e-5 * float(ours.abs().max()))
    if family in ("llama", "mistral"):  # of other families transformers puts together tokenizers of their own
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "gguf", gguf_file="model.gguf")
        assert tokenizer(TEXT).input_ids == transformers.AutoTokenizer.from_pretrained(out)(TEXT).input_ids
    checks = CliRunner().invoke(cli, ["verify", str(tmp_path / "gguf"), "--json"], catch_exceptions=False)
    assert [check["passed"] for check in json.loads(checks.stdout)] == [True, True]
    field = format_.library().GGUFReader(tmp_path / "gguf" / "model.gguf").fields["tokenizer.chat_template"]
    assert field.contents() == (DEMO / "chat_template.jinja").read_text()


@pytest.mark.parametrize(
    ("family", "changes", "reason"),
    [
        ("gemma2", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar"),
        ("gemma3", {"layer_types": ["full_attention"] * 6}, "layer_types"),
        ("qwen2", {"hidden_act": "gelu"}, "gelu"),
        ("mistral", {"sliding_window": 16}, "sliding"),
    ],
)
def test_families_are_as_llama_cpp_takes_them(family: str, changes: dict[str, Any], reason: str) -> None:
    import transformers

    name, usual = CONFIGS[family]
    config = getattr(transformers, name)
    assert family_of(config(**SIZES | usual)).architecture in ("llama", "qwen2", "gemma2", "gemma3")
    with pytest.raises(InputError, match=reason):
        family_of(config(**SIZES | usual | changes))


def test_names_without_a_place_are_refused() -> None:
    assert FAMILIES["qwen2"].name_of("model.layers.3.self_attn.q_proj.bias") == "blk.3.attn_q.bias"
    for family, name in (("llama", "model.layers.3.self_attn.q_proj.bias"), ("gemma2", "lm_head.weight")):
        with pytest.raises(InputError, match="no place"):
            FAMILIES[family].name_of(name)


def test_what_has_no_type_is_requantized_by_what_its_inputs_are(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    source = family_model("llama", tmp_path / "model")
    out = quantized(source, tmp_path / "out", "8bits", recipe="nf4")
    found = {}
    for name, options in (("alike", {}), ("weighed", {"calibration": "builtin"})):
        done = exported(out, tmp_path / name, "gguf", requantize="q4_0", **options)
        assert {weight.type for weight in done.record.weights} == {"Q4_0", "BF16", "F32"}
        assert "quantized once more" in " ".join(done.record.notes)
        found[name] = done.record
    assert found["weighed"].largest_error >= found["alike"].largest_error  # of weights, not of what comes of them
    with pytest.raises(InputError, match="--calibration"):
        exported(out, tmp_path / "none", "gguf", calibration="builtin")


def test_scales_are_those_that_lose_least_where_inputs_are_large() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, generator=generator)
    energy = torch.ones(64)
    energy[::4] = 100.0
    losses = []
    for weights in (None, energy):
        integers, scale = rounded(weight, weights, "Q4_0")
        assert -8 <= int(integers.min()) <= int(integers.max()) <= 7
        meant = integers.float() * scale.float().repeat_interleave(32, 1)
        losses.append(float(((weight - meant).square() * energy).sum()))
    assert losses[1] < losses[0]
    exact, scale = rounded(torch.arange(-8, 8).float().repeat(2, 2), None, "Q4_0")
    assert torch.equal(exact.float() * scale.float(), torch.arange(-8, 8).float().repeat(2, 2))


def test_energies_are_those_of_the_whole_model(tmp_path: Path) -> None:
    source = family_model("llama", tmp_path / "model")
    checkpoint = Checkpoint.open(Source(source, "model"))
    found = input_energies(checkpoint, "builtin")
    from transformers import AutoModelForCausalLM

    from llmcompress.model.text import TextRequest, token_batches

    tokens = token_batches(TextRequest("builtin", 32, 64, 0, "calibration"), source).tokens
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    seen: list[Tensor] = []
    linear = model.get_submodule("model.layers.1.mlp.down_proj")
    linear.register_forward_pre_hook(lambda _, given: seen.append(given[0].flatten(0, 1)))
    with torch.no_grad():
        model(tokens)
    expected = torch.cat(seen).square().mean(0)
    torch.testing.assert_close(found.of["model.layers.1.mlp.down_proj.weight"], expected, rtol=1e-4, atol=1e-8)
