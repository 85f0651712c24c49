"""nf4 and fp4 against bitsandbytes, bit for bit, and against a slow search for the nearest value."""

import warnings

import pytest
import torch
from torch import Tensor

from llmcompress.kernels import fourbit

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from bitsandbytes import functional as theirs

SHAPES = [(64, 64), (48, 352), (7, 172), (33, 77), (1, 5), (256, 512), (512, 1024)]
KINDS = ("nf4", "fp4")


def matrix(shape: tuple[int, int], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Heavy-tailed weights with a block of zeros and exact table values among them."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) ** 3 * 0.02
    flat = weight.view(-1)
    flat[64:128] = 0
    flat[128:132] = torch.tensor([0.0, -0.0, 1e-3, -1e-3])[: max(len(flat) - 128, 0)]
    return weight.to(dtype)


def their_weights(packed: Tensor, state: theirs.QuantState) -> Tensor:
    """What bitsandbytes makes of it, as one long row: on CPU 0.50 misreads rows that are not whole blocks."""
    shape, state.shape, state.dtype = state.shape, torch.Size((1, state.shape.numel())), torch.float32
    return theirs.dequantize_4bit(packed, state).view(shape)


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal to the last bit, signs of zeros aside."""
    return one.dtype == other.dtype and torch.equal(one + 0.0 if one.is_floating_point() else one, other)


@pytest.mark.parametrize("kind", KINDS)
def test_tables_are_those_of_bitsandbytes(kind: str) -> None:
    assert torch.equal(fourbit.table_of(kind), theirs.get_4bit_type(kind, device="cpu"))
    assert torch.equal(fourbit.dynamic_table(), theirs.create_dynamic_map())


def test_nf4_is_made_of_normal_quantiles() -> None:
    tail = 0.9677083
    normal = torch.distributions.Normal(0.0, 1.0)
    above = normal.icdf(torch.linspace(tail, 0.5, 9, dtype=torch.float64)[:-1])
    below = -normal.icdf(torch.linspace(tail, 0.5, 8, dtype=torch.float64)[:-1])
    values = torch.cat([above, below, torch.zeros(1, dtype=torch.float64)]).sort().values
    assert torch.allclose(fourbit.table_of("nf4").double(), values / values.max(), atol=2e-7, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_and_scales_are_those_of_bitsandbytes(kind: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = matrix(shape, dtype=dtype)
    packed, state = theirs.quantize_4bit(weight, blocksize=64, quant_type=kind)
    codes, absmax = fourbit.quantize_blocks(weight, kind, 64)
    assert torch.equal(fourbit.pack_nibbles(codes, kind), packed)
    assert torch.equal(absmax, state.absmax)
    assert same_bits(fourbit.dequantize_blocks(codes, absmax, kind, 64), their_weights(packed, state))
    assert torch.equal(fourbit.unpack_nibbles(packed, *shape), codes)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_double_scales_are_those_of_bitsandbytes(kind: str, shape: tuple[int, int]) -> None:
    weight = matrix(shape, seed=1)
    packed, state = theirs.quantize_4bit(weight, blocksize=64, quant_type=kind, compress_statistics=True)
    codes, absmax = fourbit.quantize_blocks(weight, kind, 64)
    double = fourbit.double_quantize(absmax)
    assert torch.equal(fourbit.pack_nibbles(codes, kind), packed)
    told = double.absmax.repeat_interleave(256)[: len(absmax)] > 0  # where all scales are equal, no code means anything
    assert torch.equal(double.codes[told], state.absmax[told])
    assert torch.equal(double.absmax, state.state2.absmax)
    assert torch.equal(double.offset, state.offset)
    assert same_bits(fourbit.dequantize_blocks(codes, double.decode(), kind, 64), their_weights(packed, state))


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_nearest(kind: str) -> None:
    weight = matrix((16, 128), seed=2)
    codes, absmax = fourbit.quantize_blocks(weight, kind, 64)
    every = fourbit.table_of(kind)[:, None, None] * absmax.repeat_interleave(64).view(16, 128)
    least = (every - weight).abs().amin(0)
    ours = (fourbit.dequantize_blocks(codes, absmax, kind, 64) - weight).abs()
    assert bool((ours <= least * (1 + 1e-5) + 1e-9).all())


def test_double_codes_are_nearest_but_for_the_lattice() -> None:
    absmax = torch.rand(5000, generator=torch.Generator().manual_seed(3)) + 0.1
    double = fourbit.double_quantize(absmax)
    wide = double.absmax.repeat_interleave(256)[:5000]
    wanted = (absmax - double.offset) / wide
    distances = (fourbit.dynamic_table()[None] - wanted[:, None]).abs()
    ours = distances.gather(1, double.codes.long()[:, None])[:, 0]
    assert bool((ours <= distances.amin(1) + 2 / 65535).all())
    assert float((double.decode() - absmax).abs().max()) < 0.01


@pytest.mark.parametrize(("kind", "expected"), [("nf4", 0.00843), ("fp4", 0.01483)])
@pytest.mark.parametrize("double", [False, True])
def test_gaussian_distortion(kind: str, expected: float, double: bool) -> None:
    weight = torch.randn(1024, 512, generator=torch.Generator().manual_seed(4))
    codes, absmax = fourbit.quantize_blocks(weight, kind, 64)
    if double:
        absmax = fourbit.double_quantize(absmax).decode()
    error = fourbit.dequantize_blocks(codes, absmax, kind, 64) - weight
    assert float(error.square().mean()) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_on_the_grid_is_exact(kind: str) -> None:
    weight = fourbit.table_of(kind).repeat(4)[None] * 0.37
    codes, absmax = fourbit.quantize_blocks(weight, kind, 64)
    assert torch.equal(fourbit.dequantize_blocks(codes, absmax, kind, 64), weight)
