"""The order of codes in memory and the PTX that reads it, held against slow Python. Needs no Triton."""

import re
import struct
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcompress.errors import InputError
from llmcompress.kernels.fourbit import table_of
from llmcompress.kernels.triton import bits as order
from llmcompress.kernels.triton import tuning
from llmcompress.kernels.triton.layout import packing_of, planar_words
from llmcompress.spec import LinearSpec

Words = numpy.ndarray


def slow_field(words: list[int], field: int, bits: int) -> int:
    """The code of one field, from one word of each plane, by the table in `bits.py`."""
    if bits != 3:
        return words[0] >> (field * bits) & ((1 << bits) - 1)
    if field < 12:
        return words[field // 4] >> (4 * (field % 4)) & 7
    return sum((words[plane] >> (4 * (field - 12) + 3) & 1) << plane for plane in range(3))


@given(st.sampled_from(sorted(order.RUNS)), st.integers(1, 700), st.integers(0, 2**32 - 1), st.data())
@settings(max_examples=60, deadline=None)
def test_every_code_is_where_the_table_says(bits: int, columns: int, seed: int, data: st.DataObject) -> None:
    run = order.Planar(bits, data.draw(st.sampled_from(order.RUNS[bits])))
    codes = torch.randint(1 << bits, (2, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    words = planar_words(codes, run).to(torch.int32) & 0xFFFF
    assert words.shape == (2, run.blocks(columns) * run.planes * run.words)
    assert words.shape[1] * 16 == run.blocks(columns) * run.block * bits, "a code takes its bits and no more"
    for k in [0, columns - 1, data.draw(st.integers(0, columns - 1))]:
        block, inside = divmod(k, run.block)
        field, place = divmod(inside, run.words)
        for row in range(2):
            found = [int(words[row, (block * run.planes + plane) * run.words + place]) for plane in range(run.planes)]
            assert slow_field(found, field, bits) == int(codes[row, k])


def floats(words: Words, kind: str) -> Words:
    """The two halves of words, as float32 `(words, 2)`."""
    halves = words.astype(numpy.uint32).view(numpy.uint16).reshape(-1, 2)
    if kind == "fp16":
        return halves.view(numpy.float16).astype(numpy.float32)
    return (halves.astype(numpy.uint32) << 16).view(numpy.float32)


def back(values: Words, kind: str) -> Words:
    """Inverse of `floats`; nothing may be lost, so that rounding is never needed."""
    if kind == "fp16":
        halves = values.astype(numpy.float16).view(numpy.uint16)
    else:
        halves = (values.astype(numpy.float32).view(numpy.uint32) >> 16).astype(numpy.uint16)
    found = numpy.ascontiguousarray(halves).view(numpy.uint32).reshape(-1)
    assert (floats(found, kind) == values).all(), "not exact"
    return found


def permuted(low: Words, high: Words, chosen: Words) -> Words:
    """Byte n of the result is the one of eight that nibble n of `chosen` names."""
    both = low.astype(numpy.uint64) | high.astype(numpy.uint64) << 32
    found = numpy.zeros(numpy.broadcast(both, chosen).shape, dtype=numpy.uint64)
    for byte in range(4):
        name = (chosen >> (4 * byte) & 15).astype(numpy.uint64)
        assert (name < 8).all(), "the eighth bit would repeat a sign"
        found |= (both >> (8 * name) & 0xFF) << (8 * byte)
    return found.astype(numpy.uint32)


def run_ptx(text: str, operands: dict[str, Words], kind: str) -> dict[str, Words]:
    """Execute the handful of instructions that `centred_ptx` uses; unknown ones raise."""
    registers = dict(operands)
    for line in text.strip("{}\n").replace("\n", "").split(";"):
        if not line or line.startswith(".reg"):
            continue
        name, rest = line.split(" ", 1)
        target, *sources = [word.strip() for word in rest.split(",")]
        if name == "mov.u32":
            assert sources == ["%lanemask_lt"]
            registers[target] = numpy.uint32(0x7FFFFFFF)
            continue
        values = [registers[s] if s in registers else numpy.uint32(int(s, 0)) for s in sources]
        if name == "mov.b32":
            registers[target] = numpy.broadcast_to(values[0], next(iter(operands.values())).shape)
        elif name == "shr.u32":
            registers[target] = values[0] >> values[1]
        elif name == "lop3.b32":
            assert int(values[3]) == 0xEA, "(a & b) | c"
            registers[target] = (values[0] & values[1]) | values[2]
        elif name == "and.b32":
            registers[target] = values[0] & values[1]
        elif name == "xor.b32":
            registers[target] = values[0] ^ values[1]
        elif name == "prmt.b32":
            registers[target] = permuted(values[0], values[1], values[2])
        elif name in ("fma.rn.bf16x2", "fma.rn.f16x2"):
            assert name == f"fma.rn.{order.PACKED[kind]}"
            left, right, third = (floats(value, kind).astype(numpy.float64) for value in values)
            registers[target] = back(left * right + third, kind)
        else:
            raise AssertionError(name)
    return registers


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
@pytest.mark.parametrize("bits", sorted(order.FIELDS))
def test_assembly_centres_every_code_exactly(bits: int, kind: str) -> None:
    """All 16-bit words in the lower half, their complements in the upper; with three planes a large sample."""
    planes, fields = order.PLANES[bits], order.FIELDS[bits]
    low = numpy.arange(1 << 16, dtype=numpy.uint32)
    shuffles = numpy.random.default_rng(0)
    halves = [low if plane == 0 else shuffles.permutation(low) for plane in range(planes)]
    operands = {f"${fields + plane}": half | ((half ^ 0xFFFF) << 16) for plane, half in enumerate(halves)}
    found = run_ptx(order.centred_ptx(bits, kind), operands, kind)
    for field in range(fields):
        values = floats(found[f"${field}"], kind)
        for side in (0, 1):
            words = [half ^ (0xFFFF if side else 0) for half in halves]
            wanted = numpy.array(slow_field(words, field, bits), dtype=numpy.int64) - (1 << (bits - 1))
            assert (values[:, side] == wanted).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_assembly_looks_every_code_up(kind: str, dtype: torch.dtype) -> None:
    patterns = [value & 0xFFFF for value in table_of(kind).to(dtype).view(torch.int16).tolist()]
    words = numpy.arange(1 << 16, dtype=numpy.uint32)
    words |= (words ^ 0xA5C3) << 16
    found = run_ptx(order.table_ptx(patterns), {"$4": words}, "")
    for field in range(4):
        for code in range(2):
            wanted = numpy.array(patterns, dtype=numpy.uint32)[words >> (8 * field + 4 * code) & 15]
            assert (found[f"${field}"] >> (16 * code) & 0xFFFF == wanted).all()


def test_paired_codes_are_neighbours() -> None:
    """The eight codes of two words, read as one, are those of two columns in the four fields, side by side."""
    run = order.Planar(4, 32, paired=True)
    codes = torch.randint(16, (3, 200), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    words = planar_words(codes, run).view(torch.int32)
    padded = torch.nn.functional.pad(codes, (0, run.blocks(200) * run.block - 200))
    for column in range(0, 200, 7):
        block, inside = divmod(column, run.block)
        field, place = divmod(inside, run.words)
        both = words[:, (block * run.words + place) // 2]
        assert torch.equal((both >> (8 * field + 4 * (place % 2))) & 15, padded[:, column].to(torch.int32))


def test_assembly_reads_only_registers_it_declares() -> None:
    for bits in order.FIELDS:
        for kind in order.MANTISSA:
            text = order.centred_ptx(bits, kind)
            declared = set(re.search(r"\.reg \.b32 ([^;]*);", text)[1].split(", "))  # type: ignore[index]
            words = set(re.findall(r"(?<![.\w])[a-z]+\b(?!\.)", re.sub(r"\.reg[^;]*;", "", text)))
            assert {w for w in words if not w.startswith(("mov", "shr", "lop", "fma"))} <= declared


def test_orders_waste_little_and_keep_groups_whole() -> None:
    for bits in order.RUNS:
        for group in (0, 32, 64, 128):
            for columns in (4096, 5120, 11008, 14336):
                found = order.planar(bits, group, columns)
                assert found is not None
                assert found.blocks(columns) * found.block <= order.WASTE * columns
                assert group % found.words == 0
    for group in (40, 48):
        assert order.planar(4, group, 4800) is None, "no run divides it"
    assert order.planar(5, 128, 4096) is None


def test_tables_are_read_and_damaged_ones_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for device, table in tuning.read_shipped().items():
        assert re.fullmatch(r"sm_\d\d", device)
        for row in table.values():
            assert {int(most) for most in row} <= {*tuning.BUCKETS, *tuning.MANY}
            assert all(getattr(config, "tokens", 16) <= max(int(most), 16) for most, config in row.items())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tuning.user_table("NVIDIA H200 / 141GB")
    assert path == tmp_path / "llmcompress" / "kernels" / "nvidia-h200-141gb.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"int4": {"8": [64, 8, 2, 4, 3]}}')
    assert tuning.read_table(path) == {"int4": {"8": tuning.Config(64, 8, 2, 4, 3)}}
    path.write_text('{"int4": {"8": [4]}}')
    assert tuning.read_table(path) == {"int4": {"8": tuning.Lean(4)}}
    for damaged in ("[64, 8]", "[5]", "[]"):
        path.write_text(f'{{"int4": {{"8": {damaged}}}}}')
        with pytest.raises(InputError, match="not a table"):
            tuning.read_table(path)


def test_programs_fill_the_processors_in_equal_parts() -> None:
    packing = packing_of(LinearSpec(bits=4, group_size=128), 4096)
    filled = tuning.fill(tuning.rule(packing, 8), packing, (4096, 1), 132)
    tiles = 4096 // filled.rows
    assert packing.planar is not None
    assert packing.planar.blocks(4096) % filled.split == 0
    assert 66 <= tiles * filled.split <= 2 * 132
    assert tuning.fill(tuning.rule(packing, 8), packing, (151936, 1), 132).split == 1


def test_halves_are_what_struct_says() -> None:
    value = struct.unpack("<f", struct.pack("<I", 0x43080000))[0]
    assert floats(numpy.array([0x43084308]), "bf16").tolist() == [[value, value]]
