"""The kernels in CUDA C++, on a CPU: their own source compiled by the C++ compiler there is, warps of threads."""

import ctypes
import itertools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton_cases
from gpu_weights import needs_gpu, on_gpu
from on_host import built, given, needs_compiler
from torch import Tensor

from llmcompress.errors import MachineError
from llmcompress.kernels import stored
from llmcompress.kernels.nvrtc import compiler, small
from llmcompress.kernels.triton import layout
from llmcompress.kernels.triton.tuning import Lean
from llmcompress.spec import LinearSpec

HERE = Path(__file__).resolve().parent
WARPS = 2
MOST_STACK = 16  # bytes of a thread that are not in registers
BFLOAT, HALF = torch.bfloat16, torch.float16
ENTRIES = """
extern "C" void all_decode(int blocks_x, const u16 *x, const u16 *words, const void *scale, const u8 *zero,
    const float *table, u16 *out, int M, int N, int K, int stride, int blocks) {
    run(blocks_x, 1, [=] { decode(x, words, scale, zero, table, out, M, N, K, stride, blocks); });
}
extern "C" int slot_bytes() { return SLOT; }
extern "C" void all_expand(int blocks_x, int blocks_y, const u16 *words, const void *scale, const u8 *zero,
    const float *table, u16 *out, int first, int last, int N, int K, int stride, int blocks) {
    run(blocks_x, blocks_y, [=] { expand(words, scale, zero, table, out, first, last, N, K, stride, blocks); });
}
"""
CASES = [  # format, rows (whole tiles of 16 or not), columns (whole blocks or not), inputs, tokens, slots
    (LinearSpec(bits=2, group_size=64), 48, 4032, BFLOAT, 3, 4),  # the last block has a slot that none had before
    (LinearSpec(bits=2, group_size=32, kind="asymmetric"), 32, 2048, BFLOAT, 2, 3),
    (LinearSpec(bits=3, group_size=64, kind="asymmetric"), 48, 2496, HALF, 16, 2),
    (LinearSpec(bits=4, group_size=32), 37, 384, BFLOAT, 9, 2),
    (LinearSpec(bits=4, group_size=256, kind="asymmetric"), 48, 2816, HALF, 1, 4),
    (LinearSpec(bits=8, group_size=320), 37, 320, BFLOAT, 8, 3),
    (LinearSpec(bits=4, group_size=64, kind="nf4"), 48, 1600, BFLOAT, 5, 2),
]
Case = tuple[LinearSpec, int, int, torch.dtype, int, int]


def definitions(case: Case, packing: layout.Packing, scale: torch.dtype, config: Lean) -> compiler.Definitions:
    """As `small.multiply` would have them."""
    _, rows, _, dtype, tokens, _ = case
    return small.definitions(packing, dtype, scale, tokens=tokens, config=config, whole=rows % small.ROWS == 0)


