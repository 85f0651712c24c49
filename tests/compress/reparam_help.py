"""Tiny random models of six families in float64, and one block of a model as a subject."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    Qwen3Config,
)

from llmcompress.compress.rewriting.exact import exact
from llmcompress.compress.rewriting.work import Call, Subject
from llmcompress.model.skeleton import find_blocks

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
GROUPED: dict[str, Any] = SIZES | {"num_key_value_heads": 2}


def configs() -> dict[str, Any]:
    """A configuration of each family."""
    return {
        "llama": LlamaConfig(**GROUPED),
        "llama_tied": LlamaConfig(**GROUPED, tie_word_embeddings=True, attention_bias=True),
        "qwen3": Qwen3Config(**GROUPED, head_dim=6),
        "gemma": GemmaConfig(**GROUPED, head_dim=6),
        "gemma2": Gemma2Config(**GROUPED, head_dim=6),
        "phi3": Phi3Config(**GROUPED),
        "gpt2": GPT2Config(
            vocab_size=61, n_embd=24, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=1
        ),
        "opt": OPTConfig(**SIZES, ffn_dim=40, word_embed_proj_dim=24),
        "neox": GPTNeoXConfig(**SIZES, rotary_pct=0.5),
    }


FAMILIES = tuple(configs())


def tiny(family: str, seed: int = 0) -> Any:
    """A random model of a family in float64, norms and biases random too."""
    return randomized(configs()[family], seed)


def randomized(config: Any, seed: int = 0) -> Any:
    """A random model of a config in float64, norms and biases random too."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    model.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.3)
        elif "embed" not in name and "wte" not in name and "wpe" not in name:
            parameter.mul_(4.0)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def tokens(seed: int = 1, batch: int = 3, length: int = 12) -> Tensor:
    """Random tokens."""
    return torch.randint(3, 61, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits_of(model: Any, ids: Tensor | None = None) -> Tensor:
    """Logits in float64 throughout."""
    with exact():
        found: Tensor = model(input_ids=tokens(9) if ids is None else ids, use_cache=False).logits
    return found


def blocks_of(model: Any) -> nn.ModuleList:
    """The decoder blocks."""
    return find_blocks(model, model.config.num_hidden_layers)[1]


def model_subject(model: Any, seed: int = 1) -> Subject:
    """A whole model with one call on random tokens."""
    return Subject(model, (Call((), {"input_ids": tokens(seed), "use_cache": False}),))


def distance(found: Tensor, reference: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((found - reference).abs().max() / reference.abs().max())


def block_subject(model: Any, index: int = 0, **more: Any) -> Subject:
    """One block of a model with the call that the model makes to it."""
    calls: list[Call] = []
    block = blocks_of(model)[index]

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(Call(args, kwargs))

    handle = block.register_forward_pre_hook(before, with_kwargs=True)
    with torch.no_grad():
        for seed in (1, 2):
            model(input_ids=tokens(seed).clamp_max(model.config.vocab_size - 1), use_cache=False)
    handle.remove()
    return Subject(block, tuple(calls), **more)
