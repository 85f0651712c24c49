"""compressed-tensors, written without importing compressed-tensors: three formats, each by itself or side by side.

`pack-quantized`   `int`: `weight_packed` int32 `(rows, words)`, `weight_scale` 16-bit `(rows, groups)`, `weight_shape`
`int-quantized`    `int8`: `weight` int8 `(rows, columns)`, `weight_scale` 16-bit `(rows, 1)`
`float-quantized`  `fp8`: the same with `weight` in float8_e4m3fn

and where inputs are rounded under one scale, `input_scale` and `input_zero_point`, `(1,)` each. Targets in
`config.json` are exact module names that never overlap, under zero-padded group keys, so that every reader resolves
them alike; the experts of all blocks that share a format are one pattern, in a group of its own. Plain transformers
takes the first such group for all experts of a model. Needs compressed-tensors >= 0.17 to be read (dense packing of 3,
5 and 6 bits).
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from llmcompress.compress.grid import Codes
from llmcompress.kernels import stored
from llmcompress.runtime.targets import blocks_of, experts_target
from llmcompress.spec import PER_ROW
from llmcompress.types import InputSpec, LinearInfo, LinearSpec, ModelTrace, Plan

TITLE = "compressed-tensors"
TAG = "compressed-tensors"
LIBRARY = "transformers"
FORMATS = {"int": "pack-quantized", "int8": "int-quantized", "fp8": "float-quantized"}
MIXED = "mixed-precision"
SEVERAL = "re:the experts have several formats, which plain transformers cannot read: open it with llmcompress$"


def holds(specs: Collection[LinearSpec]) -> bool:
    """Symmetric integers of any widths in groups, 8-bit integers and float8 by rows, with inputs rounded or not."""
    plain = all(spec.kind in FORMATS and not spec.high_share and not spec.rank for spec in specs)
    return plain and not any(spec.inputs is not None and spec.inputs.hadamard for spec in specs)


def _guard(linear: LinearInfo, dtype: str) -> stored.Layout:
    """An empty tensor under the old name of a Conv1D's weight.

    Plain transformers does not decompress Conv1D: it would find no weight, warn, and fill it with
    random numbers. A weight of the wrong shape makes it stop with an error instead.
    """
    return {linear.tensor: (dtype, (0,))} if linear.transposed else {}


def packed_tensors(linear: LinearInfo, codes: Codes) -> dict[str, Tensor]:
    """The tensors that replace the weight of one linear."""
    guard = {name: torch.empty(shape, dtype=codes.scale.dtype) for name, (_, shape) in _guard(linear, "").items()}
    tensors = stored.tensors_of(linear.stem, codes)
    return guard | (stored.misshapen(tensors) if linear.transposed else tensors)


def packed_layout(linear: LinearInfo, spec: LinearSpec, scale_dtype: str) -> stored.Layout:
    """Dtype and shape of those tensors, without making them; `scale_dtype` is `BF16` or `F16`."""
    layout = stored.layout_of(linear.stem, spec, (linear.rows, linear.columns), scale_dtype)
    return _guard(linear, scale_dtype) | (stored.misshapen_layout(layout) if linear.transposed else layout)


def _targets(plan: Plan, trace: ModelTrace) -> list[tuple[LinearSpec, list[str]]]:
    """The linears of each format, narrowest first, then experts; the head comes last, in a group of its own."""
    by_spec: dict[LinearSpec, list[str]] = {}
    experts: dict[LinearSpec, dict[int, None]] = {}
    for info in trace.blocks:
        for linear in info.linears:
            spec = plan.spec_of(linear.name)
            if spec is not None and linear.expert is not None:
                experts.setdefault(_of_any_columns(spec), {})[info.index] = None
            elif spec is not None:
                by_spec.setdefault(_of_any_columns(spec), []).append(linear.name)
    groups = sorted(by_spec.items(), key=_by_size)
    groups += [(spec, [experts_target(blocks)]) for spec, blocks in sorted(experts.items(), key=_by_size)]
    head = None if trace.head is None else plan.spec_of(trace.head.name)
    return groups if trace.head is None or head is None else [*groups, (head, [trace.head.name])]


def _by_size(item: tuple[LinearSpec, object]) -> tuple[int, int]:
    return item[0].bits, item[0].group_size


def _of_any_columns(spec: LinearSpec) -> LinearSpec:
    """The format without the number of columns, which config.json does not tell of formats by rows."""
    return spec.model_copy(update={"group_size": 0}) if spec.kind in PER_ROW else spec


def _weights(spec: LinearSpec) -> dict[str, Any]:
    grouped = spec.kind not in PER_ROW
    return {
        "num_bits": spec.bits,
        "type": "float" if spec.kind == "fp8" else "int",
        "symmetric": True,
        "strategy": "group" if grouped else "channel",
        "group_size": spec.group_size if grouped else None,
        "dynamic": False,
    }


def _inputs(spec: InputSpec) -> dict[str, Any]:
    return {
        "num_bits": spec.bits,
        "type": "float" if spec.kind == "fp8" else "int",
        "symmetric": spec.symmetric,
        "strategy": spec.scale,
        "dynamic": spec.scale == "token",
    }


def _guard_experts(formats: int) -> dict[str, Any]:
    """Where experts have several formats, a group that matches nothing.

    Plain transformers reads all experts of a model by the first group that speaks of experts, which would be wrong for
    some of them without a word. By this one it can read none, and stops.
    """
    if formats < 2:
        return {}
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
    return {"group_00": {"targets": [SEVERAL], "weights": weights, "format": FORMATS["int8"]}}


def quantization_config(plan: Plan, trace: ModelTrace, unquantized: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` section of config.json; `unquantized` are linears outside the blocks."""
    targets = _targets(plan, trace)
    guards = _guard_experts(sum(1 for _, names in targets if any(map(blocks_of, names))))
    groups = guards | {
        f"group_{place:02d}": {
            "targets": names,
            "weights": _weights(spec),
            "input_activations": None if spec.inputs is None else _inputs(spec.inputs),
            "output_activations": None,
            "format": FORMATS[spec.kind],
        }
        for place, (spec, names) in enumerate(targets, len(guards))
    }
    formats = {FORMATS[spec.kind] for spec, _ in targets}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": plan.left_alone((*unquantized, *trace.routers)),
        "kv_cache_scheme": None if plan.options.cache_spec is None else _inputs(plan.options.cache_spec),
    }


def config_document(
    source: Mapping[str, object], plan: Plan, trace: ModelTrace, heads: Iterable[str]
) -> dict[str, Any]:
    """The config.json of the output: the source's, with the quantization section added."""
    return {**source, "quantization_config": quantization_config(plan, trace, heads)}


def opens_with(transposed: bool) -> str:
    """What opens it; `transposed` says that the model keeps weights in Conv1D modules."""
    if transposed:
        return (
            "This family keeps its weights in Conv1D modules, which plain transformers does not decompress: there it\n"
            "stops with a size mismatch. `llmcompress.load`, `llmcompress eval` and `llmcompress verify` open it."
        )
    return (
        "Opens with `AutoModelForCausalLM.from_pretrained` where `compressed-tensors>=0.17` is installed; the layout\n"
        "is the one vLLM reads."
    )
