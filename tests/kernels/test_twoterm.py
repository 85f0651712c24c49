"""Inputs as two bytes each, in CUDA C++: on a CPU as in `test_nvrtc.py`, in machine code, and where it is chosen."""

import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton_cases
from gpu_weights import needs_gpu, on_gpu
from on_host import built, given, needs_compiler
from torch import Tensor

from llmcompress.kernels import stored
from llmcompress.kernels.nvrtc import compiler, small
from llmcompress.kernels.triton import layout, tuning
from llmcompress.kernels.triton.tuning import Lean
from llmcompress.spec import LinearSpec

HERE = Path(__file__).resolve().parent
MOST_STACK = 16  # bytes of a thread that are not in registers, outside the loop
OF_BUDGET = 0.7  # instructions of the loop over those an H200 issues while the weights arrive
BFLOAT, HALF = torch.bfloat16, torch.float16
GENERATOR = torch.Generator().manual_seed(7)
ENTRIES = """
extern "C" void all_twoterm(int blocks_x, const u16 *x, const u16 *words, const void *scale, const u8 *zero,
    const float *table, u16 *out, int M, int N, int K, int stride, int blocks) {
    run(blocks_x, 1, [=] { twoterm(x, words, scale, zero, table, out, M, N, K, stride, blocks); });
}
extern "C" int input_bytes() { return INPUT; }
extern "C" int slot_bytes() { return SLOT; }
"""
FRAGMENTS = """
extern "C" void product(const u32 *weights, const u32 *inputs, int *sums) {
    run(1, 1, [=] {
        const int lane = threadIdx.x;
        u32 of[4];
        int own[4] = {1, 2, 3, 4};
        std::memcpy(of, weights + 4 * lane, sizeof of);
        multiply_bytes(own, of, inputs[2 * lane], inputs[2 * lane + 1]);
        std::memcpy(sums + 4 * lane, own, sizeof own);
    });
}
"""
# bits, group (0: the row), zero-points; rows (whole tiles of 16 or not), columns (whole blocks or not); inputs, tokens
# and slots
Case = tuple[int, int, bool, int, int, torch.dtype, int, int]
CASES: list[Case] = [
    (2, 64, False, 48, 4032, BFLOAT, 1, 4),  # the last block has a slot that none had before
    (2, 32, True, 37, 2016, HALF, 2, 2),
    (2, 128, True, 48, 4096, HALF, 4, 3),
    (3, 64, True, 48, 2496, BFLOAT, 4, 2),
    (3, 128, False, 37, 3968, HALF, 3, 2),
    (3, 0, True, 32, 1016, HALF, 1, 2),
    (4, 32, False, 48, 2016, BFLOAT, 4, 2),
    (4, 64, True, 37, 2496, HALF, 1, 3),
    (4, 128, False, 48, 3968, HALF, 4, 2),
    (4, 256, True, 48, 3840, BFLOAT, 2, 2),
    (4, 128, False, 32, 256, BFLOAT, 2, 3),  # a warp without a block
    (8, 0, False, 37, 4040, BFLOAT, 3, 2),
    (8, 320, True, 32, 3200, HALF, 2, 2),
    (8, 64, False, 48, 1984, HALF, 3, 3),
]


def spec_of(case: Case) -> LinearSpec:
    bits, group, zero, _, columns, *_ = case
    return LinearSpec(bits=bits, group_size=group or columns, kind="asymmetric" if zero else "int")


