"""Read a quantized checkpoint as if it had never been packed: pack-quantized, bitsandbytes 4-bit, or our own layout."""

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from llmcompress.errors import InputError
from llmcompress.kernels import stored
from llmcompress.kernels.codes import Codes
from llmcompress.spec import LinearSpec

VERSION = 1  # of our own layout
DAMAGED = "config.json: quantization_config is damaged"
GIVE = "give the output of `llmcompress quantize`"


class Reader(Protocol):
    """Tensors by name."""

    def names(self) -> tuple[str, ...]: ...

    def read(self, name: str) -> Tensor: ...


def _integers(section: Mapping[str, Any]) -> dict[str, LinearSpec]:
    """Format by module name, of a pack-quantized checkpoint."""
    found: dict[str, LinearSpec] = {}
    for group in section["config_groups"].values():
        weights = group["weights"]
        if not weights["symmetric"] or weights["strategy"] != "group":
            raise InputError("config.json: only symmetric grouped weights are read", "quantize with llmcompress")
        spec = LinearSpec(bits=weights["num_bits"], group_size=weights["group_size"])
        found |= {str(target): spec for target in group["targets"]}
    return found


def _specs(section: Mapping[str, Any]) -> dict[str, LinearSpec]:
    """Format by module name, of a checkpoint in our own layout."""
    if section["version"] != VERSION:
        raise InputError(f"config.json: layout version {str(section['version'])[:20]}", "update llmcompress")
    return {
        str(target): LinearSpec.model_validate(group["spec"])
        for group in section["groups"].values()
        for target in group["targets"]
    }


class PackedReader:
    """A reader that hides packed tensors and shows the weights they stand for.

    `row_major` names the weights it makes up: they come as `(rows, columns)` whatever the module is.
    Raises InputError when the packed tensors and config.json disagree.
    """

    def __init__(self, base: Reader, config: Mapping[str, Any]) -> None:
        self._base = base
        names = base.names()
        self._present = frozenset(names)
        self._specs: dict[str, LinearSpec] = {}
        self._read_config(config)
        self._four_bit = {}
        for name in names:
            stem, record, kind = name.partition(stored.STATE)
            if record:
                self._four_bit[stem] = kind
        stems = [name.removesuffix(stored.PACKED) for name in names if name.endswith(stored.PACKED)]
        self._by_weight = {f"{stem}.weight": stem for stem in (*stems, *self._four_bit)}
        self.row_major = frozenset(self._by_weight)
        hidden = {part for stem in self._by_weight.values() for part in self.parts(stem)} | self.row_major
        self._names = (*(name for name in names if name not in hidden), *self._by_weight)

    def _read_config(self, config: Mapping[str, Any]) -> None:
        section = config.get("quantization_config")
        if not isinstance(section, Mapping):
            raise InputError("config.json: not a quantized checkpoint", GIVE)
        try:
            if section.get("format") == "pack-quantized":
                self._specs = _integers(section)
            elif section.get("quant_method") == "llmcompress":
                self._specs = _specs(section)
            elif section.get("quant_method") != "bitsandbytes" or section.get("load_in_4bit") is not True:
                method = str(section.get("quant_method"))[:40]
                raise InputError(f"config.json: not a checkpoint this can read: {method}", GIVE)
        except (KeyError, TypeError, AttributeError, ValueError):
            raise InputError(DAMAGED, "quantize the model again") from None

    def names(self) -> tuple[str, ...]:
        return self._names

    def read(self, name: str) -> Tensor:
        """A tensor as stored, or a packed weight dequantized to float32."""
        stem = self._by_weight.get(name)
        return self._base.read(name) if stem is None else self.linear(stem).dequantize()

    def stems(self) -> tuple[str, ...]:
        """What the tensor names of each packed linear begin with."""
        return tuple(self._by_weight.values())

    def parts(self, stem: str) -> tuple[str, ...]:
        """Names of the tensors that stand for a packed linear."""
        endings = stored.FOUR_BIT_PARTS if stem in self._four_bit else stored.PACKED_PARTS
        return tuple(stem + ending for ending in endings if stem + ending in self._present)

    def spec_of(self, stem: str) -> LinearSpec:
        """Format of a packed linear. Raises InputError where config.json and the tensors disagree."""
        if stem in self._four_bit:
            double = stem + stored.NESTED_ABSMAX in self._present
            return stored.four_bit_spec(stem, self._four_bit[stem], double, self._base.read)
        if stem in self._specs:
            return self._specs[stem]
        for target, spec in self._specs.items():  # module and tensor names may differ by a prefix
            if target.endswith("." + stem) or stem.endswith("." + target):
                return spec
        raise InputError(f"config.json: no group lists {stem}", "config.json and the shards are not of one run")

    def size_of(self, stem: str) -> tuple[int, int]:
        """Rows and columns of a packed linear."""
        return stored.size_of(stem, self._four_bit.get(stem), self._base.read)

    def linear(self, stem: str) -> Codes:
        """One packed linear, unpacked."""
        return stored.codes_of(stem, self.spec_of(stem), self._base.read)
