"""The C library's searches, rounding and packing against torch, bit for bit, at every level of instructions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmcompress.compress.grid import CLIPS, find_scale_plainly, lane_sum, round_plainly, shrinks
from llmcompress.kernels import compiled, native_grid, reference
from llmcompress.kernels.native_grid import Wanted
from llmcompress.spec import LinearSpec

pytestmark = pytest.mark.skipif(compiled.library()[0] is None, reason="there is no C compiler")
LEVELS = sorted(native_grid.LEVELS.values())
MAGNITUDES = (1.0, 1e-3, 1e-8, 1e-20, 1e-37, 1e-39, 1e-43, 1e30, 1e38)


def same_bits(left: Tensor | None, right: Tensor) -> bool:
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[right.element_size()]
    return left is not None and left.dtype == right.dtype and torch.equal(left.view(whole), right.view(whole))


@st.composite
def weights(draw: st.DrawFn) -> tuple[Tensor, int]:
    """A weight with rows of zeros, equal values, outliers, infinities and denormals, and a size of its groups."""
    size = draw(st.sampled_from([1, 8, 24, 32, 64, 128, 172, 300]))
    rows, groups = draw(st.integers(1, 19)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    weight = torch.randn(rows, groups * size, generator=generator) * draw(st.sampled_from(MAGNITUDES))
    for row in range(rows):
        kind = draw(st.sampled_from(["plain", "plain", "zeros", "equal", "outlier", "infinite", "sparse", "bfloat16"]))
        if kind == "zeros":
            weight[row] = -0.0
        elif kind == "equal":
            weight[row] = weight[row, 0] * weight[row].sign()
        elif kind == "outlier":
            weight[row, -1] *= 30
        elif kind == "infinite":
            weight[row, 0] = -math.inf
        elif kind == "sparse":
            weight[row] *= torch.rand(groups * size, generator=generator) < 0.1
        elif kind == "bfloat16":
            weight[row] = weight[row].bfloat16().float()
    return torch.nan_to_num(weight, nan=0.0, posinf=math.inf, neginf=-math.inf), size


@given(weights(), st.integers(2, 8), st.sampled_from(list(native_grid.DTYPES)), st.booleans(), st.booleans())
@settings(max_examples=120, deadline=None)
def test_scales_and_codes_are_torchs(
    case: tuple[Tensor, int], bits: int, dtype: torch.dtype, weighted: bool, clip: bool
) -> None:
    weight, size = case
    clips = shrinks(clip)
    importance = torch.rand(weight.shape[1], generator=torch.Generator().manual_seed(bits)) if weighted else None
    spec = LinearSpec(bits=bits, group_size=size)
    scale = find_scale_plainly(weight, spec, dtype, clips=clips, importance=importance)
    codes = round_plainly(weight, scale, bits)
    restored, packed = reference.dequantize(codes, scale, bits), reference.pack(codes, bits)
    for level in LEVELS:
        found = native_grid.find_steps(weight, Wanted(bits, size, dtype, clips), importance, level=level)
        assert same_bits(found, scale)
        assert same_bits(native_grid.nearest_codes(weight, scale, bits, level=level), codes)
        assert same_bits(native_grid.weights_of(codes, scale, bits, level=level), restored)
        assert same_bits(native_grid.pack(codes, bits, level=level), packed)
        assert same_bits(native_grid.unpack(packed, bits, weight.shape[1], level=level), codes)


@pytest.mark.parametrize("level", LEVELS)
def test_results_do_not_depend_on_the_number_of_threads(level: int) -> None:
    weight = torch.randn(300, 384, generator=torch.Generator().manual_seed(0))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            scale = native_grid.find_steps(weight, Wanted(4, 128, torch.bfloat16, CLIPS), level=level)
            assert scale is not None
            codes = native_grid.nearest_codes(weight, scale, 4, level=level)
            assert codes is not None
            found.append((scale, codes, native_grid.squared_errors(weight, codes, scale, 4, level=level)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(left, right) for one in found[1:] for left, right in zip(one, found[0], strict=True))


@given(weights(), st.integers(2, 8))
@settings(max_examples=30, deadline=None)
def test_errors_are_those_of_float64(case: tuple[Tensor, int], bits: int) -> None:
    weight, size = case
    weight = torch.nan_to_num(weight, posinf=0, neginf=0)
    weight /= weight.abs().amax().clamp_min(1e-30)
    scale = find_scale_plainly(
        weight, LinearSpec(bits=bits, group_size=size), torch.bfloat16, clips=CLIPS, importance=None
    )
    codes = round_plainly(weight, scale, bits)
    apart = reference.dequantize(codes, scale, bits).double() - weight.double()
    wanted = torch.stack([apart.square().sum(1), weight.double().square().sum(1)], 1)
    for level in LEVELS:
        found = native_grid.squared_errors(weight, codes, scale, bits, level=level)
        assert found is not None
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-12)


def test_what_is_not_a_number_is_left_to_torch() -> None:
    weight = torch.ones(2, 64)
    weight[1, 40] = math.nan
    assert native_grid.find_steps(weight, Wanted(4, 32, torch.bfloat16, CLIPS)) is None
    assert native_grid.nearest_codes(weight, torch.ones(2, 2), 4) is None
    assert native_grid.find_steps(weight.double(), Wanted(4, 32, torch.bfloat16, CLIPS)) is None
    assert native_grid.find_steps(weight[:0], Wanted(4, 32, torch.bfloat16, CLIPS)) is None


def test_groups_that_do_not_divide_a_row_are_left_to_torch() -> None:
    weight = torch.ones(2, 64)
    assert native_grid.find_steps(weight, Wanted(4, 24, torch.bfloat16, CLIPS)) is None
    assert native_grid.nearest_codes(weight, torch.ones(2, 3), 4) is None


def test_slices_and_transposed_weights() -> None:
    whole = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    for weight in (whole.T, whole[:, 32:]):
        found = native_grid.find_steps(weight, Wanted(4, 32, torch.float32, CLIPS))
        spec = LinearSpec(bits=4, group_size=32)
        assert same_bits(
            found, find_scale_plainly(weight.contiguous(), spec, torch.float32, clips=CLIPS, importance=None)
        )


@given(st.integers(1, 70), st.integers(0, 1 << 30))
@settings(max_examples=60, deadline=None)
def test_lanes_add_in_their_order(count: int, seed: int) -> None:
    values = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    lanes = [torch.zeros(()) for _ in range(16)]
    for place, value in enumerate(values):
        lanes[place % 16] = lanes[place % 16] + value
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = [left + right for left, right in zip(lanes[:half], lanes[half:], strict=True)]
    assert float(lane_sum(values)) == float(lanes[0])


@pytest.mark.parametrize("weighted", [False, True])
def test_the_last_bit_of_a_sum_decides_alike(weighted: bool) -> None:
    """Between two weights under which torch chooses different scales lie neighbours that differ in one bit."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(300, 40, generator=generator)
    importance = torch.rand(40, generator=generator) if weighted else None
    spec, wanted = LinearSpec(bits=3, group_size=40), Wanted(3, 40, torch.bfloat16, CLIPS)

    def steps(moving: Tensor) -> Tensor:
        weight[:, 0] = moving.view(torch.float32)
        return find_scale_plainly(weight, spec, torch.bfloat16, clips=CLIPS, importance=importance)

    low, high = torch.full((300,), 0.1).view(torch.int32), torch.full((300,), 1.5).view(torch.int32)
    first = steps(low)
    for _ in range(26):
        middle = low + (high - low) // 2
        same = (steps(middle) == first)[:, 0]
        low, high = torch.where(same, middle, low), torch.where(same, high, middle)
    for apart in range(-12, 13):
        scale = steps(low + apart)
        for level in LEVELS:
            assert same_bits(native_grid.find_steps(weight, wanted, importance, level=level), scale)


