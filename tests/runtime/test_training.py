"""What people do with an opened checkpoint: adapters on top of packed weights, pipelines, chat."""

import json
import sys
from pathlib import Path

import pytest
import torch

import llmcompress
from llmcompress.compress.allocate.budget import parse_budget
from llmcompress.compress.run import QuantizeRequest, quantize
from llmcompress.errors import InputError
from llmcompress.hub.source import Source
from llmcompress.recipes import load_recipe
from llmcompress.runtime.modules import PackedLinear

TOKENS = torch.arange(3, 35)[None]
DEMO = Path(llmcompress.__file__).parent / "demo"


def quantized(source: Path, output: Path, *changes: str) -> Path:
    request = QuantizeRequest(
        Source(source, source.name), output, load_recipe("fast", changes), parse_budget("4.3bits"), "cpu", ""
    )
    list(quantize(request))
    return output


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_a_step_of_an_adapter_lowers_the_loss_and_leaves_the_codes(llama: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="the package peft is not installed")
    out = quantized(llama, tmp_path / "out", "plan.group_size=64", "plan.bits=[3,4,5]")
    model = llmcompress.load(out, dtype=torch.float32)
    before = {n: b.clone() for n, b in model.named_buffers() if b.dtype in (torch.int32, torch.uint8)}
    names = [name for name, module in model.named_modules() if isinstance(module, PackedLinear)]
    config = llmcompress.lora(peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"]))
    adapted = peft.get_peft_model(model, config)
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert {n for n, p in adapted.named_parameters() if p.requires_grad and "lora" not in n} == set()
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    losses = []
    for _ in range(3):
        loss = adapted(input_ids=TOKENS, labels=TOKENS).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    losses.append(float(adapted(input_ids=TOKENS, labels=TOKENS).loss.detach()))
    assert losses[3] < losses[2] < losses[1] < losses[0]
    after = {n.replace(".base_layer", ""): b for n, b in adapted.get_base_model().named_buffers()}
    assert before
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(names) == 3 * 7
    with pytest.raises(InputError, match="merged"):
        adapted.merge_adapter()
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(llmcompress.load(out, dtype=torch.float32, dense=True), tmp_path / "adapter")
    trained_logits = adapted.eval()(input_ids=TOKENS).logits
    assert torch.allclose(again.eval()(input_ids=TOKENS).logits, trained_logits, atol=1e-3)


def test_without_peft_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft.tuners.lora", None)
    with pytest.raises(InputError, match="peft") as caught:
        llmcompress.lora(object())
    assert "llmcompress[heal]" in caught.value.hint


def test_pipelines_keep_generation_settings_and_the_chat_template(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, pipeline

    out = quantized(DEMO, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(out)
    for name in ("chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (DEMO / name).read_bytes()
    settings = json.loads((DEMO / "generation_config.json").read_text())
    model = llmcompress.load(out, dtype=torch.float32)
    assert model.generation_config.eos_token_id == settings["eos_token_id"]  # type: ignore[union-attr]
    chat = [{"role": "user", "content": "Hello"}]
    packed, plain = (
        pipeline("text-generation", model=which, tokenizer=tokenizer)(chat, max_new_tokens=6, do_sample=False)
        for which in (model, llmcompress.load(out, dtype=torch.float32, dense=True))
    )
    assert packed[0]["generated_text"][-1]["role"] == "assistant"
    assert packed == plain
