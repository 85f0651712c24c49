"""RepQuant: the algebra of its paper in float64, identical codes, and thresholds against slow searches."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from reparam_help import FAMILIES, block_subject, distance, tiny
from torch import Tensor

from llmcompress.compress.reparam.repquant import factors, rewrite, rewrite_gain, rewrite_linear
from llmcompress.compress.rewriting.clipping import (
    SHRINK_STEP,
    SHRINKS,
    ActivationQuantizer,
    find_quantizer,
    grid_clipping,
    learn_clipping,
    output_error,
    range_quantizer,
)
from llmcompress.compress.rewriting.edits import matrix
from llmcompress.compress.rewriting.exact import exact
from llmcompress.compress.rewriting.samples import input_samples
from llmcompress.compress.rewriting.sites import norm_sites
from llmcompress.compress.rewriting.work import Call
from llmcompress.options import ReparamOptions


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_algebra(bits: int, symmetric: bool) -> None:
    normed, gamma, beta = normal(400, 16), normal(16, seed=1).exp() * 3, normal(16, seed=2)
    weight, bias = normal(7, 16, seed=3), normal(7, seed=4)
    inputs = normed * gamma + (0 if symmetric else beta)
    channelwise = range_quantizer(inputs.amin(0), inputs.amax(0), bits, symmetric=symmetric)
    found = factors(channelwise)
    new_gamma, new_beta = rewrite_gain(gamma, torch.zeros(16) if symmetric else beta, found)
    new_weight, shift = rewrite_linear(weight, found)
    moved = normed * new_gamma + new_beta
    before, after = inputs @ weight.T + bias, moved @ new_weight.T + bias + shift
    assert float((before - after).abs().max()) < 1e-10
    assert found.target.scale.ndim == 0
    assert float(found.target.zero) == round(float(found.target.zero))
    assert torch.equal(channelwise.codes(inputs), found.target.codes(moved))
    # what the quantized linear computes is the same too
    left = channelwise(inputs) @ weight.T + bias
    right = found.target(moved) @ new_weight.T + bias + shift
    assert float((left - right).abs().max()) < 1e-9
    if symmetric:
        assert torch.equal(found.shift, torch.zeros(16, dtype=torch.float64))


def test_a_zero_point_that_is_not_rounded_changes_codes() -> None:
    inputs = normal(400, 15) * normal(15, seed=1).exp() + normal(15, seed=2)
    channelwise = range_quantizer(inputs.amin(0), inputs.amax(0), 8)
    wrong = ActivationQuantizer(channelwise.scale.mean(), channelwise.zero.mean(), 8)
    moved = inputs / (channelwise.scale / wrong.scale) + wrong.scale * (channelwise.zero - wrong.zero)
    assert not torch.equal(channelwise.codes(inputs), torch.round(wrong.codes(moved)))


def test_channels_that_agree_are_left() -> None:
    same = ActivationQuantizer(torch.full((5,), 0.25, dtype=torch.float64), torch.full((5,), 7.0), 4)
    found = factors(same)
    assert torch.equal(found.ratio, torch.ones(5, dtype=torch.float64))
    assert torch.equal(found.shift, torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"bias": True, "bits": 4}, {"clip": "grid", "bits": 5}])
def test_codes_in_a_block_are_the_channelwise_ones(family: str, options: dict[str, object]) -> None:
    asked = ReparamOptions.model_validate({"repquant": {"links": False, **options}})
    subject = block_subject(tiny(family))
    block = subject.module
    sites = norm_sites(block, subject.first)
    see = partial(input_samples, block, subject.calls, [site.readers[0] for site in sites])
    with exact():
        before = see(tokens=10**6, skip_first=True)
        result = rewrite(subject, asked)
        after = see(tokens=10**6, skip_first=True)
    assert set(result.quantizers) == {name for site in sites for name in site.readers}
    for site in sites:
        name = site.readers[0]
        whole = "bias" in options or family in ("gpt2", "opt", "neox")
        channelwise = find_quantizer(
            before[name],
            asked.repquant.bits,
            symmetric=not whole,
            clip=asked.repquant.clip,
            gram=torch.eye(before[name].shape[1], dtype=torch.float64),
        )
        assert len(channelwise.scale.unique()) > 1
        assert len({result.quantizers[reader] for reader in site.readers}) == 1
        codes = channelwise.codes(before[name])
        assert torch.equal(codes, result.quantizers[name].codes(after[name]))
        assert 3 < len(codes.unique()) <= 2**asked.repquant.bits


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("bias", [True, False])
def test_twice_is_once(family: str, bias: bool) -> None:
    asked = ReparamOptions.model_validate({"repquant": {"bias": bias, "links": False}})
    model = tiny(family)
    with exact():
        first = rewrite(block_subject(model), asked)
        once = {name: value.clone() for name, value in model.state_dict().items()}
        second = rewrite(block_subject(model), asked)
    assert model.state_dict().keys() == once.keys()
    for name, value in model.state_dict().items():
        assert distance(value, once[name]) < 1e-9 or torch.equal(value, once[name])
    for reader, quantizer in first.quantizers.items():
        assert float(second.quantizers[reader].scale) == pytest.approx(float(quantizer.scale))
        assert second.quantizers[reader].zero == quantizer.zero


def test_ranges_hold_zero_and_dead_channels_take_the_usual_scale() -> None:
    low, high = torch.tensor([1.0, -4.0, 0.0]), torch.tensor([3.0, -1.0, 0.0])
    found = range_quantizer(low, high, 2)
    assert found.scale.tolist() == pytest.approx([1.0, 4 / 3, 7 / 6])
    assert found.zero.tolist() == [0, 3, 0]
    even = range_quantizer(low, high, 3, symmetric=True)
    assert even.zero.tolist() == [4, 4, 4]
    assert even.scale.tolist() == [1.0, 1.0, 1.0]
    nothing = range_quantizer(torch.zeros(2), torch.zeros(2), 8)
    assert torch.equal(nothing(torch.zeros(3, 2)), torch.zeros(3, 2))


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_grid_is_a_slow_search(symmetric: bool) -> None:
    inputs = normal(60, 3) ** 3
    found = grid_clipping(inputs, 3, symmetric=symmetric)
    for channel in range(3):
        column = inputs[:, channel]
        losses = []
        for down in range(SHRINKS):
            for up in range(SHRINKS):
                low, high = column.min() * (1 - SHRINK_STEP * down), column.max() * (1 - SHRINK_STEP * up)
                quantizer = range_quantizer(low, high, 3, symmetric=symmetric)
                losses.append(float((quantizer(column) - column).square().sum()))
        ours = ActivationQuantizer(found.scale[channel], found.zero[channel], 3)
        assert float((ours(column) - column).square().sum()) == pytest.approx(min(losses))
        assert min(losses) < losses[0]


@pytest.mark.parametrize("symmetric", [False, True])
def test_learned_thresholds_are_never_worse_and_find_something(symmetric: bool) -> None:
    inputs = normal(200, 12) ** 3
    weight = normal(6, 12, seed=25) * normal(12, seed=6).exp()
    gram = weight.T @ weight
    plain = range_quantizer(inputs.amin(0), inputs.amax(0), 4, symmetric=symmetric)
    grid = grid_clipping(inputs, 4, symmetric=symmetric)
    learned = learn_clipping(inputs, 4, symmetric=symmetric, gram=gram)
    direct = ((learned(inputs) - inputs) @ weight.T).square().sum(1).mean()
    assert float(direct) == pytest.approx(output_error(inputs, learned, gram))
    assert output_error(inputs, learned, gram) < 0.98 * output_error(inputs, grid, gram)
    assert output_error(inputs, learned, gram) < output_error(inputs, plain, gram)
    still = find_quantizer(inputs, 4, symmetric=symmetric, clip="learn", gram=gram, steps=1)
    assert output_error(inputs, learned, gram) <= output_error(inputs, still, gram)


def test_norm_gains_are_what_the_block_holds() -> None:
    model = tiny("gemma")
    subject = block_subject(model)
    gain = subject.module.get_submodule("input_layernorm").weight.clone()  # type: ignore[operator, union-attr]
    column = matrix(subject.module.get_submodule("self_attn.q_proj")).clone()
    result = rewrite(subject, ReparamOptions())
    after = subject.module.get_submodule("input_layernorm").weight
    ratio = matrix(subject.module.get_submodule("self_attn.q_proj"))[0] / column[0]
    assert torch.allclose((1 + gain) / (1 + after), ratio)  # type: ignore[operator, arg-type]
    assert result.native


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_ranges_hold_what_unseen_tokens_do(family: str) -> None:
    """Channels that calls on absent tokens make larger than text does are rounded there as finely as elsewhere."""
    found = {}
    for known in (True, False):
        subject = block_subject(tiny(family))
        absent = Call((subject.first.args[0] * torch.linspace(-4, 4, subject.first.args[0].shape[-1]),), {})
        absent = Call(absent.args + subject.first.args[1:], subject.first.kwargs)
        subject = replace(subject, unseen=(absent,) if known else ())
        with exact():
            result = rewrite(subject, ReparamOptions())
            names = list(result.quantizers)
            after = input_samples(subject.module, [absent], names, tokens=10**6, skip_first=True)
        sites = norm_sites(subject.module, absent)
        worst = [
            float((result.quantizers[name](after[name]) - after[name]).abs().max() / result.quantizers[name].scale)
            for site in sites
            for name in site.readers
        ]
        found[known] = max(worst)
    assert found[True] <= 0.5 + 1e-4
    assert found[False] > 5