def inputs_of(case: Case) -> Tensor:
    """A few columns a thousand times as large, and half of the first token zeros."""
    columns, dtype, tokens = case[4:7]
    x = torch.randn((tokens, columns), generator=GENERATOR) / columns
    x[:, torch.randperm(columns, generator=GENERATOR)[: columns // 300]] *= 1000
    x[0, : columns // 2] = 0  # a scale of 0
    return x.to(dtype)


def rounded(x: Tensor, packing: layout.Packing) -> Tensor:
    """What two bytes hold of inputs, in float64, one scale to 128 columns at most."""
    assert packing.planar is not None
    size = min(packing.group or packing.planar.block, packing.planar.block, small.PART)
    parts = torch.nn.functional.pad(x.double(), (0, -x.shape[1] % size)).unflatten(1, (-1, size))
    step = parts.abs().amax(-1, keepdim=True) / (256 * 127 + 127)
    whole = (parts / step.where(step > 0, torch.ones(()))).round()
    return (whole * step).flatten(1)[:, : x.shape[1]]


@needs_compiler
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[:3])))
def test_values_are_those_of_rounded_inputs_and_stored_codes(case: Case, tmp_path: Path) -> None:
    """To the last bit of most outputs, as near the true product as 16-bit outputs are, and NaN where an input is."""
    _, _, _, height, columns, dtype, tokens, slots = case
    spec = spec_of(case)
    codes = triton_cases.random_codes(spec, height, columns)
    prepared, packing = layout.prepare(stored.tensors_of("", codes), spec), layout.packing_of(spec, columns)
    assert packing.planar is not None
    assert packing.planar.words >= small.SHORTEST
    config, scale, whole = Lean(2, slots, terms=2), prepared["scale"], height % small.ROWS == 0
    made = small.definitions(packing, dtype, scale.dtype, tokens=tokens, config=config, whole=whole)
    library = built(tmp_path, (*made, ("RUN_AHEAD", 1)), "host_ptx.h", ("codes", "ring", "twoterm"), ENTRIES)
    blocks = packing.planar.blocks(columns)
    shared = 2 * slots * library.slot_bytes() + tokens * (blocks * library.input_bytes() + 16)
    assert shared == small.shared_bytes(packing, scale.dtype, tokens=tokens, config=config, whole=whole)

    def product(x: Tensor, thread_blocks: int) -> Tensor:
        out = torch.full((tokens, height), float("nan"), dtype=dtype)
        weight = (prepared["words"], scale, prepared.get("zero"), None)
        numbers = (tokens, height, columns, prepared["words"].shape[1], blocks)
        library.all_twoterm(*given(thread_blocks, x, *weight, out, *numbers))
        return out

    x, dense = inputs_of(case), codes.dequantize().double()
    found = product(x, -(-height // 16))
    assert triton_cases.error(found, x.double() @ dense.T) <= {BFLOAT: 4e-3, HALF: 6e-4}[dtype]
    assert (
        triton_cases.error(found, (rounded(x, packing) @ dense.T).to(dtype).double())
        <= {BFLOAT: 4e-4, HALF: 1e-4}[dtype]
    )
    assert all(torch.equal(found, product(x, number)) for number in (1, 2))
    x[-1, columns // 3] = float("nan")
    spoiled = product(x, 2)
    assert spoiled[-1].isnan().all()
    assert torch.equal(spoiled[:-1], found[:-1])


def places(shape: Sequence[tuple[int, int]]) -> Tensor:
    """What a layout of (size, stride), the fastest first, makes of 0, 1, ..."""
    found = torch.zeros(1, dtype=torch.long)
    for size, stride in shape:
        found = (torch.arange(size)[:, None] * stride + found).flatten()
    return found


@needs_compiler
def test_fragments_lie_as_another_library_has_them(tmp_path: Path) -> None:
    """By CuTe's layouts of this instruction: lane, then value, to a place in a matrix, columns first."""
    made = tuple({"WARPS": 1, "BFLOAT": 1}.items())
    library = built(tmp_path, made, "host_ptx.h", (), FRAGMENTS)
    weights = torch.randint(256, (16, 32), generator=GENERATOR, dtype=torch.uint8)
    inputs = torch.randint(-128, 128, (8, 32), generator=GENERATOR, dtype=torch.int8)
    lanes = {"A": ((4, 64), (8, 1)), "B": ((4, 32), (8, 1)), "C": ((4, 32), (8, 1))}
    values = {"A": ((4, 16), (2, 8), (2, 256)), "B": ((4, 8), (2, 128)), "C": ((2, 16), (2, 8))}
    at = {name: places(lanes[name])[:, None] + places(values[name]) for name in lanes}
    spread = [whole.T.flatten()[at[name]].contiguous() for name, whole in (("A", weights), ("B", inputs))]
    sums = torch.zeros((32, 4), dtype=torch.int32)
    library.product(*given(*spread, sums))
    found = torch.zeros(16 * 8, dtype=torch.int32)
    found[at["C"].flatten()] = (sums - torch.tensor([1, 2, 3, 4])).flatten().int()
    assert torch.equal(found.view(8, 16).T.long(), weights.long() @ inputs.long().T)


@pytest.mark.skipif(compiler.library() is None, reason="NVRTC is not installed")
@pytest.mark.skipif(not triton_cases.HAS_TRITON, reason="Triton, which has the disassembler, is not installed")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_machine_code_for_gpus_that_are_not_here(architecture: str) -> None:
    """Everything is in registers, nothing goes from memory there in the loop, and instructions do not limit it."""
    sys.path.insert(0, str(HERE.parents[1] / "bench"))
    import kernels_static

    capability = int(architecture[3:])
    for bits, zero, tokens in ((2, False, 1), (2, True, 4), (3, True, 1), (4, False, 1), (8, True, 4)):
        spec = LinearSpec(bits=bits, group_size=128, kind="asymmetric" if zero else "int")
        config = Lean(8, 2, int(capability == 90), 2)
        found = kernels_static.compile_lean(spec, config, capability, tokens)
        row = kernels_static.lean_row(found, spec, config, capability)
        assert row.stack <= MOST_STACK
        assert row.matrix.startswith("IMMA.16832.U8.S8")
        assert row.per_weight <= OF_BUDGET * row.budget
        assert not any(name in line for line in found.loop for name in ("LDG.", "LDL", "STL"))
        assert any("LDGSTS" in line for line in found.loop)


H200 = SimpleNamespace(
    name="H200", major=9, minor=0, multi_processor_count=132, shared_memory_per_multiprocessor=228 << 10
)
A40 = SimpleNamespace(
    name="A40", major=8, minor=6, multi_processor_count=84, shared_memory_per_multiprocessor=100 << 10
)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A GPU that is not there, of which only properties are asked."""
    found = SimpleNamespace(**vars(H200))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    kept = (small.possible, small._resident, tuning.choose, tuning._tables)
    for function in kept:
        function.cache_clear()
    yield found
    for function in kept:
        function.cache_clear()


def test_a_table_says_for_how_many_tokens(
    device: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The least number in it that holds them; without one nothing asks for two terms."""
    packing, cuda = layout.packing_of(LinearSpec(bits=4, group_size=128), 4096), torch.device("cuda")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuning.choose(packing, 4096, 1, cuda, True) == Lean(8)
    path = tuning.user_table(device.name)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"int4 4096x4096": {"1": [8, 3, 1, 2], "4": [4, 2, 0, 2], "8": [8]}}))
    tuning.choose.cache_clear()
    tuning._tables.cache_clear()
    wanted = {1: Lean(8, 3, 1, 2), 2: Lean(4, 2, 0, 2), 4: Lean(4, 2, 0, 2), 5: Lean(8), 8: Lean(8)}
    assert {tokens: tuning.choose(packing, 4096, tokens, cuda, True) for tokens in wanted} == wanted
    assert not isinstance(tuning.choose(packing, 4096, 1, cuda, False), Lean), "as for float32 inputs"
    for damaged in ("[8, 2, 0, 3]", "[8, 2, 0, 0]", "[8, 2, 0, true]"):
        path.write_text(f'{{"int4": {{"1": {damaged}}}}}')
        with pytest.raises(tuning.InputError, match="not a table"):
            tuning.read_table(path)


