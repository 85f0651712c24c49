"""Keys, values and attention weights that are rounded, end to end."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SMALL, save_model
from safetensors.torch import load_file, save_file
from test_layouts import TOKENS, logits_of, quantized, section_of, strangers_stop
from torch import Tensor

import llmcompress
from llmcompress.compress.pipeline import calibration, open_model
from llmcompress.compress.verify import probe_logits
from llmcompress.errors import InputError
from llmcompress.eval.run import EvalRequest, run_eval
from llmcompress.hub.source import Source
from llmcompress.model.text import TextRequest
from llmcompress.recipes import load_recipe
from llmcompress.runtime.attention import ROUNDING, WATCH, AttentionRounding, attention_modules, forget

USUAL = (*SMALL[1::2], "plan.group_size=64", "plan.trials=false", "scorer=zd", "plan.bits=[8]")


def made(source: Path, out: Path, text: Path, *changes: str) -> Path:
    quantized(source, out, "10bits", f"calibration.source={text}", *USUAL, *changes, recipe="balanced")
    return out


def tensors_of(out: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for shard in out.glob("*.safetensors"):
        found |= load_file(shard)
    return found


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_strangers_round_keys_and_values_as_we_do(kind: str, llama: Path, text_file: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    out = made(llama, tmp_path / "out", text_file, f"quantize.kv_cache={kind}", "quantize.input_clip=none")
    assert section_of(out)["kv_cache_scheme"]["type"] == ("float" if kind == "fp8" else "int")
    theirs, info = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = llmcompress.load(out, dtype=torch.float32)
    rounded = logits_of(ours)
    assert float((rounded - logits_of(theirs)).abs().amax(-1).median()) < 1e-4
    assert float((rounded - probe_logits(out, TOKENS, "cpu")).abs().max()) < 1e-5
    tokens = torch.tensor([TOKENS[:12]])
    with torch.no_grad():  # a cache holds what is rounded again when it is read: to the same
        whole = ours.generate(tokens, max_new_tokens=6, do_sample=False, use_cache=True, eos_token_id=None)
        again = ours.generate(tokens, max_new_tokens=6, do_sample=False, use_cache=False, eos_token_id=None)
    assert torch.equal(whole, again)
    forget(attention_modules(ours).values())
    assert float((logits_of(ours) - rounded).abs().max()) > 1e-3


def test_ranges_are_those_of_keys_after_their_rotation(llama: Path, text_file: Path, tmp_path: Path) -> None:
    changes = ("quantize.kv_cache=int8", "quantize.input_clip=none", "quantizer=rtn")
    out = made(llama, tmp_path / "out", text_file, *changes)
    model = llmcompress.load(out, dtype=torch.float32)
    recipe = load_recipe("balanced", (f"calibration.source={text_file}", *USUAL, *changes))

    tokens = calibration(open_model(Source(llama, "llama"), recipe, "cpu"), recipe).tokens
    most: dict[str, tuple[float, float]] = {}
    for name, module in attention_modules(model).items():
        vars(module)[WATCH] = lambda keys, values, _, name=name: most.update(
            {name: (float(keys.abs().max()), float(values.abs().max()))}
        )
    with torch.no_grad():
        model(tokens)
    stored = tensors_of(out)
    assert len(most) == 3
    for name, (keys, values) in most.items():
        for part, peak in ((".k_scale", keys), (".v_scale", values)):
            assert stored[name + part].shape == (1,)
            step = float(stored[name + part])
            assert peak / 128 * 0.99 <= step <= peak / 127 * 1.01, name


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rounded_attention_weights_are_ours_alone(family: str, llama: Path, text_file: Path, tmp_path: Path) -> None:
    import transformers

    source = llama
    if family == "gpt2":
        config = transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64)
        source = save_model(tmp_path / "gpt2", config)
    changes = ("plan.bits=[4, 8]", "quantize.inputs=int4-token", "quantize.softmax=log2", "quantize.kv_cache=int8")
    out = made(source, tmp_path / "out", text_file, *changes)
    section = section_of(out)
    assert section["quant_method"] == "llmcompress"
    assert section["attention"]["softmax_bits"] == 4
    strangers_stop(out)
    model = llmcompress.load(out, dtype=torch.float32)
    rounded = logits_of(model)
    assert float((rounded - probe_logits(out, TOKENS, "cpu")).abs().amax(-1).median()) < 1e-4
    stored = tensors_of(out)
    modules = attention_modules(model)
    assert modules
    for name, module in modules.items():
        rounding: AttentionRounding = vars(module)[ROUNDING]
        scale = next(float(t) for n, t in stored.items() if f"{name}.softmax_scale".endswith(n))
        assert (rounding.bits, rounding.scale) == (4, scale)
        assert 0 < scale <= 1
    forget(modules.values())
    assert float((logits_of(model) - rounded).abs().max()) > 1e-3
    (tmp_path / "other.txt").write_text("Four score and seven years ago, and no one reads it backwards.\n" * 20)
    text = TextRequest(str(tmp_path / "other.txt"), 4, 32, 0, "evaluation")
    report = run_eval(EvalRequest(Source(out, "out"), Source(source, "source"), text, 4, "cpu", ""))
    assert report.summary.kld.mean is not None
    assert report.summary.kld.mean > 1e-3


def test_damaged_scales_are_refused(llama: Path, text_file: Path, tmp_path: Path) -> None:

    out = made(llama, tmp_path / "out", text_file, "quantize.kv_cache=fp8", "quantizer=rtn")
    config = json.loads((out / "config.json").read_text())
    broken = shutil.copytree(out, tmp_path / "broken")
    config["quantization_config"]["kv_cache_scheme"]["dynamic"] = True
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"config\.json"):
        llmcompress.load(broken)
    broken = shutil.copytree(out, tmp_path / "zero")
    shard = next(path for path in broken.glob("*.safetensors") if any("k_scale" in n for n in load_file(path)))
    tensors = load_file(shard)
    save_file({n: t * 0 if n.endswith("k_scale") else t for n, t in tensors.items()}, shard, {"format": "pt"})
    with pytest.raises(InputError, match="not one positive number"):
        llmcompress.load(broken)


def test_models_whose_attention_cannot_be_replaced_are_refused(tmp_path: Path) -> None:
    import transformers

    config = transformers.BloomConfig(vocab_size=96, hidden_size=64, n_layer=2, n_head=4)
    source = save_model(tmp_path / "bloom", config)
    with pytest.raises(InputError, match="does not let its attention be replaced"):
        open_model(Source(source, "bloom"), load_recipe("balanced", ("quantize.kv_cache=int8",)), "cpu")
