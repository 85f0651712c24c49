"""Quantized softmax while a model is measured; what it computes is in `runtime/attention.py`."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.compress.rewriting.work import Call
from llmcompress.kernels.softmax import choose_scale
from llmcompress.runtime.attention import WATCH, AttentionRounding, attention_modules, forget, install, set_rounding


@contextmanager
def quantized_softmax(model: Any, calls: Sequence[Call], bits: int) -> Iterator[tuple[float, ...]]:
    """Run a model with quantized attention weights while this is open; yields the scale of each block's attention.

    Scales are chosen on what the model's own attention does in `calls`. Raises InputError for a model whose attention
    cannot be replaced.
    """
    before = install(model)
    modules = list(attention_modules(model).values())
    try:
        found = [(module, choose_scale(torch.cat(parts), bits)) for module, parts in _weights(model, modules, calls)]
        for module, scale in found:
            set_rounding(module, AttentionRounding(bits=bits, scale=scale))
        yield tuple(scale for _, scale in found)
    finally:
        forget(modules)
        model.set_attn_implementation(before)


@torch.no_grad()
def _weights(model: Any, modules: Sequence[nn.Module], calls: Sequence[Call]) -> list[tuple[nn.Module, list[Tensor]]]:
    """The attention weights of each module that has any."""
    seen: list[list[Tensor]] = [[] for _ in modules]
    for module, parts in zip(modules, seen, strict=True):
        vars(module)[WATCH] = lambda _, __, weights, parts=parts: parts.append(weights.flatten())
    for call in calls:
        model(*call.args, **call.kwargs)
    forget(modules)
    return [(module, parts) for module, parts in zip(modules, seen, strict=True) if parts]
