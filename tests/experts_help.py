"""Tiny mixtures of experts, the last two of whose first block no token ever reaches."""

from pathlib import Path
from typing import Any

import torch
import transformers
from conftest import save_model
from safetensors.torch import load_file, save_file

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "num_experts_per_tok": 2,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {"intermediate_size": 64, "num_local_experts": 6}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"intermediate_size": 128, "moe_intermediate_size": 32, "num_experts": 6, "head_dim": 16},
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {
            "intermediate_size": 128,
            "moe_intermediate_size": 32,
            "num_experts": 6,
            "shared_expert_intermediate_size": 64,
        },
    ),
    "olmoe": ("OlmoeConfig", {"intermediate_size": 32, "num_experts": 6}),
}
EXPERTS, UNREACHED = 6, ("4", "5")


def family(name: str, folder: Path) -> Path:
    """A random model of a family.

    The rows of the first router are one vector times 1, -1, 0.9, -0.9, 0.1 and -0.1: two of the first four always win.
    """
    kind, more = FAMILIES[name]
    save_model(folder, getattr(transformers, kind)(**SIZES, **more))
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for key in tensors:
            if key.endswith(".gate.weight") and ".layers.0." in key:
                row = tensors[key][0].clone()
                tensors[key] = torch.stack([row * scale for scale in (1, -1, 0.9, -0.9, 0.1, -0.1)])
                save_file(tensors, path, metadata={"format": "pt"})
    return folder


def plain_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """What plain transformers computes, in float32; every tensor has to come from the file.

    It keeps packed experts in the dtype of their scales, whatever it is asked for.
    """
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    with torch.no_grad():
        logits: torch.Tensor = torch.nn.Module.float(model).eval()(input_ids=tokens, use_cache=False).logits
    return logits
