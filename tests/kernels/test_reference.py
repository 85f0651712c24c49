"""Packing against a bit-by-bit oracle."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcompress.kernels.reference import dequantize, pack, unpack, words_per_row


def slow_pack(row: list[int], bits: int) -> list[int]:
    """One row, bit by bit: code j in bits [j * bits, (j + 1) * bits), words little-endian and signed."""
    whole = sum(code << (place * bits) for place, code in enumerate(row))
    words = []
    for word in range(words_per_row(len(row), bits)):
        value = (whole >> (32 * word)) & 0xFFFFFFFF
        words.append(value - (1 << 32) if value >= 1 << 31 else value)
    return words


@st.composite
def code_tables(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    bits = draw(st.integers(2, 8))
    columns = draw(st.integers(1, 70))
    row = st.lists(st.integers(0, 2**bits - 1), min_size=columns, max_size=columns)
    return bits, draw(st.lists(row, min_size=1, max_size=4))


@given(code_tables())
@settings(max_examples=150, deadline=None)
def test_pack_is_dense_and_little_endian(table: tuple[int, list[list[int]]]) -> None:
    bits, rows = table
    packed = pack(torch.tensor(rows, dtype=torch.uint8), bits)
    assert packed.dtype == torch.int32
    assert packed.tolist() == [slow_pack(row, bits) for row in rows]


@given(code_tables())
@settings(max_examples=150, deadline=None)
def test_unpack_inverts_pack(table: tuple[int, list[list[int]]]) -> None:
    bits, rows = table
    codes = torch.tensor(rows, dtype=torch.uint8)
    assert torch.equal(unpack(pack(codes, bits), bits, codes.shape[1]), codes)


def test_packed_width_is_exact_for_whole_words() -> None:
    assert words_per_row(32, 3) == 3
    assert words_per_row(33, 3) == 4
    assert words_per_row(128, 5) == 20


def test_dequantize_is_the_formula() -> None:
    codes = torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]], dtype=torch.uint8)
    scale = torch.tensor([[0.5, -2.0], [1.0, 0.25]], dtype=torch.bfloat16)
    expected = [[-1.0, -0.5, 0.0, -2.0], [1.0, 0.0, -0.25, -0.5]]
    assert dequantize(codes, scale, 2).tolist() == expected


def test_matches_compressed_tensors() -> None:
    """The format's own library reads what we pack."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32  # type: ignore[import-not-found]

    generator = torch.Generator().manual_seed(0)
    for bits in (2, 3, 4, 5, 6, 8):
        codes = torch.randint(2**bits, (7, 96), generator=generator, dtype=torch.uint8)
        theirs = unpack_from_int32(pack(codes, bits), bits, torch.Size((7, 96)))
        assert torch.equal(theirs.to(torch.int16) + 2 ** (bits - 1), codes.to(torch.int16))