@pytest.mark.parametrize("dtype", list(native_grid.DTYPES))
def test_steps_that_are_lost_to_rounding(dtype: torch.dtype) -> None:
    """Where smaller ranges have no step left, they get the smallest normal number, which is larger."""
    least = float(torch.finfo(dtype).smallest_normal) * torch.finfo(dtype).eps
    weight = torch.randn(400, 16, generator=torch.Generator().manual_seed(4)) * torch.linspace(0.2, 40, 400)[:, None]
    weight *= least
    for bits in (2, 4, 8):
        scale = find_scale_plainly(weight, LinearSpec(bits=bits, group_size=16), dtype, clips=CLIPS, importance=None)
        for level in LEVELS:
            assert same_bits(native_grid.find_steps(weight, Wanted(bits, 16, dtype, CLIPS), level=level), scale)


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 1 << 30), st.sampled_from([0.0, 1e3]))
@settings(max_examples=60, deadline=None)
def test_moments_and_counts_are_those_of_float64(rows: int, columns: int, seed: int, shift: float) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) + shift
    exact = weight.double()
    mean, deviation = float(exact.mean()), float(exact.std(correction=0))
    apart = exact - mean
    squares = (exact - exact.mean(1, keepdim=True)).square().sum(1)
    for level in LEVELS:
        found, sides = (
            native_grid.moments(weight, level=level),
            native_grid.beyond(weight, mean, deviation, level=level),
        )
        assert found is not None
        assert sides is not None
        assert torch.allclose(found, torch.stack([exact.mean(1), squares], 1), rtol=1e-12, atol=1e-12)
        assert sides.tolist() == torch.stack([apart > deviation, apart < -deviation], 2).sum(1).tolist()
    assert native_grid.moments(weight.T) is None or min(weight.shape) == 1
