"""Rounded inputs and products of integers, against one number at a time and against 64-bit integers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmcompress.kernels.inputs import InputQuantizer
from llmcompress.kernels.integers import MOST_COLUMNS, IntegerWeight, exact_matmul
from llmcompress.spec import INPUTS, InputSpec

QUICK = settings(max_examples=25, deadline=None)


def quantizer(spec: InputSpec, scale: float = 0.05, zero: int = -37) -> InputQuantizer:
    """A quantizer with figures of its own where the format has them."""
    static = torch.tensor([scale], dtype=torch.bfloat16) if spec.scale == "tensor" else None
    half = 1 << (spec.bits - 1)
    return InputQuantizer(
        spec, static, None if spec.symmetric else torch.tensor([zero % half - half // 2]).to(torch.int8)
    )


def slow_value(value: float, scale: float, spec: InputSpec, zero: int) -> float:
    """What one number becomes, from the words of the documentation."""
    if spec.kind == "int":
        half = 1 << (spec.bits - 1)
        return (max(-half, min(half - 1, round(value / scale + zero))) - zero) * scale
    exponent = max(math.floor(math.log2(abs(value / scale))) if value else -6, -6)
    step = 2.0 ** (exponent - 3)
    return max(-448.0, min(448.0, round(value / scale / step) * step)) * scale


@pytest.mark.parametrize("word", INPUTS)
def test_rounded_inputs_are_what_the_documentation_says(word: str) -> None:
    spec = INPUTS[word]
    inputs = torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(0)) * 2
    inputs[0, 1] = 0
    rounder = quantizer(spec)
    found = rounder(inputs)
    zero = 0 if rounder.zero is None else int(rounder.zero)
    wrong = 0
    for token, row in zip(inputs.flatten(0, 1).double(), found.flatten(0, 1), strict=True):
        most = 448.0 if spec.kind == "fp8" else ((1 << spec.bits) - 1) / 2
        scale = float(token.abs().max()) / most or 1.0
        scale = float(rounder.scale) if rounder.scale is not None else scale
        wanted = torch.tensor([slow_value(float(value), scale, spec, zero) for value in token])
        wrong += int(((row - wanted).abs() > 1e-5 * wanted.abs() + 1e-6).sum())
    assert wrong <= 2  # a tie may fall either way in float32: a token's largest number is one
    assert torch.equal(found[0, 1], torch.zeros(48))
    assert rounder(inputs.bfloat16()).dtype == torch.bfloat16


def test_rounding_passes_gradients() -> None:
    inputs = torch.randn(4, 8, requires_grad=True)
    weights = torch.randn(4, 8)
    rounder = quantizer(INPUTS["int4"])
    (rounder(inputs) * weights).sum().backward()
    assert torch.equal(inputs.grad, weights)
    assert torch.allclose(rounder(inputs), rounder(inputs.detach()), atol=1e-6)


@QUICK
@given(st.integers(1, 40), st.integers(1, 300), st.integers(1, 40), st.integers(0, 9))
def test_products_are_exact(tokens: int, columns: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randint(-128, 128, (tokens, columns), generator=generator).to(torch.int8)
    right = torch.randint(-128, 128, (rows, columns), generator=generator).to(torch.int8)
    found = exact_matmul(left, right)
    assert not found.is_floating_point()
    assert torch.equal(found.long(), left.long() @ right.long().T)


@pytest.mark.parametrize("columns", [MOST_COLUMNS, MOST_COLUMNS + 1, 2 * MOST_COLUMNS + 5])
def test_no_sum_overflows(columns: int) -> None:
    lowest = torch.full((2, columns), -128, dtype=torch.int8)
    assert exact_matmul(lowest, lowest).tolist() == [[columns << 14] * 2] * 2


def made(seed: int, rows: int = 24, columns: int = 96) -> tuple[IntegerWeight, Tensor, Tensor]:
    """An integer weight, what it stands for, and inputs for it."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(256, (rows, columns), generator=generator).to(torch.uint8)
    scale = (torch.randn(rows, 1, generator=generator) * 0.01).to(torch.bfloat16)
    inputs = torch.randn(3, 7, columns, generator=generator)
    return IntegerWeight.of(codes, scale), (codes.double() - 128) * scale.double(), inputs


@pytest.mark.parametrize("word", [word for word, spec in INPUTS.items() if spec.kind == "int"])
@pytest.mark.parametrize("seed", range(3))
def test_integer_linears_agree_with_rounded_inputs(word: str, seed: int) -> None:
    weight, values, inputs = made(seed)
    rounder = quantizer(INPUTS[word])
    found = weight.multiply(inputs, rounder)
    codes, scale = rounder.codes(inputs)
    zero = 0 if rounder.zero is None else int(rounder.zero)
    exact = (codes.long() - zero) @ weight.codes.long().T
    assert torch.equal(found, exact.float() * (scale * weight.scale))
    slow = (codes.double() - zero) * scale.double() @ values.T
    assert torch.allclose(found.double(), slow, rtol=3e-7, atol=1e-9)
    assert torch.allclose(found, rounder(inputs) @ values.float().T, rtol=1e-4, atol=2e-6)