@needs_compiler
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0].label)
def test_values_are_those_of_the_stored_codes(case: Case, tmp_path: Path) -> None:
    """However many thread blocks share the tiles."""
    spec, height, columns, dtype, tokens, slots = case
    codes = triton_cases.random_codes(spec, height, columns)
    prepared = layout.prepare(stored.tensors_of("", codes), spec)
    packing = layout.packing_of(spec, columns)
    assert packing.planar is not None
    assert packing.planar.words >= small.SHORTEST
    scale = prepared["scale"]
    made = definitions(case, packing, scale.dtype, Lean(WARPS, slots))
    library = built(tmp_path, (*made, ("RUN_AHEAD", 1)), "host_ptx.h", ("codes", "ring", "decode", "expand"), ENTRIES)
    assert library.slot_bytes() == small.slot_bytes(packing, scale.dtype, height % small.ROWS == 0)
    x = torch.randn((tokens, columns), generator=triton_cases.GENERATOR).to(dtype)
    weight = (prepared["words"], scale, prepared.get("zero"), prepared.get("table"))
    numbers = (columns, prepared["words"].shape[1], packing.planar.blocks(columns))
    dense, sums = codes.dequantize(), []
    for blocks in (-(-height // 16), 2, 1):
        out = torch.full((tokens, height), float("nan"), dtype=dtype)
        library.all_decode(*given(blocks, x, *weight, out, tokens, height, *numbers))
        limit = {BFLOAT: 4e-3, HALF: 6e-4}[dtype]
        assert triton_cases.error(out, x.double() @ dense.double().T) <= limit
        sums.append(out)
    assert all(torch.equal(sums[0], other) for other in sums)
    first, last = 3, 30
    rows = torch.full((last - first, columns), float("nan"), dtype=dtype)
    grid = (-(-(last - first) // 16), -(-numbers[-1] // WARPS))
    library.all_expand(*given(*grid, *weight, rows, first, last, height, *numbers))
    assert torch.equal(rows, dense[first:last].to(dtype))


@pytest.mark.skipif(compiler.library() is None, reason="NVRTC is not installed")
@pytest.mark.skipif(not triton_cases.HAS_TRITON, reason="Triton, which has the disassembler, is not installed")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_machine_code_for_gpus_that_are_not_here(architecture: str) -> None:
    """It compiles, keeps everything in registers, and has matrix instructions."""
    sys.path.insert(0, str(HERE.parents[1] / "bench"))
    import sass

    nvrtc = compiler.library()
    assert nvrtc is not None
    for number, case in enumerate(CASES):
        spec, columns = case[0], case[2]
        packing = layout.packing_of(spec, columns)
        scale = torch.float32 if spec.kind == "nf4" else torch.bfloat16
        made = definitions(case, packing, scale, Lean(8, 2, int(architecture == "sm_90")))
        name = ("decode", "expand")[number % 4 == 3]
        if name == "expand":
            made = tuple(small.order_definitions(packing, case[3], scale, small.EXPAND_WARPS).items())
        cubin = compiler.compiled(compiler.source_of(name), dict(made), architecture, nvrtc)
        code, uses = sass.disassembled(cubin)
        assert uses["STACK"] <= MOST_STACK
        assert ("HMMA" in code) == (name == "decode")
        if name == "decode":
            check_loop(sass.loop_with(code, "HMMA"))
        assert ("ACQBULK" in code) == (name == "decode" and architecture == "sm_90")


def check_loop(lines: Sequence[str]) -> None:
    """Nothing that comes from memory and not from a cache goes into registers: the loop would wait for it."""
    loads = [line for line in lines if "LDG" in line and "LDGSTS" not in line and "LDGDEPBAR" not in line]
    assert any("LDGSTS" in line for line in lines)
    assert any("DEPBAR.LE" in line for line in lines)
    assert all(".128" in line and ".NA" not in line for line in loads), loads  # inputs alone


@pytest.mark.skipif(compiler.library() is None, reason="NVRTC is not installed")
def test_what_was_compiled_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    nvrtc = compiler.library()
    assert nvrtc is not None
    source = b'extern "C" __global__ void kernel(int *x) { *x = NUMBER; }'
    made = compiler.cached(source, {"NUMBER": 7}, "sm_90", nvrtc)
    assert len(list(tmp_path.rglob("*.cubin"))) == 1
    monkeypatch.setattr(compiler, "compiled", lambda *_: pytest.fail("compiled again"))
    assert compiler.cached(source, {"NUMBER": 7}, "sm_90", nvrtc) == made
    monkeypatch.undo()
    with pytest.raises(MachineError, match="does not compile"):
        compiler.compiled(b"nonsense", {}, "sm_90", nvrtc)


DRIVER = r"""
#include <cstring>
struct Attribute { int what; char pad[4]; union { char bytes[64]; int number; } value; };
struct Config { unsigned grid[3], block[3], shared; void *stream; Attribute *attributes; unsigned count; };
static int allowed;
extern "C" {
int seen[12];
int cuModuleLoadData(void **module, const void *) { *module = (void *)0x100000001; return 0; }
int cuModuleGetFunction(void **handle, void *module, const char *name) {
    *handle = (void *)((size_t)module + 1);
    return strcmp(name, "kernel");
}
int cuFuncSetAttribute(void *handle, int what, int value) {
    if (what == 8) allowed = value;
    return 0;
}
int cuLaunchKernel(void *handle, unsigned x, unsigned y, unsigned z, unsigned a, unsigned b, unsigned c,
                   unsigned shared, void *stream, void **given, void **) {
    const int all[12] = {(int)x, (int)y, (int)z, (int)a, (int)b, (int)c, (int)shared, stream == (void *)0x200000007,
                         *(int *)given[0], handle == (void *)0x100000002, -1, allowed};
    memcpy(seen, all, sizeof all);
    return 0;
}
int cuLaunchKernelEx(const Config *how, void *handle, void **given, void **extra) {
    const unsigned *g = how->grid, *b = how->block;
    cuLaunchKernel(handle, g[0], g[1], g[2], b[0], b[1], b[2], how->shared, how->stream, given, extra);
    seen[10] = how->count == 1 && how->attributes->what == 6 ? how->attributes->value.number : -2;
    return 0;
}
}
"""


@needs_compiler
def test_a_launch_says_what_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a driver that writes down what it is told, with the layouts of cuda.h."""
    source, target = tmp_path / "driver.cpp", tmp_path / "driver.so"
    source.write_text(DRIVER)
    subprocess.run(["g++", "-w", "-shared", "-fPIC", str(source), "-o", str(target)], check=True)
    driver = ctypes.CDLL(str(target))
    monkeypatch.setattr(compiler.ctypes, "CDLL", lambda _: driver)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0x200000007))
    function = compiler.Function(b"code", "kernel")
    seen = (ctypes.c_int * 12).in_dll(driver, "seen")
    for early, shared, allowed in ((False, 0, 0), (True, 70000, 70000), (False, 300, 70000)):
        function.launch(compiler.Launch((3, 5), 64, shared, early), [ctypes.c_int(42)])
        assert list(seen) == [3, 5, 1, 64, 1, 1, shared, 1, 42, 1, 1 if early else -1, allowed]


@needs_gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0].label)
def test_a_gpu_has_the_same_values(case: Case) -> None:
    """The sums of any number of slots, early or not, are those of the same number of warps."""
    spec, height, columns, dtype, tokens, _ = case
    prepared, packing, dense = on_gpu(spec, height, columns)
    x = torch.randn((tokens, columns), generator=triton_cases.GENERATOR).to(dtype)
    for warps in (4, 8, 16):
        first, *others = (
            small.multiply(x.cuda(), prepared, packing, height, Lean(warps, slots, early)).cpu()
            for slots, early in itertools.product((2, 3), (0, 1))
        )
        assert triton_cases.error(first, x.double() @ dense.T) <= {BFLOAT: 4e-3, HALF: 6e-4}[dtype]
        assert all(torch.equal(first, other) for other in others)


@needs_gpu
def test_early_kernels_read_what_the_one_before_wrote() -> None:
    """Each product is the next one's input, also in a captured graph that is replayed."""
    prepared, packing, _ = on_gpu(LinearSpec(bits=4, group_size=128), 2048, 2048)
    begin = torch.randn((1, 2048), dtype=BFLOAT, device="cuda")
    x = begin.clone()

    def chain(early: int) -> Tensor:
        found = x
        for _ in range(12):
            found = small.multiply(found, prepared, packing, 2048, Lean(8, 2, early))
        return found

    wanted = chain(0)
    assert torch.equal(chain(1), wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chain(1)
    for turn in range(20):
        x.copy_(begin * (turn + 1))
        graph.replay()
        assert torch.equal(found, chain(0))