def test_what_there_is_no_room_for_is_multiplied_as_it_is(device: SimpleNamespace) -> None:
    cuda, wide = torch.device("cuda"), layout.packing_of(LinearSpec(bits=4, group_size=128), 28672)
    asked = Lean(8, 2, 1, 2)
    assert small.possible(asked, wide, 1, cuda) == asked
    assert small.possible(asked, wide, 4, cuda) == Lean(8, 2, 1), "more than a thread block may have"
    narrow = layout.packing_of(LinearSpec(bits=4, group_size=128), 4096)
    assert small.possible(asked, narrow, 4, cuda) == asked
    assert small.possible(asked, narrow, 5, cuda).terms == 1
    nf4 = layout.packing_of(LinearSpec(bits=4, group_size=64, kind="nf4"), 4096)
    assert small.possible(asked, nf4, 1, cuda).terms == 1
    vars(device).update(vars(A40))
    small.possible.cache_clear()
    assert small.possible(asked, narrow, 1, cuda) == Lean(8, 2, 0, 2)
    middle = layout.packing_of(LinearSpec(bits=4, group_size=128), 11008)
    assert small.possible(asked, middle, 4, cuda) == Lean(8, 2)


def test_a_launch_keeps_as_many_thread_blocks_as_there_is_room_for(
    device: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    kernel = SimpleNamespace(launch=lambda how, _: seen.append(how))
    monkeypatch.setattr(small, "kernel", lambda name, made, _: seen.append((name, dict(made))) or kernel)
    spec, columns = LinearSpec(bits=4, group_size=128), 4096
    packing = layout.packing_of(spec, columns)
    prepared = layout.prepare(stored.tensors_of("", triton_cases.random_codes(spec, 32, columns)), spec)
    for rows in (32, 1 << 15):
        for config, tokens in ((Lean(8, 2, terms=2), 1), (Lean(8, 4, terms=2), 4), (Lean(8, 2), 9)):
            small.multiply(torch.zeros((tokens, columns), dtype=BFLOAT), prepared, packing, rows, config)
            (name, made), how = seen[-2:]
            assert name == ("decode", "twoterm")[config.terms - 1]
            assert made["TILES"] == (2 if tokens == 9 else 1)
            tiles = -(-rows // 16)
            assert how.grid == (min(tiles, 132 * {(2, 1): 3, (2, 4): 2}.get((config.terms, tokens), tiles)), 1)
            assert how.shared == small.shared_bytes(packing, BFLOAT, tokens=tokens, config=config, whole=True)
    seen.clear()
    x = torch.zeros((1, columns), dtype=BFLOAT)
    for weight in (prepared, prepared, prepared | {"words": prepared["words"].clone()}):
        small.multiply(x, weight, packing, 32, Lean(8, 2, 1))
    assert [how.early for how in seen[1::2]] == [True, True, False], "what writes a weight may still run"


@pytest.mark.skipif(not triton_cases.HAS_TRITON, reason="Triton is not installed")
def test_tuning_takes_rounded_inputs_and_no_worse_ones() -> None:
    """Its limit is above the error of two terms and below what a byte at a wrong place makes."""
    from llmcompress.kernels.triton import trial, tune

    packing = layout.packing_of(LinearSpec(bits=4, group_size=128), 4096)
    x, weight = torch.randn((8, 4096), generator=GENERATOR), torch.randn((300, 4096), generator=GENERATOR)
    wanted = x.to(BFLOAT).float() @ weight.T
    two = rounded(x.to(BFLOAT), packing).float()
    exchanged = two.unflatten(1, (-1, 2)).flip(-1).flatten(1)
    for dtype in (BFLOAT, HALF):
        assert trial.is_right(lambda _, dtype=dtype: (two @ weight.T).to(dtype), wanted)
        assert not trial.is_right(lambda _, dtype=dtype: (exchanged @ weight.T).to(dtype), wanted)
        assert not trial.is_right(lambda _, dtype=dtype: (two @ weight.T * 1.04).to(dtype), wanted)
    for kind, most, terms in (
        ("int", 1, {1, 2}),
        ("asymmetric", 4, {1, 2}),
        ("int", 8, {1}),
        ("nf4", 1, {1}),
    ):
        packing = layout.packing_of(LinearSpec(bits=4, group_size=64, kind=kind), 4096)
        found = [config for config in tune.candidates(packing, most, True) if isinstance(config, Lean)]
        assert {config.terms for config in found} == terms
        assert not any(isinstance(config, Lean) for config in tune.candidates(packing, most, False))


@needs_gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case[:3])))
def test_a_gpu_has_the_same_values(case: Case) -> None:
    _, _, _, height, columns, dtype, _, _ = case
    prepared, packing, dense = on_gpu(spec_of(case), height, columns)
    x = inputs_of(case)
    wanted = (rounded(x, packing) @ dense.T).to(dtype).double()
    for warps in (4, 8, 16):
        first, *others = (
            small.multiply(x.cuda(), prepared, packing, height, Lean(warps, slots, early, 2)).cpu()
            for slots, early in itertools.product((2, 3), (0, 1))
        )
        assert triton_cases.error(first, wanted) <= {BFLOAT: 4e-4, HALF: 1e-4}[dtype]
        assert all(torch.equal(first, other) for other in others)
