"""Attention with quantized softmax, registered with transformers, for any model that lets its attention be replaced."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from llmcompress.compress.rewriting.softmax import choose_scale, log_codes, log_values
from llmcompress.compress.rewriting.work import Call
from llmcompress.errors import InputError

SCALE = "softmax_scale"  # attribute of an attention module: the scale of its codes


def _repeated(states: Tensor, heads: int) -> Tensor:
    """Keys or values `(batch, heads, tokens, channels)` with each head repeated for its group of queries."""
    return states.repeat_interleave(heads // states.shape[1], dim=1)


def log_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    bits: int,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Attention whose weights are `bits`-bit codes of half octaves under the module's own scale (1 if it has none).

    query           (batch, heads, queries, channels)
    key, value      (batch, key heads, keys, channels)
    attention_mask  added to the scores, or None
    returns         (batch, queries, heads, channels) and the weights (batch, heads, queries, keys)

    Raises InputError for attention sinks, which it does not have.
    """
    if options.get("s_aux") is not None:
        raise InputError("attention with sinks cannot be quantized on a logarithmic grid", "leave the softmax alone")
    key, value = _repeated(key, query.shape[1]), _repeated(value, query.shape[1])
    scaling = options.get("scaling")
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if (cap := options.get("softcap")) is not None:
        scores = torch.tanh(scores / cap) * cap
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    scale = float(getattr(module, SCALE, 1.0))
    rounded = log_values(log_codes(weights, scale, bits), scale, bits).to(value.dtype)
    return (rounded @ value).transpose(1, 2).contiguous(), rounded


def register(bits: int) -> str:
    """Make the attention known to transformers and return its name.

    The mask has to be registered under the same name: transformers otherwise gives it none, and padding and causality
    would be ignored without a word.
    """
    name = f"log_sqrt2_{bits}bits"
    AttentionInterface.register(name, partial(log_attention, bits=bits))
    AttentionMaskInterface.register(name, eager_mask)
    return name


@contextmanager
def quantized_softmax(model: Any, calls: Sequence[Call], bits: int) -> Iterator[tuple[float, ...]]:
    """Run a model with quantized attention weights while this is open; yields the scale of each block's attention.

    Scales are chosen on what the model's own attention does in `calls`. Raises InputError for a model whose attention
    cannot be replaced.
    """
    if not getattr(model, "_supports_attention_backend", False):
        raise InputError(f"{type(model).__name__} does not let its attention be replaced", "leave the softmax alone")
    before = model.config._attn_implementation
    scales = _scales(model, calls, bits)
    modules = [module for module in model.modules() if isinstance(getattr(module, "layer_idx", None), int)]
    try:
        for module in modules:
            setattr(module, SCALE, scales[module.layer_idx])
        model.set_attn_implementation(register(bits))
        yield scales
    finally:
        model.set_attn_implementation(before)
        for module in modules:
            delattr(module, SCALE)


@torch.no_grad()
def _scales(model: Any, calls: Sequence[Call], bits: int) -> tuple[float, ...]:
    """The scale of each block, from the attention weights of the plain implementation."""
    before = model.config._attn_implementation
    seen: list[list[Tensor]] = []
    try:
        model.set_attn_implementation("eager")
        for call in calls:
            found = model(*call.args, **{**call.kwargs, "output_attentions": True}).attentions
            seen = seen or [[] for _ in found]
            for place, weights in enumerate(found):
                seen[place].append(weights.flatten())
    finally:
        model.set_attn_implementation(before)
    return tuple(choose_scale(torch.cat(parts), bits) for parts in seen)
