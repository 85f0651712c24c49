"""A checkpoint in our own layout with every format side by side, read as if it had never been packed."""

from collections.abc import Mapping
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from llmcompress.compress.exporters import native
from llmcompress.compress.formats import maker
from llmcompress.compress.grid import Codes
from llmcompress.compress.rounding import Request
from llmcompress.errors import InputError
from llmcompress.model.checkpoint import TORCH_DTYPES
from llmcompress.plugins import available, find
from llmcompress.runtime.packed import PackedReader
from llmcompress.types import LinearInfo, QuantizerOptions

QUANTIZERS = "llmcompress.compress.quantizers"
OPTIONS = QuantizerOptions()


class Memory:
    """Tensors in a table, read by name; remembers what was read."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors, self.reads = tensors, list[str]()

    def names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    def read(self, name: str) -> Tensor:
        self.reads.append(name)
        return self.tensors[name]


def mixture() -> tuple[dict[str, Tensor], dict[str, object], dict[str, Codes]]:
    """One linear for each quantizer, what config.json says of them, and their codes by module name."""
    tensors: dict[str, Tensor] = {"embed.weight": torch.ones(3, 4)}
    groups, codes = {}, {}
    for place, name in enumerate(available(QUANTIZERS)):
        quantizer = find(QUANTIZERS, name)
        make = maker(quantizer, OPTIONS, 64)
        spec = make(4, 128) or make(8, 128)
        assert spec is not None
        weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(place))
        (found,) = quantizer.quantize([Request(weight, spec)], None, options=OPTIONS, dtype=torch.bfloat16)
        module = f"model.layers.{place}.{name}"
        linear = LinearInfo(
            name=module, tensor=f"layers.{place}.{name}.weight", rows=32, columns=128, unit=name, shared_input=0
        )
        packed = native.packed_tensors(linear, found.codes)
        layout = native.packed_layout(linear, spec, "BF16")
        assert {n: (TORCH_DTYPES[d], s) for n, (d, s) in layout.items()} == {
            n: (t.dtype, tuple(t.shape)) for n, t in packed.items()
        }
        assert tuple(packed[linear.tensor].shape) != (32, 128)  # a stranger must stumble over it
        tensors |= packed
        groups[f"group_{place:02d}"] = {"targets": [module], "spec": spec.model_dump(mode="json")}
        codes[linear.tensor] = found.codes
    return tensors, {"quantization_config": {"quant_method": "llmcompress", "version": 1, "groups": groups}}, codes


def test_every_format_side_by_side() -> None:
    tensors, config, codes = mixture()
    memory = Memory(tensors)
    reader = PackedReader(memory, config)
    assert memory.reads == []  # names alone tell what is packed
    assert set(reader.names()) == {"embed.weight", *codes}
    assert reader.row_major == set(codes)
    assert torch.equal(reader.read("embed.weight"), torch.ones(3, 4))
    counted = 0
    for name, known in codes.items():
        stem = name.removesuffix(".weight")
        assert reader.spec_of(stem) == known.spec
        assert reader.size_of(stem) == (32, 128)
        assert torch.equal(reader.read(name), known.dequantize())
        bits = sum(8 * tensors[part].numel() * tensors[part].element_size() for part in reader.parts(stem))
        assert bits == known.spec.storage_bits(32, 128)
        counted += len(reader.parts(stem))
    guards = sum(tensor.numel() == 0 for tensor in tensors.values())
    assert counted + guards + 1 == len(tensors)


def test_config_and_tensors_must_agree() -> None:
    tensors, config, _ = mixture()
    section = config["quantization_config"]
    assert isinstance(section, dict)
    for group in section["groups"].values():
        if group["spec"]["bits"] == 4 and "kind" not in group["spec"]:
            group["spec"] = {"bits": 3, "group_size": 64}
    reader = PackedReader(Memory(tensors), config)
    place = available(QUANTIZERS).index("rtn")
    with pytest.raises(InputError, match="its format needs"):
        reader.read(f"layers.{place}.rtn.weight")


@pytest.mark.parametrize(
    "section",
    [
        None,
        {"quant_method": "gptq"},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"format": "pack-quantized"},
        {"format": "pack-quantized", "config_groups": {"a": {"weights": {"symmetric": False, "strategy": "group"}}}},
        {"quant_method": "llmcompress"},
        {"quant_method": "llmcompress", "version": 1, "groups": []},
        {"quant_method": "llmcompress", "version": 9, "groups": {}},
    ],
)
def test_other_configs_are_refused(section: object) -> None:
    config = {} if section is None else {"quantization_config": section}
    with pytest.raises(InputError):
        PackedReader(SimpleNamespace(names=tuple, read=None), config)
