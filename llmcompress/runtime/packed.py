"""Read a `pack-quantized` checkpoint as if it had never been packed."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from llmcompress.errors import InputError
from llmcompress.kernels import reference
from llmcompress.types import LinearSpec

PACKED, SCALE, SHAPE = ".weight_packed", ".weight_scale", ".weight_shape"


class Reader(Protocol):
    """Tensors by name."""

    def names(self) -> tuple[str, ...]: ...

    def read(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class PackedLinear:
    """One packed linear: its codes uint8 `(rows, columns)`, its scales, and its format."""

    codes: Tensor
    scale: Tensor
    spec: LinearSpec

    def dequantize(self) -> Tensor:
        """float32 `(rows, columns)`."""
        return reference.dequantize(self.codes, self.scale, self.spec.bits)


def _bits_by_target(config: Mapping[str, Any]) -> dict[str, int]:
    section = config.get("quantization_config")
    if not isinstance(section, Mapping) or section.get("format") != "pack-quantized":
        raise InputError("config.json: not a pack-quantized checkpoint", "give the output of `llmcompress quantize`")
    found: dict[str, int] = {}
    try:
        for group in section["config_groups"].values():
            weights = group["weights"]
            if not weights["symmetric"] or weights["strategy"] != "group":
                raise InputError("config.json: only symmetric grouped weights are read", "quantize with llmcompress")
            found |= {str(target): int(weights["num_bits"]) for target in group["targets"]}
    except (KeyError, TypeError, AttributeError, ValueError):
        raise InputError("config.json: quantization_config is damaged", "quantize the model again") from None
    return found


class PackedReader:
    """A reader that hides packed tensors and shows the weights they stand for.

    `row_major` names the weights it makes up: they come as `(rows, columns)` whatever the module is.
    Raises InputError when the packed tensors and config.json disagree.
    """

    def __init__(self, base: Reader, config: Mapping[str, Any]) -> None:
        self._base = base
        self._bits = _bits_by_target(config)
        stems = [name.removesuffix(PACKED) for name in base.names() if name.endswith(PACKED)]
        self._by_weight = {f"{stem}.weight": stem for stem in stems}
        self.row_major = frozenset(self._by_weight)
        hidden = {stem + part for stem in stems for part in (PACKED, SCALE, SHAPE, ".weight")}
        self._names = (*(name for name in base.names() if name not in hidden), *self._by_weight)

    def names(self) -> tuple[str, ...]:
        return self._names

    def read(self, name: str) -> Tensor:
        """A tensor as stored, or a packed weight dequantized to float32."""
        stem = self._by_weight.get(name)
        return self._base.read(name) if stem is None else self.linear(stem).dequantize()

    def stems(self) -> tuple[str, ...]:
        """What the tensor names of each packed linear begin with."""
        return tuple(self._by_weight.values())

    def bits_of(self, stem: str) -> int:
        """Code width of a packed linear, from config.json; module and tensor names may differ by a prefix."""
        if stem in self._bits:
            return self._bits[stem]
        for target, bits in self._bits.items():
            if target == stem or target.endswith("." + stem) or stem.endswith("." + target):
                return bits
        raise InputError(f"config.json: no group lists {stem}", "config.json and the shards are not of one run")

    def linear(self, stem: str) -> PackedLinear:
        """One packed linear, unpacked."""
        packed, scale = self._base.read(stem + PACKED), self._base.read(stem + SCALE)
        rows, columns = (int(size) for size in self._base.read(stem + SHAPE).tolist())
        bits = self.bits_of(stem)
        if packed.shape != (rows, reference.words_per_row(columns, bits)) or len(scale) != rows:
            raise InputError(
                f"{stem}{PACKED}: shape {tuple(packed.shape)} is not {rows} rows of {columns} {bits}-bit codes",
                "config.json and the shards are not of one run",
            )
        spec = LinearSpec(bits=bits, group_size=columns // scale.shape[1])
        return PackedLinear(reference.unpack(packed.to(torch.int32), bits, columns), scale, spec)
