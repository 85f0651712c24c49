"""Attention weights in half octaves: the identity, the integer form, and padding inside real models."""

import pytest
import torch
from reparam_help import FAMILIES, tiny, tokens
from torch import Tensor
from transformers import AttentionInterface

from llmcompress.compress.rewriting.attention import quantized_softmax
from llmcompress.compress.rewriting.work import Call
from llmcompress.errors import InputError
from llmcompress.kernels.softmax import (
    accumulate,
    choose_scale,
    combine,
    log_codes,
    log_values,
    octave_values,
    zero_code,
)
from llmcompress.runtime.attention import NAME, AttentionRounding, install, rounding_attention, set_rounding


def weights(*shape: int, seed: int = 0) -> Tensor:
    scores = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 4
    return torch.softmax(scores, -1)


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_half_octaves_are_whole_octaves_with_a_scale_by_parity(bits: int) -> None:
    codes = torch.arange(2**bits + 1)
    values = log_values(codes, 0.7, bits)
    assert torch.allclose(values, octave_values(codes, 0.7, bits), rtol=4e-16, atol=0)
    assert bool((values.diff() < 0).all())
    assert float(values[0]) == 0.7
    assert float(values[zero_code(bits)]) == 0


def test_codes_round_in_the_exponent() -> None:
    a = torch.tensor([1.0, 0.5, 0.25, 0.26, 2**-7.5, 2**-7.74, 2**-7.76, 0.0])
    assert log_codes(a, 1.0, 4).tolist() == [0, 2, 4, 4, 15, 15, 16, 16]
    assert log_codes(a, 0.25, 4).tolist() == [0, 0, 0, 0, 11, 11, 12, 16]
    inside = weights(5, 40)
    error = log_values(log_codes(inside, 1.0, 8), 1.0, 8) / inside
    assert float(error.max()) <= 2**0.25 + 1e-12
    assert float(error.min()) >= 2**-0.25 - 1e-12


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_two_accumulators_of_shifts_are_the_product(bits: int) -> None:
    codes = log_codes(weights(2, 3, 9, 9), 0.9, bits)
    values = torch.randint(-128, 128, (2, 3, 9, 5), generator=torch.Generator().manual_seed(1))
    even, odd = accumulate(codes, values, bits)
    assert even.dtype == odd.dtype == torch.int64
    slow = torch.zeros(2, 3, 9, 5, dtype=torch.float64)
    for key in range(9):
        slow += log_values(codes[..., key], 0.9, bits)[..., None] * values[..., key, :][..., None, :]
    assert torch.allclose(combine(even, odd, 0.9, bits), slow, rtol=1e-12, atol=1e-12)
    assert bool(odd.any())
    assert bool(even.any())


def test_the_scale_is_the_best_quantile() -> None:
    seen = weights(400, 60).flatten()
    scale = choose_scale(torch.cat([seen, torch.zeros(10**5, dtype=torch.float64)]), 4)
    ordered = seen.sort().values
    candidates = [float(ordered[min(int(q * len(seen)), len(seen) - 1)]) for q in (0.999, 0.9999, 0.99999)]
    losses = [float((log_values(log_codes(seen, s, 4), s, 4) - seen).square().sum()) for s in candidates]
    assert scale == candidates[losses.index(min(losses))]
    assert choose_scale(torch.zeros(4), 4) == 1.0


def by_hand(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, bits: int) -> Tensor:
    """One query and one head at a time."""
    found = torch.zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3], dtype=torch.float64)
    for batch in range(query.shape[0]):
        for head in range(query.shape[1]):
            group = head // (query.shape[1] // key.shape[1])
            for place in range(query.shape[2]):
                scores = key[batch, group] @ query[batch, head, place] / query.shape[3] ** 0.5
                a = torch.softmax(scores + mask[batch, 0, place], 0)
                rounded = log_values(log_codes(a, 1.0, bits), 1.0, bits)
                found[batch, place, head] = rounded @ value[batch, group]
    return found


def test_attention_is_the_slow_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 5, 6, generator=generator, dtype=torch.float64)
    key, value = (torch.randn(2, 2, 5, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.full((5, 5), -torch.inf, dtype=torch.float64).triu(1).expand(2, 1, 5, 5)
    module = torch.nn.Identity()
    set_rounding(module, AttentionRounding(bits=3))
    output, _ = rounding_attention(module, query, key, value, mask)
    assert torch.allclose(output, by_hand(query, key, value, mask, 3), atol=1e-12)
    with pytest.raises(InputError, match="sinks"):
        rounding_attention(module, query, key, value, mask, s_aux=torch.zeros(4))


def padded() -> tuple[Tensor, Tensor, Tensor]:
    """A short sequence alone; the same left-padded beside a full one, with its mask."""
    full, short = tokens(5, 1, 10), tokens(6, 1, 6)
    batch = torch.cat([torch.cat([torch.full((1, 4), 2), short], 1), full])
    mask = torch.ones_like(batch)
    mask[0, :4] = 0
    return short, batch, mask


@torch.no_grad()
def padding_error(model: torch.nn.Module) -> float:
    """How far the padded sequence's logits are from those of the sequence alone."""
    short, batch, mask = padded()
    places = (mask.cumsum(1) - 1).clamp_min(0)
    alone = model(input_ids=short, use_cache=False).logits
    both = model(input_ids=batch, attention_mask=mask, position_ids=places, use_cache=False).logits
    return float((both[0, 4:] - alone[0]).abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_does_not_change_a_sequence(family: str) -> None:
    model = tiny(family).float()
    calls = [Call((), {"input_ids": tokens(1), "use_cache": False})]
    plain = model(input_ids=tokens(2), use_cache=False).logits
    before = model.config._attn_implementation
    with quantized_softmax(model, calls, 4) as scales:
        assert len(scales) == 2
        assert padding_error(model) < 1e-5
        coarse = model(input_ids=tokens(2), use_cache=False).logits
    assert model.config._attn_implementation == before
    assert 1e-5 < float((coarse - plain).abs().max()) < 0.5 * float(plain.abs().max())
    assert torch.equal(model(input_ids=tokens(2), use_cache=False).logits, plain)


def test_without_its_mask_padding_would_be_read() -> None:
    model = tiny("llama").float()
    install(model)
    AttentionInterface.register("unmasked", AttentionInterface()[NAME])
    model.set_attn_implementation("unmasked")
    assert padding_error(model) > 1e-3
    model.set_attn_implementation(NAME)
    assert padding_error(model) < 1e-5


def test_rounded_attention_passes_the_gradients_of_plain_attention() -> None:
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(1, 2, 4, 6, generator=generator, dtype=torch.float64) for _ in range(3))
    gradients = []
    for bits in (None, 8):
        module, asked = torch.nn.Identity(), query.clone().requires_grad_()
        set_rounding(module, AttentionRounding(bits=bits))
        output, _ = rounding_attention(module, asked, key, value, None)
        output.sum().backward()
        gradients.append(asked.grad)
    assert float(gradients[0].abs().max()) > 1e-2
    assert torch.allclose(gradients[1], gradients[0], atol=1e-12)
