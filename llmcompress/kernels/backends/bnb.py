"""bitsandbytes' kernels for nf4 and fp4, on CPU and CUDA, where `LLMCOMPRESS_BACKEND=bnb` asks for them.

Its own modules repack their weights in place at the first forward and damage what they save later; here the repacked
copy is a tensor of its own, and the tensors of the file stay as they are.
"""

import importlib.util
from collections.abc import Mapping

import torch
from torch import Tensor

from llmcompress.kernels import stored
from llmcompress.spec import FOUR_BIT, LinearSpec

BLOCK_ROWS, BLOCK_COLUMNS = 32, 64  # its CPU kernel takes whole ones
REPACKED, BLOCK_SCALES, SCALES = ".repacked", ".block_scales", ".scales"


def why_not(spec: LinearSpec, rows: int, columns: int, *, tokens: int, dtype: torch.dtype, device: str) -> str | None:
    """Why it cannot do a case, or None."""
    kind = str(device).partition(":")[0]
    if spec.kind not in FOUR_BIT:
        return f"it is for nf4 and fp4, not {spec.label}"
    if importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    if kind not in ("cpu", "cuda"):
        return f"it is for CPU and CUDA, not {device}"
    if not dtype.is_floating_point:
        return f"inputs are {dtype}"
    if columns % spec.group_size:
        return f"rows of {columns} weights are not whole blocks of {spec.group_size}"
    return None


def _has_cpu_kernel(spec: LinearSpec, rows: int, columns: int) -> bool:
    from bitsandbytes.functional import has_avx512bf16  # lazy: bitsandbytes is optional and slow to import

    return bool(has_avx512bf16()) and rows % BLOCK_ROWS == 0 and columns % BLOCK_COLUMNS == 0


def prepare(tensors: Mapping[str, Tensor], spec: LinearSpec) -> dict[str, Tensor]:
    """Codes of the file, float32 scales, and on CPUs with a kernel for them both once more in its layout."""
    from bitsandbytes.functional import (  # lazy: bitsandbytes is optional and slow to import
        QuantState,
        _convert_weight_packed_for_cpu,
    )

    codes = stored.codes_of("", spec, lambda name: tensors[name])
    scale = codes.scale.to(tensors[stored.WEIGHT].device)
    found = {stored.WEIGHT: tensors[stored.WEIGHT], SCALES: scale, stored.MAP: tensors[stored.MAP]}
    if not scale.is_cuda and _has_cpu_kernel(spec, *codes.codes.shape):
        state = QuantState(
            absmax=scale.clone(), shape=codes.codes.shape, code=tensors[stored.MAP],
            blocksize=spec.group_size, quant_type=spec.kind, dtype=torch.bfloat16,
        )  # fmt: skip
        found[REPACKED], state = _convert_weight_packed_for_cpu(tensors[stored.WEIGHT].clone(), state)
        found[BLOCK_SCALES] = state.absmax
    return found


def linear(x: Tensor, prepared: Mapping[str, Tensor], spec: LinearSpec, rows: int, columns: int) -> Tensor:
    """Inputs `(tokens, columns)` times the weight, `(tokens, rows)`, both rounded to the inputs' dtype."""
    from bitsandbytes import matmul_4bit  # lazy: bitsandbytes is optional and slow to import
    from bitsandbytes.functional import QuantState  # lazy: the same

    x = x.contiguous()
    if REPACKED in prepared and x.dtype == torch.bfloat16:
        found: Tensor = torch.ops.bitsandbytes.gemv_4bit(
            x, prepared[REPACKED], (rows, columns), prepared[BLOCK_SCALES], prepared[stored.MAP], spec.group_size
        )
        return found
    state = QuantState(
        absmax=prepared[SCALES], shape=torch.Size((rows, columns)), code=prepared[stored.MAP],
        blocksize=spec.group_size, quant_type=spec.kind, dtype=x.dtype,
    )  # fmt: skip
    result: Tensor = matmul_4bit(x, prepared[stored.WEIGHT], state)
    return result
