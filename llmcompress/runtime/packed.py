"""Read a quantized checkpoint as if it had never been packed: compressed-tensors, bitsandbytes 4-bit, or our own."""

from collections.abc import Mapping
from typing import Any, Literal, Protocol

from torch import Tensor, nn

from llmcompress.errors import InputError
from llmcompress.kernels import stored
from llmcompress.kernels.codes import Codes
from llmcompress.runtime.attention import PARTS, install, rounding_of, set_rounding
from llmcompress.runtime.inputs import attach_stored, detach
from llmcompress.runtime.targets import block_of_expert, blocks_of
from llmcompress.runtime.tying import TiedReader, TieRecord
from llmcompress.spec import PER_ROW, InputSpec, LinearSpec

ANY_COLUMNS = 1  # group size of a format by rows whose file does not say how many columns there are
VERSION = 1  # of our own layout
DAMAGED = "config.json: quantization_config is damaged"
GIVE = "give the output of `llmcompress quantize`"


class Reader(Protocol):
    """Tensors by name."""

    def names(self) -> tuple[str, ...]: ...

    def read(self, name: str) -> Tensor: ...


def _compressed_tensors(section: Mapping[str, Any]) -> tuple[dict[str, LinearSpec], dict[int, LinearSpec]]:
    """Format by module name, of a compressed-tensors checkpoint, and of experts by block."""
    found: dict[str, LinearSpec] = {}
    experts: dict[int, LinearSpec] = {}
    for group in section["config_groups"].values():
        weights, inputs = group["weights"], group.get("input_activations")
        by_rows = weights["strategy"] == "channel" and weights["num_bits"] == 8
        if not weights["symmetric"] or not (by_rows or weights["strategy"] == "group"):
            raise InputError("config.json: only symmetric weights by groups, or 8-bit ones by rows, are read", GIVE)
        spec = {
            "bits": weights["num_bits"],
            "group_size": ANY_COLUMNS if by_rows else weights["group_size"],
            "kind": "int" if not by_rows else "fp8" if weights["type"] == "float" else "int8",
            "inputs": inputs and _inputs(inputs),
        }
        checked = LinearSpec.model_validate(spec)
        for target in map(str, group["targets"]):
            found[target] = checked
            experts |= dict.fromkeys(blocks_of(target), checked)
    return found, experts


