"""Scales of keys, values and attention weights, from calibration text, and their place in the output."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.compress.grid import stored_scale
from llmcompress.compress.observe import Enough
from llmcompress.compress.ranges import SAMPLE, calibrated
from llmcompress.errors import InputError
from llmcompress.kernels.inputs import InputQuantizer
from llmcompress.kernels.softmax import choose_scale
from llmcompress.kernels.stored import Layout
from llmcompress.model.shares import Share
from llmcompress.model.skeleton import Skeleton
from llmcompress.runtime.attention import (
    WATCH,
    AttentionRounding,
    attention_modules,
    forget,
    parts_of,
    set_rounding,
)
from llmcompress.types import BlockTrace, InputSpec, ModelTrace, QuantizerOptions


class _Seen:
    """Samples of what one attention module computes; their extremes are among them."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.weights: list[Tensor] = []

    def add(self, keys: Tensor, values: Tensor, weights: Tensor) -> None:
        """One batch; what comes after is not run."""
        for parts, tensor in ((self.keys, keys), (self.values, values), (self.weights, weights)):
            parts.append(_thin(tensor))
        raise Enough


def _thin(tensor: Tensor) -> Tensor:
    flat = tensor.detach().float().flatten()
    return torch.cat([flat[:: max(len(flat) // SAMPLE, 1)], flat.min()[None], flat.max()[None]])


def round_attention(
    block: nn.Module,
    runs: Iterable[Callable[[], Any]],
    *,
    options: QuantizerOptions,
    dtype: torch.dtype,
    share: Share | None = None,
) -> dict[str, AttentionRounding]:
    """Let the attention of a block round what `options` say, under scales from `runs`, forwards of it.

    `dtype` is that of stored scales; with a `share`, `runs` are of this process's batches alone. Returns what was
    found by the attention module's name inside the block.
    """
    found: dict[str, AttentionRounding] = {}
    todo = list(runs)
    for name, module in attention_modules(block).items():
        seen = _Seen()
        vars(module)[WATCH] = seen.add
        for run in todo:
            with suppress(Enough), torch.no_grad():
                run()
        forget([module])
        if share is not None:
            seen.keys, seen.values, seen.weights = map(share.all, (seen.keys, seen.values, seen.weights))
        if not seen.keys:
            raise InputError(f"{name}: no calibration text reached this attention", "leave quantize.kv_cache at none")
        found[name] = _rounding(seen, options, dtype, name)
        set_rounding(module, found[name])
    return found


def _rounding(seen: _Seen, options: QuantizerOptions, dtype: torch.dtype, where: str) -> AttentionRounding:
    def cache(spec: InputSpec, parts: list[Tensor]) -> InputQuantizer:
        settled = calibrated(spec, iter(parts), clip=options.input_clip == "grid", where=where)
        return InputQuantizer(spec, stored_scale(settled.scale.reshape(1), dtype))

    spec = options.cache_spec
    keys, values = (None, None) if spec is None else (cache(spec, seen.keys), cache(spec, seen.values))
    if options.softmax == "none":
        return AttentionRounding(keys, values)
    scale = choose_scale(torch.cat(seen.weights), options.softmax_bits)
    return AttentionRounding(keys, values, options.softmax_bits, float(torch.tensor(scale).to(dtype)))


def attention_stems(block: nn.Module, info: BlockTrace) -> dict[str, str]:
    """What the names of an attention's tensors begin with in a file, by its name inside the block."""
    found = {}
    for name in attention_modules(block):
        inside = f"{info.name}.{name}." if name else f"{info.name}."
        linear = next((x for x in info.linears if x.name.startswith(inside)), None)
        if linear is not None:
            found[name] = linear.stem.removesuffix("." + linear.name.removeprefix(inside))
    if not found:
        raise InputError(f"{info.name}: no attention to round", "leave quantize.softmax and quantize.kv_cache at none")
    return found


def attention_layout(skeleton: Skeleton, trace: ModelTrace, options: QuantizerOptions, dtype: str) -> dict[int, Layout]:
    """The tensors that roundings inside attention add to each shard, by the number of the shard."""
    parts = parts_of(options.kv_cache != "none", options.softmax != "none")
    return {
        info.index + 1: {
            stem + part: (dtype, (1,))
            for stem in attention_stems(skeleton.blocks[info.index], info).values()
            for part in parts
        }
        for info in trace.blocks
        if parts
    }
