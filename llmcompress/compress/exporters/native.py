"""Our own layout, for formats that no other holds, or that no other holds together; `llmcompress.load` opens it.

The tensors of each linear are those of its format (`kernels/stored.py`), and `config.json` says the format of every
one. Beside them lies an empty `weight`: plain transformers does not know the layout, and where it finds no weight it
takes random numbers; one of the wrong shape makes it stop with an error instead.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from llmcompress.compress.grid import Codes
from llmcompress.kernels import stored
from llmcompress.types import LinearInfo, LinearSpec, ModelTrace, Plan, QuantizerOptions

TITLE = "llmcompress native, version 1"
TAG = "llmcompress-native"
LIBRARY = "llmcompress"
VERSION = 1
HOW = "plain transformers cannot open this checkpoint: use llmcompress.load(path) of the Python package llmcompress"


def holds(specs: Collection[LinearSpec]) -> bool:
    """Every format, in any mixture."""
    return True


def packed_tensors(linear: LinearInfo, codes: Codes) -> dict[str, Tensor]:
    """The tensors that replace the weight of one linear."""
    return tensors_of(linear.tensor, codes)


def tensors_of(weight: str, codes: Codes) -> dict[str, Tensor]:
    """The tensors that replace a weight of that name."""
    made = stored.tensors_of(weight.removesuffix(".weight"), codes)
    return {weight: torch.empty(0, dtype=torch.float16)} | stored.misshapen(made)


def packed_layout(linear: LinearInfo, spec: LinearSpec, scale_dtype: str) -> stored.Layout:
    """Dtype and shape of those tensors, without making them."""
    size = (linear.rows, linear.columns)
    guard: stored.Layout = {linear.tensor: ("F16", (0,))}
    return guard | stored.misshapen_layout(stored.layout_of(linear.stem, spec, size, scale_dtype))


def config_document(
    source: Mapping[str, object], plan: Plan, trace: ModelTrace, heads: Iterable[str]
) -> dict[str, Any]:
    """The config.json of the output: the source's, with the quantization section added."""
    found = {
        x.name if x.expert is None else x.stem: spec for x in trace.every if (spec := plan.spec_of(x.name)) is not None
    }
    return {**source, "quantization_config": section(found, plan.options, plan.left_alone((*heads, *trace.routers)))}


def section(specs: Mapping[str, LinearSpec], options: QuantizerOptions, left_alone: list[str]) -> dict[str, Any]:
    """The `quantization_config`: `specs` by name of the module, of experts by stem, and linears not quantized."""
    targets: dict[LinearSpec, list[str]] = {}
    for name, spec in specs.items():
        targets.setdefault(spec, []).append(name)
    groups = {
        f"group_{place:02d}": {"targets": names, "spec": spec.model_dump(mode="json")}
        for place, (spec, names) in enumerate(targets.items())
    }
    return {
        "quant_method": "llmcompress",
        "version": VERSION,
        "how_to_open": HOW,
        "groups": groups,
        "attention": _attention(options),
        "ignore": left_alone,
    }


def _attention(options: QuantizerOptions) -> dict[str, Any]:
    """What is rounded inside attention: keys and values, and how many bits attention weights have."""
    cache = options.cache_spec
    bits = options.softmax_bits if options.softmax != "none" else None
    return {"kv_cache": None if cache is None else cache.model_dump(mode="json"), "softmax_bits": bits}


def opens_with(transposed: bool) -> str:
    """What opens it, in whatever modules the model keeps its weights."""
    return (
        "**Needs the Python package `llmcompress`**: open it with `llmcompress.load(path)`. Plain transformers does\n"
        "not know this layout and stops with a size mismatch; `llmcompress eval` and `llmcompress verify` open it too."
    )
