"""Scales and rounding: the table of Gaussian distortions, and laws."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcompress.compress.grid import find_scale, full_range_scale, group_size_for, round_weight
from llmcompress.types import LinearSpec


def error_of(weight: torch.Tensor, spec: LinearSpec, *, clip: bool) -> torch.Tensor:
    scale = find_scale(weight, spec, torch.float32, clip=clip)
    return round_weight(weight, scale, spec).dequantize() - weight


@pytest.mark.parametrize(
    ("bits", "group", "expected"),
    [
        (2, 32, 0.136),
        (2, 128, 0.146),
        (3, 32, 0.0321),
        (3, 64, 0.0360),
        (3, 128, 0.0382),
        (4, 32, 0.0077),
        (4, 128, 0.0103),
    ],
)
def test_gaussian_distortion_is_no_worse_than_the_published_table(bits: int, group: int, expected: float) -> None:
    weight = torch.randn(2048, 256, generator=torch.Generator().manual_seed(0))
    error = error_of(weight, LinearSpec(bits=bits, group_size=group), clip=True)
    measured = float(error.square().mean() / weight.square().mean())
    assert expected * 0.75 < measured < expected * 1.02


def test_largest_weight_lands_on_the_extra_code() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    spec = LinearSpec(bits=3, group_size=128)
    codes = round_weight(weight, find_scale(weight, spec, torch.float32, clip=False), spec)
    place = weight.abs().argmax(1)
    assert bool((codes.codes[torch.arange(64), place] == 0).all())
    assert torch.allclose(codes.dequantize()[torch.arange(64), place], weight[torch.arange(64), place])


def test_clip_search_never_hurts() -> None:
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(2)) ** 3
    for bits in (2, 3, 4, 6, 8):
        spec = LinearSpec(bits=bits, group_size=64)
        clipped = error_of(weight, spec, clip=True).view(64, 2, 64).square().sum(-1)
        plain = error_of(weight, spec, clip=False).view(64, 2, 64).square().sum(-1)
        assert bool((clipped <= plain + 1e-9).all())


def test_importance_moves_error_to_columns_that_matter_less() -> None:
    weight = torch.randn(256, 64, generator=torch.Generator().manual_seed(3))
    importance = torch.cat([torch.full((32,), 100.0), torch.ones(32)])
    spec = LinearSpec(bits=2, group_size=64)
    scale = find_scale(weight, spec, torch.float32, importance=importance)
    weighted = ((round_weight(weight, scale, spec).dequantize() - weight).square() * importance).sum()
    assert weighted <= (error_of(weight, spec, clip=True).square() * importance).sum()


@given(st.sampled_from([torch.bfloat16, torch.float16]), st.floats(1e-12, 1e6), st.integers(2, 8))
@settings(max_examples=60, deadline=None)
def test_scales_are_never_zero_or_infinite(dtype: torch.dtype, size: float, bits: int) -> None:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(4)) * size
    weight[0] = 0
    spec = LinearSpec(bits=bits, group_size=32)
    scale = find_scale(weight, spec, dtype)
    assert scale.dtype == dtype
    assert bool(torch.isfinite(scale).all())
    assert bool((scale != 0).all())
    assert bool((round_weight(weight, scale, spec).dequantize()[0] == 0).all())


def test_rounding_what_is_on_the_grid_is_exact() -> None:
    scale = torch.tensor([[0.5, -0.25]])
    codes = torch.arange(8, dtype=torch.float32).repeat(2)[None]
    weight = (codes - 4) * scale.repeat_interleave(8, 1)
    spec = LinearSpec(bits=3, group_size=8)
    assert torch.equal(round_weight(weight, scale, spec).dequantize(), weight)


def test_full_range_scale_signs() -> None:
    assert full_range_scale(torch.tensor([[1.0, -4.0, 2.0]]), 3).tolist() == [1.0]
    assert full_range_scale(torch.tensor([[1.0, 4.0, 2.0]]), 3).tolist() == [-1.0]


@pytest.mark.parametrize(("columns", "size"), [(256, 128), (64, 64), (352, 32), (172, None), (192, 64)])
def test_group_size_falls_back(columns: int, size: int | None) -> None:
    assert group_size_for(columns, 128) == size
