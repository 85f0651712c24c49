"""The contract every quantizer keeps, and what GPTQ is."""

from typing import Literal

import pytest
import torch
from torch import Tensor

from llmcompress.compress import sequential
from llmcompress.compress.descent import metric_of
from llmcompress.compress.feedback import Integers, Loop, damped, inverse_factor, round_columns
from llmcompress.compress.grid import expand_scale, find_scale, proxy_loss, round_weight
from llmcompress.compress.rounding import Quantized, Request, Seen
from llmcompress.plugins import available, find
from llmcompress.types import LinearSpec, QuantizerOptions

PACKAGE = "llmcompress.compress.quantizers"
OPTIONS = QuantizerOptions()
INTEGERS = [name for name in available(PACKAGE) if not hasattr(find(PACKAGE, name), "formats")]


def problem(columns: int = 128, tokens: int = 512, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A random weight and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(48, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    inputs = torch.randn(tokens, columns, generator=generator) @ mixing
    return weight, inputs.T @ inputs / tokens


def quantized(
    name: str,
    weight: Tensor,
    hessian: Tensor,
    spec: LinearSpec,
    options: QuantizerOptions = OPTIONS,
    dtype: torch.dtype = torch.bfloat16,
) -> Quantized:
    """One weight alone."""
    (found,) = find(PACKAGE, name).quantize([Request(weight, spec)], Seen(hessian), options=options, dtype=dtype)
    assert isinstance(found, Quantized)
    return found


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_contract(name: str, bits: int) -> None:
    weight, hessian = problem()
    spec = LinearSpec(bits=bits, group_size=64)
    codes = quantized(name, weight.clone(), hessian, spec).codes
    assert codes.codes.dtype == torch.uint8
    assert codes.codes.shape == weight.shape
    assert int(codes.codes.max()) < 2**bits
    assert codes.scale.shape == (48, 2)
    assert codes.scale.dtype == torch.bfloat16
    assert float((codes.dequantize() - weight).square().mean()) < 0.5 * 4.0 ** (1 - bits) + 0.15
    again = quantized(name, weight, hessian, spec).codes
    assert torch.equal(codes.codes, again.codes)


@pytest.mark.parametrize("name", INTEGERS)
def test_error_falls_with_width(name: str) -> None:
    weight, hessian = problem()
    losses = []
    for bits in (2, 3, 4, 6, 8):
        spec = LinearSpec(bits=bits, group_size=128)
        codes = quantized(name, weight, hessian, spec).codes
        losses.append(proxy_loss(weight, codes.dequantize(), hessian))
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("order", ["act", "group", "plain"])
def test_gptq_beats_rounding_on_correlated_inputs(bits: int, order: Literal["act", "group", "plain"]) -> None:
    weight, hessian = problem()
    spec = LinearSpec(bits=bits, group_size=64)
    codes = quantized("gptq", weight, hessian, spec, QuantizerOptions(order=order)).codes
    rounded = round_weight(weight, codes.scale, spec)
    ours = proxy_loss(weight, codes.dequantize(), hessian)
    assert ours < 0.9 * proxy_loss(weight, rounded.dequantize(), hessian)


def test_gptq_is_rounding_on_white_inputs() -> None:
    weight, _ = problem()
    spec = LinearSpec(bits=3, group_size=64)
    codes = quantized("gptq", weight, torch.eye(128), spec, dtype=torch.float32).codes
    assert torch.equal(codes.codes, round_weight(weight, codes.scale, spec).codes)


def slow_gptq(weight: Tensor, scale: Tensor, hessian: Tensor, bits: int) -> Tensor:
    """Column by column, re-solving the remaining columns exactly by least squares each time."""
    left, codes = weight.double().clone(), torch.zeros_like(weight)
    half = 2 ** (bits - 1)
    for column in range(weight.shape[1]):
        step = scale[:, column].double()
        codes[:, column] = torch.clamp(torch.round(left[:, column] / step) + half, 0, 2 * half - 1).float()
        error = left[:, column] - (codes[:, column].double() - half) * step
        rest = slice(column + 1, None)
        # the best move of the rest, given this column's error, is -H_rr^-1 H_rc * (-error)
        move = torch.linalg.solve(hessian[rest, rest].double(), hessian[rest, column].double())
        left[:, rest] += error[:, None] * move[None, :]
    return codes.to(torch.uint8)


def test_gptq_equals_exact_least_squares_feedback() -> None:
    weight, hessian = problem(columns=192, tokens=2000)  # more than one block of 128 columns
    spec = LinearSpec(bits=3, group_size=64)
    options = QuantizerOptions(order="plain")
    scale = find_scale(weight, spec, torch.float32)
    damped = hessian.double() + torch.eye(192).double() * options.damp * hessian.double().diagonal().mean()
    factor, notes = inverse_factor(hessian, torch.arange(192), options.damp)
    assert factor is not None
    assert notes == ()
    steps = expand_scale(scale, 192)
    grid = Integers(torch.full((len(weight),), 4.0), lambda start, stop, _: steps[:, start:stop])
    codes = round_columns(weight, factor.upper, Loop(grid.nearest, grid.enter))
    slow = slow_gptq(weight, expand_scale(scale, 192), damped, 3)
    assert float((codes != slow).float().mean()) < 2e-3  # a tie may fall either way in float32


@pytest.mark.parametrize("columns", [1, 2, 128, 129, 300, 517])
def test_the_factor_is_that_of_the_damped_inverse(columns: int) -> None:
    _, hessian = problem(columns=columns, tokens=2000)
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(columns))
    factor, notes = inverse_factor(hessian, order, 0.01)
    assert factor is not None
    assert notes == ()
    upper = factor.upper.double()
    assert torch.equal(upper, upper.triu())
    assert bool((upper.diagonal() > 0).all())
    wanted = torch.linalg.inv(damped(hessian, 0.01))[order][:, order]
    assert torch.allclose(wanted, upper.T @ upper, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_damped_hessian_in_another_order_is_the_same_and_the_hessian_stays(dtype: torch.dtype) -> None:
    _, hessian = problem()
    hessian[5], hessian[:, 5] = 0, 0  # never seen
    hessian, order = hessian.to(dtype), torch.randperm(128, generator=torch.Generator().manual_seed(1))
    before, mean = hessian.clone(), hessian.double().diagonal().mean()
    oracle = before.double().clone()
    oracle[5, 5] = mean
    oracle += torch.eye(128, dtype=torch.float64) * 0.01 * oracle.diagonal().mean()
    assert torch.allclose(damped(hessian, 0.01), oracle, rtol=1e-12, atol=0)
    assert torch.equal(damped(hessian, 0.01, order), damped(hessian, 0.01)[order][:, order])
    metric = metric_of(hessian, 0.01)
    assert metric.dtype == torch.float32
    assert torch.equal(metric, (damped(hessian, 0.01) / damped(hessian, 0.01).diagonal().clone().mean()).float())
    assert torch.equal(hessian, before)


@pytest.mark.parametrize("order", ["group", "act"])
def test_rows_of_a_large_weight_are_rounded_some_at_a_time(
    order: Literal["group", "act"], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, hessian = problem()
    options, spec = QuantizerOptions(order=order, sweeps=2), LinearSpec(bits=3, group_size=64)
    work, _ = sequential._work_of(Seen(hessian), 64, options, torch.bfloat16)
    assert work is not None
    (whole,) = work.round_plainly([Request(weight, spec)])
    monkeypatch.setattr(sequential, "BATCH_WEIGHTS", 10 * 128)
    (found,) = work.round_plainly([Request(weight, spec)])
    pieces = [work.round_plainly([Request(rows, spec)])[0] for rows in weight.split(12)]
    assert torch.equal(found.codes, torch.cat([x.codes for x in pieces]))
    assert torch.equal(found.scale, torch.cat([x.scale for x in pieces]))
    assert float((found.codes != whole.codes).float().mean()) < 2e-3  # a tie may fall either way in float32


def test_dead_inputs_are_rounded_not_zeroed() -> None:
    weight, hessian = problem()
    hessian[5], hessian[:, 5] = 0, 0
    spec = LinearSpec(bits=4, group_size=64)
    result = quantized("gptq", weight, hessian, spec)
    assert result.fallbacks == ()
    assert float((result.codes.dequantize()[:, 5] - weight[:, 5]).abs().max()) < 1.0
    assert float(result.codes.dequantize()[:, 5].abs().sum()) > 0


def test_singular_hessians_are_damped_and_recorded() -> None:
    weight, _ = problem()
    hopeless = -torch.eye(128) * 0.05
    hopeless[0, 0] = 6.5
    spec = LinearSpec(bits=4, group_size=64)
    raised = quantized("gptq", weight, hopeless + torch.eye(128) * 0.0499, spec)
    assert bool((raised.codes.codes < 16).all())
    broken = torch.full((128, 128), float("nan"))
    result = quantized("gptq", weight, broken, spec)
    assert "not finite" in result.fallbacks[0]
    off_diagonal = torch.ones(128, 128) * 50 + torch.eye(128) * (1 - 50)
    result = quantized("gptq", weight, off_diagonal, spec)
    assert "singular at damping" in result.fallbacks[0]
    indefinite = torch.ones(128, 128) * 1.3 + torch.eye(128) * (1 - 1.3)
    result = quantized("gptq", weight, indefinite, spec)
    assert "damping raised to 1" in result.fallbacks[0]


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("order", ["act", "group"])
def test_together_is_one_by_one(name: str, order: Literal["act", "group"]) -> None:
    """Linears that read one input, and formats of one linear, do not disturb one another."""
    weight, hessian = problem()
    other = torch.randn(16, 128, generator=torch.Generator().manual_seed(5))
    specs = [LinearSpec(bits=bits, group_size=size) for bits, size in ((2, 64), (3, 128), (4, 64), (8, 64))]
    requests = [Request(w, spec) for w in (weight, other) for spec in specs]
    options = QuantizerOptions(order=order, iterations=5)
    together = find(PACKAGE, name).quantize(requests, Seen(hessian), options=options, dtype=torch.bfloat16)
    for request, found in zip(requests, together, strict=True):
        alone = quantized(name, request.weight, hessian, request.spec, options).codes
        assert found.codes.spec == request.spec
        assert torch.equal(found.codes.scale, alone.scale)
        assert float((found.codes.codes != alone.codes).float().mean()) < 2e-3  # a tie may fall either way