def _inputs(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """How inputs are rounded, from the `input_activations` of a group."""
    if (arguments["strategy"], arguments["dynamic"]) not in (("tensor", False), ("token", True)):
        raise InputError("config.json: only inputs rounded under one static scale, or by tokens, are read", GIVE)
    kind = "fp8" if arguments["type"] == "float" else "int"
    return {
        "bits": arguments["num_bits"],
        "kind": kind,
        "scale": arguments["strategy"],
        "symmetric": arguments["symmetric"],
    }


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

    `row_major` names the weights it unpacks: they come as `(rows, columns)` whatever the module is. `made_up` names
    those and what blocks share, which `tied` reads where there is any.
    Raises InputError when the packed tensors and config.json disagree.
    """

    def __init__(self, base: Reader, config: Mapping[str, Any]) -> None:
        tying = TieRecord.of(config)
        self.tied = None if tying is None else TiedReader(base, tying)
        base = self._base = self.tied or base
        names = base.names()
        self._present = frozenset(names)
        self._specs: dict[str, LinearSpec] = {}
        self._experts: dict[int, LinearSpec] = {}
        self._cache: InputSpec | None = None
        self._softmax_bits: int | None = None
        self._read_config(config)
        self._four_bit = {}
        for name in names:
            stem, record, kind = name.partition(stored.STATE)
            if record:
                self._four_bit[stem] = kind
        stems = {
            n.removesuffix(part): None for part in (stored.PACKED, stored.SCALE) for n in names if n.endswith(part)
        }
        self._by_weight = {f"{stem}.weight": stem for stem in (*stems, *self._four_bit)}
        self.row_major = frozenset(self._by_weight)
        self.made_up = self.row_major if self.tied is None else self.row_major | self.tied.made_up
        self.attention: dict[str, tuple[str, ...]] = {}  # scales inside attention: what their names end with, by stem
        for part in PARTS:
            for stem in [n.removesuffix(part) for n in names if n.endswith(part)]:
                self.attention[stem] = (*self.attention.get(stem, ()), part)
        hidden = {part for stem in self._by_weight.values() for part in self.parts(stem)} | self.row_major
        hidden |= {stem + part for stem in self.attention for part in PARTS}
        self._names = (*(name for name in names if name not in hidden), *self._by_weight)

    def _read_config(self, config: Mapping[str, Any]) -> None:
        section = config.get("quantization_config")
        if not isinstance(section, Mapping):
            raise InputError("config.json: not a quantized checkpoint", GIVE)
        try:
            if section.get("quant_method") == "compressed-tensors":
                self._specs, self._experts = _compressed_tensors(section)
                cache = section.get("kv_cache_scheme")
                self._cache = None if cache is None else InputSpec.model_validate(_inputs(cache))
            elif section.get("quant_method") == "llmcompress":
                self._specs = _specs(section)
                rounded = section.get("attention", {"kv_cache": None, "softmax_bits": None})
                self._softmax_bits = None if rounded["softmax_bits"] is None else int(rounded["softmax_bits"])
                cache = rounded["kv_cache"]
                self._cache = None if cache is None else InputSpec.model_validate(cache)
            elif section.get("quant_method") != "bitsandbytes" or section.get("load_in_4bit") is not True:
                method = str(section.get("quant_method"))[:40]
                raise InputError(f"config.json: not a checkpoint this can read: {method}", GIVE)
        except (KeyError, TypeError, AttributeError, ValueError):
            raise InputError(DAMAGED, "quantize the model again") from None

    @property
    def rounded_attention(self) -> tuple[Literal["none", "int8", "fp8"], bool]:
        """What keys and values are rounded to, and whether attention weights are rounded."""
        cache = self._cache
        word: Literal["none", "int8", "fp8"] = "none" if cache is None else "fp8" if cache.kind == "fp8" else "int8"
        return word, self._softmax_bits is not None

    def names(self) -> tuple[str, ...]:
        return self._names

    def read(self, name: str) -> Tensor:
        """A tensor as stored, or a packed weight dequantized to float32."""
        stem = self._by_weight.get(name)
        return self._base.read(name) if stem is None else self.linear(stem).dequantize()

    def read_float(self, name: str) -> Tensor:
        """The same in float32."""
        own = getattr(self._base, "read_float", self._base.read)
        return own(name) if name not in self._by_weight else self.read(name)

    def stems(self) -> tuple[str, ...]:
        """What the tensor names of each packed linear begin with."""
        return tuple(self._by_weight.values())

    def parts(self, stem: str) -> tuple[str, ...]:
        """Names of the tensors that stand for a packed linear."""
        packed = stem + stored.PACKED in self._present
        endings = stored.PACKED_PARTS if packed else (*stored.FOUR_BIT_PARTS, stored.SCALE)
        return tuple(stem + ending for ending in endings if stem + ending in self._present)

    def spec_of(self, stem: str) -> LinearSpec:
        """Format of a packed linear. Raises InputError where config.json and the tensors disagree."""
        listed = self._listed(stem)
        if stem in self._four_bit:
            double = stem + stored.NESTED_ABSMAX in self._present
            spec = stored.four_bit_spec(stem, self._four_bit[stem], double, self._base.read)
            return spec.model_copy(update={"inputs": listed and listed.inputs})
        if listed is None:
            raise InputError(f"config.json: no group lists {stem}", "config.json and the shards are not of one run")
        if listed.kind in PER_ROW and listed.group_size == ANY_COLUMNS:
            rows = self._base.read(stem + stored.SCALE).numel()
            columns = self._base.read(stem + stored.WEIGHT).numel() // max(rows, 1)
            return listed.model_copy(update={"group_size": max(columns, 1)})
        return listed

    def _listed(self, stem: str) -> LinearSpec | None:
        """What config.json says of a linear; bitsandbytes' says nothing of single ones."""
        if stem in self._specs:
            return self._specs[stem]
        if (block := block_of_expert(stem)) in self._experts:
            return self._experts[block]
        for target, spec in self._specs.items():  # module and tensor names may differ by a prefix
            if target.endswith("." + stem) or stem.endswith("." + target):
                return spec
        return None

    def size_of(self, stem: str) -> tuple[int, int]:
        """Rows and columns of a packed linear."""
        spec = self.spec_of(stem)
        if spec.kind in PER_ROW:
            return self._base.read(stem + stored.SCALE).numel(), spec.group_size
        return stored.size_of(stem, self._four_bit.get(stem), self._base.read)

    def linear(self, stem: str) -> Codes:
        """One packed linear, unpacked."""
        return stored.codes_of(stem, self.spec_of(stem), self._base.read)

    def attach(self, weight: str, module: nn.Module) -> None:
        """Let the module of a weight round its inputs, where the format of that weight says so."""
        stem = self._by_weight.get(weight)
        if stem is not None and self.spec_of(stem).inputs is not None:
            attach_stored(module, self.linear(stem))

    def prepare(self, model: nn.Module, module_of: Mapping[str, str]) -> None:
        """Let the attention of a model round what the checkpoint says; `module_of` gives parameters by tensor name."""
        if self.attention:
            install(model)
        names = {weight.removesuffix(".weight"): name.removesuffix(".weight") for weight, name in module_of.items()}
        for stem in self.attention:
            rounding = rounding_of(stem, self._cache, self._softmax_bits, self._base.read)
            set_rounding(model.get_submodule(self.attention_name(stem, names)), rounding)

    @staticmethod
    def attention_name(stem: str, names: Mapping[str, str]) -> str:
        """The attention module that scales named `stem` belong to; `names` gives modules of linears by stem.

        Raises InputError where none of them is inside it.
        """
        linear = next((name for name in names if name.startswith(stem + ".")), None)
        if linear is None:
            raise InputError(f"{stem}: scales of an attention that is not there", "the files are damaged")
        return names[linear].removesuffix(linear.removeprefix(stem))

    def detach(self, root: nn.Module) -> None:
        """Take back what `attach` did to a module and to all inside it."""
        detach(root)
