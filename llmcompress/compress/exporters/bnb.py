"""bitsandbytes nf4 and fp4, written without importing bitsandbytes.

One format for every quantized linear, which is all this layout can say. Per linear: `weight` uint8 `(weights / 2, 1)`,
`weight.absmax` float32 or, doubly quantized, uint8 `(weights / 64,)` with `weight.nested_absmax`, the tables of
values, and a JSON record of type and shape. Linears left alone are named in `llm_int8_skip_modules`.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import Tensor

from llmcompress.compress.grid import Codes
from llmcompress.kernels import stored
from llmcompress.spec import FOUR_BIT
from llmcompress.types import LinearInfo, LinearSpec, ModelTrace, Plan

TITLE = "bitsandbytes 4-bit"
TAG = "bitsandbytes"
LIBRARY = "transformers"


def holds(specs: Collection[LinearSpec]) -> bool:
    """One 4-bit table format, the same for all."""
    return len(specs) == 1 and all(spec.kind in FOUR_BIT and spec.inputs is None for spec in specs)


def packed_tensors(linear: LinearInfo, codes: Codes) -> dict[str, Tensor]:
    """The tensors that replace the weight of one linear."""
    return stored.tensors_of(linear.stem, codes)


def packed_layout(linear: LinearInfo, spec: LinearSpec, scale_dtype: str) -> stored.Layout:
    """Dtype and shape of those tensors, without making them."""
    return stored.layout_of(linear.stem, spec, (linear.rows, linear.columns), scale_dtype)


def config_document(
    source: Mapping[str, object], plan: Plan, trace: ModelTrace, heads: Iterable[str]
) -> dict[str, Any]:
    """The config.json of the output: the source's, with the quantization section added."""
    return {
        **source,
        "quantization_config": section(
            plan.allocation.assigned[0].spec, source, plan.left_alone((*heads, *trace.routers))
        ),
    }


def section(spec: LinearSpec, source: Mapping[str, object], left_alone: list[str]) -> dict[str, Any]:
    """The `quantization_config`; `left_alone` are the linears that are not quantized."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": spec.kind,
        "bnb_4bit_use_double_quant": spec.double,
        "bnb_4bit_compute_dtype": source.get("dtype") or source.get("torch_dtype") or "float32",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": left_alone,
    }


def opens_with(transposed: bool) -> str:
    """What opens it; Conv1D modules are no obstacle."""
    return "Opens with `AutoModelForCausalLM.from_pretrained` where `bitsandbytes` is installed."
