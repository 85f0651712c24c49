"""Streaming a block at a time equals the whole model bit for bit, in every family; tracing finds its structure."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import llama_config, save_model

from llmcompress.errors import InputError
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import BlockStream
from llmcompress.model.trace import trace

BASE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
}
GROUPED = BASE | {"num_key_value_heads": 2}
QKV, GATE = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")
GATED = [QKV, ("self_attn.o_proj",), GATE, ("mlp.down_proj",)]
FAMILIES: dict[str, tuple[str, dict[str, Any], list[tuple[str, ...]]]] = {
    "llama": ("LlamaConfig", GROUPED | {"tie_word_embeddings": True}, GATED),
    "mistral": ("MistralConfig", GROUPED | {"sliding_window": 8}, GATED),
    "qwen2": ("Qwen2Config", GROUPED, GATED),
    "qwen3": ("Qwen3Config", GROUPED | {"head_dim": 16}, GATED),
    "gemma2": ("Gemma2Config", GROUPED | {"head_dim": 16, "sliding_window": 8}, GATED),
    "gemma3": ("Gemma3TextConfig", GROUPED | {"head_dim": 16, "sliding_window": 8, "num_hidden_layers": 7}, GATED),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": 96, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64},
        [("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)],
    ),
    "opt": (
        "OPTConfig",
        {k: v for k, v in BASE.items() if k != "intermediate_size"} | {"ffn_dim": 128, "word_embed_proj_dim": 64},
        [QKV, ("self_attn.out_proj",), ("fc1",), ("fc2",)],
    ),
    "gpt_neox": (
        "GPTNeoXConfig",
        BASE,
        [("attention.query_key_value",), ("attention.dense",), ("mlp.dense_h_to_4h",), ("mlp.dense_4h_to_h",)],
    ),
    "phi3": (
        "Phi3Config",
        GROUPED | {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 1},
        [("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)],
    ),
    "falcon": (
        "FalconConfig",
        {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4},
        [
            ("self_attention.query_key_value",),
            ("self_attention.dense",),
            ("mlp.dense_h_to_4h",),
            ("mlp.dense_4h_to_h",),
        ],
    ),
    "bloom": (
        "BloomConfig",
        {"vocab_size": 96, "hidden_size": 64, "n_layer": 3, "n_head": 4},
        [
            ("self_attention.query_key_value",),
            ("self_attention.dense",),
            ("mlp.dense_h_to_4h",),
            ("mlp.dense_4h_to_h",),
        ],
    ),
}


def family(name: str, folder: Path) -> Path:
    kind, sizes, _ = FAMILIES[name]
    return save_model(folder / name, getattr(transformers, kind)(**sizes))


def whole_model_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(input_ids=tokens, use_cache=False).logits
    return logits


@pytest.mark.parametrize("name", FAMILIES)
def test_streamed_equals_whole(name: str, tmp_path: Path) -> None:
    folder = family(name, tmp_path)
    batches = [torch.randint(96, (2, 24)), torch.randint(96, (1, 24)), torch.randint(96, (1, 11))]
    found = list(BlockStream(Skeleton.open(folder)).logits(batches))
    for tokens, logits in zip(batches, found, strict=True):
        assert torch.equal(logits, whole_model_logits(folder, tokens))


@pytest.mark.parametrize("name", FAMILIES)
def test_trace_finds_linears_units_and_norms(name: str, tmp_path: Path) -> None:
    folder = family(name, tmp_path)
    skeleton = Skeleton.open(folder)
    found = trace(skeleton)
    assert found.parameters == transformers.AutoModelForCausalLM.from_pretrained(folder).num_parameters()
    block = found.blocks[1]
    units: dict[str, list[str]] = {}
    for linear in block.linears:
        units.setdefault(linear.unit, []).append(linear.name.removeprefix(block.name + "."))
    assert sorted(tuple(sorted(u)) for u in units.values()) == sorted(tuple(sorted(u)) for u in FAMILIES[name][2])
    assert found.untraced_share == 0
    assert {norm.shared_input for norm in block.norms} >= {0}
    sizes = dict(skeleton.model.named_parameters())
    for linear in found.linears:
        rows, columns = sizes[linear.name + ".weight"].shape
        assert (linear.rows, linear.columns) == ((columns, rows) if linear.transposed else (rows, columns))
        assert linear.transposed == (name == "gpt2")
    everything = sum(entry.stop - entry.start for entry in skeleton.files.tensors.values())
    assert found.other_bytes == everything - 4 * sum(x.weights for x in found.linears)


def test_memory_is_given_back_after_each_block(llama: Path) -> None:
    skeleton = Skeleton.open(llama)
    seen = []
    original = skeleton.load_block

    def watching(index: int) -> Any:
        block = original(index)
        seen.append([i for i, b in enumerate(skeleton.blocks) if not any(p.is_meta for p in b.parameters())])
        return block

    skeleton.load_block = watching  # type: ignore[method-assign]
    list(BlockStream(skeleton).logits([torch.randint(96, (1, 8))]))
    assert [loaded for loaded in seen if len(loaded) > 1] == []
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


def test_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_model(tmp_path / "model", llama_config(), shard_size="100MB")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"layers\.1\.mlp\.up_proj"):
        Skeleton.open(folder)


def test_an_extra_or_misshapen_tensor_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = save_model(tmp_path / "model", llama_config(), shard_size="100MB")
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.surprise": torch.zeros(3)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="surprise"):
        Skeleton.open(folder)
    wrong = tensors | {"model.layers.0.mlp.up_proj.weight": torch.zeros(5, 5)}
    save_file(wrong, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="up_proj"):
        Skeleton.open(folder).load_block(0)


def test_unknown_model_type_gets_the_nearest_name(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", llama_config())
    text = (folder / "config.json").read_text().replace('"model_type": "llama"', '"model_type": "lama"')
    (folder / "config.json").write_text(text)
    with pytest.raises(InputError) as caught:
        Skeleton.open(folder)
    assert "llama" in caught.value.hint
