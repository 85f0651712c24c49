"""A low-rank correction beside the codes: the best of its rank, true to the bit, part of the weight to every reader."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmcompress.compress.formats import exporter_of, maker
from llmcompress.compress.grid import proxy_loss
from llmcompress.compress.heal.tuning import Scaled
from llmcompress.compress.lowrank import factors_of, quantized
from llmcompress.compress.rounding import Request, Seen
from llmcompress.errors import InputError
from llmcompress.kernels import stored
from llmcompress.kernels.codes import Codes
from llmcompress.plugins import find
from llmcompress.runtime.modules import PackedLinear, buffer_name
from llmcompress.spec import LinearSpec
from llmcompress.types import QuantizerOptions

QUANTIZERS = "llmcompress.compress.quantizers"
SPECS = (
    LinearSpec(bits=3, group_size=32, rank=3),
    LinearSpec(bits=2, group_size=64, high_share=0.125, rank=1),
    LinearSpec(bits=4, group_size=32, kind="asymmetric", rank=5),
    LinearSpec(bits=2, group_size=0, kind="codebook", rank=2),
    LinearSpec(bits=3, group_size=64, rank=1000),  # more than there are rows
)
NAMES = {"int": "gptq", "asymmetric": "hqq", "codebook": "codebook"}


def problem(rows: int, columns: int, seed: int, tokens: int = 512) -> tuple[Tensor, Tensor]:
    """A random weight, and the mean of `x x^T` of correlated inputs; singular where tokens are fewer than columns."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    inputs = torch.randn(tokens, columns, generator=generator) @ mixing
    return weight, inputs.T @ inputs / tokens


def corrected(spec: LinearSpec, rows: int = 24, columns: int = 128) -> Codes:
    """What the quantizer of a format makes of a random weight."""
    weight, hessian = problem(rows, columns, 1)
    name = "twotier" if spec.high_share else NAMES[spec.kind]
    options, requests = QuantizerOptions(), [Request(weight, spec)]
    (found,) = quantized(find(QUANTIZERS, name), requests, Seen(hessian), options=options, dtype=torch.bfloat16)
    return found.codes


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 20), st.integers(2, 20), st.integers(1, 20), st.integers(0, 99))
def test_factors_leave_what_eckart_and_young_say(rows: int, columns: int, rank: int, seed: int) -> None:
    rank = min(rank, rows, columns)
    error, hessian = problem(rows, columns, seed)
    up, down = factors_of(error, hessian, rank, torch.float32)
    assert (up.shape, down.shape) == ((rows, rank), (rank, columns))
    values = torch.linalg.svdvals(error.double() @ torch.linalg.cholesky(hessian.double()))
    left = (error - up @ down).double()
    found = float((left @ hessian.double() * left).sum())
    assert found == pytest.approx(float(values[rank:].square().sum()), abs=1e-5 * float(values.square().sum()))


def test_a_singular_hessian_and_none_at_all() -> None:
    error, hessian = problem(12, 40, 0, tokens=7)
    up, down = factors_of(error, hessian, 7, torch.float32)  # seven tokens: rank seven leaves nothing of their outputs
    left = error - up @ down
    assert float((left @ hessian * left).sum()) < 1e-6 * float((error @ hessian * error).sum())
    up, down = factors_of(error, None, 3, torch.float32)
    tail = torch.linalg.svdvals(error)[3:].square().sum()
    assert float((error - up @ down).square().sum()) == pytest.approx(float(tail), rel=1e-4)
    up, down = factors_of(torch.zeros(4, 8), hessian[:8, :8], 2, torch.bfloat16)
    assert not (up.float() @ down.float()).any()


def test_loss_falls_with_rank() -> None:
    weight, hessian = problem(24, 128, 1)
    losses = [
        proxy_loss(weight, corrected(LinearSpec(bits=2, group_size=64, rank=rank)).dequantize(), hessian)
        for rank in (0, 1, 4, 16, 24)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1e-4 * losses[0]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: str(spec.label))
def test_files_hold_what_the_format_says(spec: LinearSpec) -> None:
    codes = corrected(spec)
    tensors = stored.tensors_of("linear", codes)
    layout = stored.layout_of("linear", spec, (24, 128), "BF16")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {name: shape for name, (_, shape) in layout.items()}
    assert 8 * sum(t.numel() * t.element_size() for t in tensors.values()) == spec.storage_bits(24, 128)
    again = stored.codes_of("linear", spec, lambda name: tensors[name])
    assert torch.equal(again.dequantize(), codes.dequantize())
    assert exporter_of([spec]).TAG == "llmcompress-native"


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: str(spec.label))
def test_packed_linears_add_it(spec: LinearSpec) -> None:
    codes = corrected(spec)
    bias = torch.nn.Parameter(torch.randn(24).half().float(), requires_grad=False)
    tensors = stored.tensors_of("", codes)
    linear = PackedLinear(spec, tensors, (24, 128), bias)
    saved = linear.half().float().state_dict()
    assert all(torch.equal(saved[buffer_name(part)], tensor) for part, tensor in tensors.items())
    x = torch.randn(5, 128)
    wanted = x @ codes.dequantize().T + bias
    assert torch.allclose(linear(x), wanted, atol=1e-3)
    assert torch.allclose(linear.dequantize(), codes.dequantize(), atol=1e-6)
    x.requires_grad_(True)
    linear(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, codes.dequantize().sum(0).expand(5, -1), atol=1e-3)


def test_healed_scales_leave_it_alone() -> None:
    codes = corrected(SPECS[0])
    scaled = Scaled(codes, transposed=False)
    change = codes.correction()
    assert change is not None
    ones = torch.ones_like(scaled.scale)
    assert torch.allclose(scaled(ones), codes.dequantize(), atol=1e-6)
    assert torch.allclose(scaled(2 * ones) - change, 2 * (scaled(ones) - change), atol=1e-6)


@pytest.mark.parametrize("name", ["adaround", "signround", "nf4", "fp8"])
def test_what_can_have_none_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"quantize\.correction_rank"):
        maker(find(QUANTIZERS, name), QuantizerOptions(correction_rank=2), 64)(4 if name == "nf4" else 8, 128)
