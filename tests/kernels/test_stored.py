"""What stands in a file for one linear, in every format: sizes recounted from the tensors, and read back unchanged."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from llmcompress.errors import InputError
from llmcompress.kernels import fourbit, stored
from llmcompress.kernels.codes import Codes
from llmcompress.kernels.inputs import InputQuantizer
from llmcompress.kernels.samples import random_codes
from llmcompress.model.checkpoint import TORCH_DTYPES
from llmcompress.spec import INPUTS, InputSpec, LinearSpec

SPECS = (
    *(LinearSpec(bits=bits, group_size=size) for bits in (2, 3, 5, 8) for size in (32, 64)),
    *(LinearSpec(bits=bits, group_size=32, kind="asymmetric") for bits in (2, 3, 4, 8)),
    *(LinearSpec(bits=bits, group_size=0, kind="codebook") for bits in (2, 3, 8)),
    *(
        LinearSpec(bits=4, group_size=64, kind=kind, double=double)
        for kind in ("nf4", "fp4")
        for double in (False, True)
    ),
    *(LinearSpec(bits=bits, group_size=32, high_share=share) for bits in (2, 3, 6) for share in (0.001, 0.125, 0.95)),
)
SIZES = [(48, 192), (7, 64), (128, 512)]


def slow_weights(codes: Codes) -> Tensor:
    """One weight at a time, from the words of the documentation."""
    spec = codes.spec
    rows, columns = codes.codes.shape
    found = torch.empty(rows, columns, dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            code = int(codes.codes[row, column])
            if codes.codebook is not None:
                found[row, column] = codes.codebook[row, code].double()
            elif spec.kind in ("nf4", "fp4"):
                block = (row * columns + column) // spec.group_size
                found[row, column] = fourbit.table_of(spec.kind)[code].double() * codes.scale[block].double()
            else:
                scale = codes.scale[row, column // spec.group_size].double()
                fine = codes.high is not None and bool(codes.high[column])
                middle = 2.0 ** (spec.bits + 2 * fine - 1)
                if codes.zero is not None:
                    middle = int(codes.zero[row, column // spec.group_size]) / 2.0 ** (8 - spec.bits)
                found[row, column] = (code - middle) * (scale / 4 if fine else scale)
    return found


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_weights_are_what_the_documentation_says(spec: LinearSpec) -> None:
    codes = random_codes(spec, 3, 128)
    assert torch.allclose(codes.dequantize().double(), slow_weights(codes), rtol=1e-6, atol=0)


@pytest.mark.parametrize("spec", SPECS, ids=repr)
@pytest.mark.parametrize("size", SIZES)
def test_storage_bits_are_those_of_the_tensors(spec: LinearSpec, size: tuple[int, int]) -> None:
    tensors = stored.tensors_of("m.q", random_codes(spec, *size))
    assert spec.storage_bits(*size) == sum(8 * t.numel() * t.element_size() for t in tensors.values())
    layout = stored.layout_of("m.q", spec, size, "BF16")
    assert {n: (TORCH_DTYPES[d], s) for n, (d, s) in layout.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
    }
    assert list(tensors) == ["m.q" + part for part in stored.parts_of(spec, size[1])]


@pytest.mark.parametrize("spec", SPECS, ids=repr)
@pytest.mark.parametrize("size", SIZES)
def test_reading_gives_back_what_was_written(spec: LinearSpec, size: tuple[int, int]) -> None:
    codes = random_codes(spec, *size)
    tensors = stored.tensors_of("m.q", codes)
    found = stored.codes_of("m.q", spec, tensors.__getitem__)
    assert torch.equal(found.codes, codes.codes)
    assert torch.equal(found.dequantize(), codes.dequantize())
    again = stored.tensors_of("m.q", found)
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    kind = spec.kind if spec.kind in ("nf4", "fp4") else None
    assert stored.size_of("m.q", kind, tensors.__getitem__) == size
    if kind:
        assert stored.four_bit_spec("m.q", kind, spec.double, tensors.__getitem__) == spec


@pytest.mark.parametrize("spec", SPECS[::4], ids=repr)
def test_tensors_of_another_shape_are_refused(spec: LinearSpec) -> None:
    tensors = stored.tensors_of("m.q", random_codes(spec, 48, 192))
    for name in tensors:
        if name.endswith((stored.SHAPE, stored.MAP, stored.NESTED_MAP)) or stored.STATE in name:
            continue
        broken = {**tensors, name: tensors[name][:-1]}
        with pytest.raises(InputError, match="shape"):
            stored.codes_of("m.q", spec, broken.__getitem__)


@pytest.mark.parametrize("text", [b"{", b"[1, 2]", b'{"shape": [0, 3], "blocksize": 64}', b'{"shape": [4], "x": 1}'])
def test_damaged_records_are_refused(text: bytes) -> None:
    record = torch.tensor(list(text), dtype=torch.uint8)
    with pytest.raises(InputError, match=r"m\.q"):
        stored.four_bit_spec("m.q", "nf4", False, lambda name: record)


def test_old_json_is_read_and_integers_are_written_as_ever() -> None:
    old = '{"bits":3,"group_size":128}'
    spec = LinearSpec.parse(old, "plan.json")
    assert spec == LinearSpec(bits=3, group_size=128)
    assert spec.model_dump_json() == old
    for each in SPECS:
        assert LinearSpec.parse(each.model_dump_json(), "plan.json") == each


@pytest.mark.parametrize(
    "facts",
    [
        {"bits": 3, "group_size": 0},
        {"bits": 3, "group_size": 64, "kind": "codebook"},
        {"bits": 3, "group_size": 64, "kind": "nf4"},
        {"bits": 4, "group_size": 64, "double": True},
        {"bits": 7, "group_size": 64, "high_share": 0.5},
        {"bits": 4, "group_size": 64, "kind": "nf4", "high_share": 0.5},
        {"bits": 9, "group_size": 64},
    ],
)
def test_formats_that_do_not_exist_are_refused(facts: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        LinearSpec.model_validate(facts)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (LinearSpec(bits=4, group_size=64, kind="nf4"), 4.5),
        (LinearSpec(bits=4, group_size=64, kind="nf4", double=True), 4.127),
        (LinearSpec(bits=3, group_size=0, kind="codebook"), 3.031),
        (LinearSpec(bits=3, group_size=128), 3.125),
        (LinearSpec(bits=3, group_size=128, kind="asymmetric"), 3.1875),
        (LinearSpec(bits=3, group_size=128, high_share=1 / 16), 3.25),
    ],
)
def test_bits_per_weight_of_a_large_linear(spec: LinearSpec, expected: float) -> None:
    assert spec.bits_per_weight(4096, 4096) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("word", [None, *INPUTS])
@pytest.mark.parametrize("kind", ["int8", "fp8", "int", "codebook", "nf4"])
def test_rows_of_bytes_and_rounded_inputs(kind: Any, word: str | None) -> None:
    inputs = None if word is None else INPUTS[word]
    sizes = {"codebook": (8, 0), "nf4": (4, 64), "int": (8, 64)}
    bits, size = sizes.get(kind, (8, 192))
    spec = LinearSpec(bits=bits, group_size=size, kind=kind, inputs=inputs)
    codes = random_codes(spec, 48, 192)
    if inputs is not None:
        static = torch.tensor([0.5], dtype=torch.bfloat16) if inputs.scale == "tensor" else None
        zero = None if inputs.symmetric else torch.tensor([-3], dtype=torch.int8)
        codes = replace(codes, inputs=InputQuantizer(inputs, static, zero))
    tensors = stored.tensors_of("m.q", codes)
    layout = stored.layout_of("m.q", spec, (48, 192), "BF16")
    assert {n: (TORCH_DTYPES[d], s) for n, (d, s) in layout.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()
    }
    assert spec.storage_bits(48, 192) == sum(8 * t.numel() * t.element_size() for t in tensors.values())
    for shown in (tensors, stored.misshapen(tensors)):
        found = stored.codes_of("m.q", spec, shown.__getitem__)
        assert torch.equal(found.codes, codes.codes)
        assert found.inputs == codes.inputs
    if kind in ("int8", "fp8"):
        assert tuple(stored.misshapen(tensors)["m.q.weight"].shape) == (48 * 192, 1)
        values = tensors["m.q.weight"].float() * tensors["m.q.weight_scale"].float()
        assert torch.equal(codes.dequantize().nan_to_num(9.0), values.nan_to_num(9.0))
        with pytest.raises(InputError, match="not what its format needs"):
            stored.codes_of("m.q", spec, {**tensors, "m.q.weight": torch.zeros(48, 191, dtype=torch.int8)}.__getitem__)


def test_input_scales_that_are_no_scale_are_refused() -> None:
    spec = INPUTS["int8"]
    for scale in (torch.tensor([1.0, 2.0]), torch.tensor([math.nan]), torch.zeros(1)):
        tensors = {"q.input_scale": scale, "q.input_zero_point": torch.zeros(1, dtype=torch.int8)}
        with pytest.raises(InputError, match="not one number"):
            stored.inputs_of("q", spec, tensors.__getitem__)


@pytest.mark.parametrize(
    "wrong",
    [
        {"bits": 4, "kind": "fp8"},
        {"symmetric": False, "kind": "fp8"},
        {"symmetric": False, "scale": "token"},
        {"bits": 6},
    ],
)
def test_formats_of_inputs_that_are_none_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        InputSpec(**wrong)
    with pytest.raises(ValidationError):
        LinearSpec(bits=4, group_size=64, kind="int8")
