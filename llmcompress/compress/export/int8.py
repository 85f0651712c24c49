"""bitsandbytes 8-bit (LLM.int8): one signed byte for each weight and a float32 scale for each row.

.weight         int8 (rows, columns)    round(weight * 127 / largest of the row)
.SCB            float32 (rows,)         largest magnitude of the row; a weight is `byte * SCB / 127`
.weight_format  uint8 ()                0: by rows
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmcompress.kernels.codes import Codes
from llmcompress.model.checkpoint import TensorReader

LARGEST = 127
SCALE, FORMAT = ".SCB", ".weight_format"


def rows_of(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Bytes and scales of a weight `(rows, columns)`, as bitsandbytes makes them, which goes through float16."""
    half = weight.to(torch.float16)
    largest = half.abs().amax(1).float()
    factor = torch.where(largest > 0, LARGEST / largest, 0.0)
    return (half.float() * factor.unsqueeze(1)).round().to(torch.int8), largest


def carried(codes: Codes) -> tuple[Tensor, Tensor] | None:
    """Bytes and scales that stand for 8-bit codes with one scale per row; None where codes are anything else."""
    spec = codes.spec
    whole = spec.kind == "int" and spec.bits == 8 and spec.group_size == codes.codes.shape[1]
    if not whole or spec.rank or spec.high_share:
        return None
    return (codes.codes.to(torch.int16) - 128).to(torch.int8), codes.scale.float().view(-1) * LARGEST


def weight_of(stored: Tensor, scale: Tensor) -> Tensor:
    """The weight that bytes and scales stand for, float32."""
    return stored.float() * scale.view(-1, 1) * (1 / LARGEST)


def tensors_of(stem: str, stored: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """The tensors of a linear."""
    return {f"{stem}.weight": stored, stem + SCALE: scale, stem + FORMAT: torch.tensor(0, dtype=torch.uint8)}


def section(left_alone: list[str]) -> dict[str, Any]:
    """The `quantization_config`."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": False,
        "load_in_8bit": True,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_threshold": 6.0,
        "llm_int8_skip_modules": left_alone,
    }


class Int8Reader:
    """A reader that hides scales and shows the weights they stand for."""

    def __init__(self, base: TensorReader, config: Mapping[str, Any]) -> None:
        self._base = base
        self.row_major = frozenset(n.removesuffix(SCALE) + ".weight" for n in base.names() if n.endswith(SCALE))

    def names(self) -> tuple[str, ...]:
        return tuple(name for name in self._base.names() if not name.endswith((SCALE, FORMAT)))

    def read(self, name: str) -> Tensor:
        """A tensor as stored, or a weight dequantized to float32."""
        found = self._base.read(name)
        return (
            weight_of(found, self._base.read(name.removesuffix(".weight") + SCALE)) if name in self.row_major else found
        )
