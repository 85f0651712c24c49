"""Attention that rounds: keys and values as a cache would hold them, and attention weights to half octaves.

One function, registered with transformers, takes the place of a model's own attention. It asks each attention module
what it is to round; one that has been told nothing computes plain attention.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from llmcompress.errors import InputError
from llmcompress.kernels.inputs import InputQuantizer
from llmcompress.kernels.softmax import log_codes, log_values
from llmcompress.spec import InputSpec

NAME = "llmcompress"  # among the implementations of attention that transformers knows
ROUNDING, WATCH = "attention_rounding", "attention_watch"  # attributes of an attention module
KEYS, VALUES, SOFTMAX = ".k_scale", ".v_scale", ".softmax_scale"  # tensors of an attention module in a file
PARTS = (KEYS, VALUES, SOFTMAX)

Watch = Callable[[Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class AttentionRounding:
    """What an attention module rounds.

    keys, values  (batch, key heads, keys, channels) as they enter and leave a cache
    bits          of the codes of attention weights, None where they stay as they are; `scale` is that of the codes
    """

    keys: InputQuantizer | None = None
    values: InputQuantizer | None = None
    bits: int | None = None
    scale: float = 1.0


def rounding_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Attention with the roundings of its module.

    query           (batch, heads, queries, channels)
    key, value      (batch, key heads, keys, channels)
    attention_mask  added to the scores, or None
    returns         (batch, queries, heads, channels) and the weights (batch, heads, queries, keys)

    Raises InputError for attention sinks, which it does not have.
    """
    if options.get("s_aux") is not None:
        raise InputError(
            "attention with sinks cannot be rounded", "leave quantize.softmax and quantize.kv_cache at none"
        )
    rounding = vars(module).get(ROUNDING, AttentionRounding())
    plain = key, value
    key = key if rounding.keys is None else rounding.keys(key)
    value = value if rounding.values is None else rounding.values(value)
    key, value = (states.repeat_interleave(query.shape[1] // states.shape[1], dim=1) for states in (key, value))
    scaling = options.get("scaling")
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if (cap := options.get("softcap")) is not None:
        scores = torch.tanh(scores / cap) * cap
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = torch.softmax(scores, dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32))
    if WATCH in vars(module):
        vars(module)[WATCH](*plain, weights)
    if rounding.bits is not None:
        codes = log_codes(weights.detach(), rounding.scale, rounding.bits)
        rounded = log_values(codes, rounding.scale, rounding.bits).to(weights.dtype)
        weights = weights + (rounded - weights).detach() if weights.requires_grad else rounded  # gradients pass
    weights = weights.to(value.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def install(model: Any) -> str:
    """Let a model compute its attention here; returns the name of what it used. Raises InputError where it cannot.

    The mask has to be registered under the same name: transformers otherwise gives it none, and padding and causality
    would be ignored without a word.
    """
    if not getattr(model, "_supports_attention_backend", False):
        raise InputError(
            f"{type(model).__name__} does not let its attention be replaced",
            "leave quantize.softmax and quantize.kv_cache at none",
        )
    AttentionInterface.register(NAME, rounding_attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    before = str(model.config._attn_implementation)
    model.set_attn_implementation(NAME)
    return before


def parts_of(cache: bool, softmax: bool) -> tuple[str, ...]:
    """What the names of the tensors end with that say how attention rounds."""
    return (*((KEYS, VALUES) if cache else ()), *((SOFTMAX,) if softmax else ()))


def tensors_of(stem: str, rounding: AttentionRounding, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one attention module, `(1,)` each in `dtype`."""
    scales = {
        KEYS: None if rounding.keys is None else rounding.keys.scale,
        VALUES: None if rounding.values is None else rounding.values.scale,
        SOFTMAX: None if rounding.bits is None else torch.tensor([rounding.scale]),
    }
    return {stem + part: scale.to(dtype).cpu() for part, scale in scales.items() if scale is not None}


def rounding_of(
    stem: str, cache: InputSpec | None, bits: int | None, read: Callable[[str], Tensor]
) -> AttentionRounding:
    """What one attention module rounds, from its tensors. Raises InputError where one is no positive number."""
    scales = {}
    for part in parts_of(cache is not None, bits is not None):
        scales[part] = read(stem + part)
        if scales[part].numel() != 1 or not 0 < float(scales[part]) < float("inf"):
            raise InputError(f"{stem}{part}: not one positive number", "the file is damaged")
    keys, values = (None, None) if cache is None else (InputQuantizer(cache, scales[p]) for p in (KEYS, VALUES))
    return AttentionRounding(keys, values, bits, 1.0 if bits is None else float(scales[SOFTMAX]))


def attention_modules(root: nn.Module) -> dict[str, nn.Module]:
    """The attention modules inside a module, by name: those that know the place of their block."""
    return {
        name: module for name, module in root.named_modules() if isinstance(getattr(module, "layer_idx", None), int)
    }


def set_rounding(module: nn.Module, rounding: AttentionRounding) -> None:
    """Tell an attention module what to round."""
    vars(module)[ROUNDING] = rounding


def forget(modules: Iterable[nn.Module]) -> None:
    """Let attention modules round nothing any more."""
    for module in modules:
        vars(module).pop(ROUNDING, None)
        vars(module).pop(WATCH, None)
