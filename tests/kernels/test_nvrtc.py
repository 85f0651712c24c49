"""The kernels in CUDA C++, on a CPU: their own source compiled by the C++ compiler there is, warps of threads."""

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import triton_cases
from torch import Tensor

from llmcompress.errors import MachineError
from llmcompress.kernels import stored
from llmcompress.kernels.nvrtc import compiler, small
from llmcompress.kernels.triton import layout
from llmcompress.kernels.triton.tuning import Lean
from llmcompress.spec import LinearSpec

HERE = Path(__file__).resolve().parent
WARPS, ROWS = 2, 37
MOST_STACK = 16  # bytes of a thread that are not in registers
BFLOAT, HALF = torch.bfloat16, torch.float16
ENTRIES = """
extern "C" void all_decode(int blocks_x, const u16 *x, const u16 *words, const void *scale, const u8 *zero,
    const float *table, u16 *out, int M, int N, int K, int stride, int blocks) {
    run(blocks_x, 1, [=] { decode(x, words, scale, zero, table, out, M, N, K, stride, blocks); });
}
extern "C" void all_expand(int blocks_x, int blocks_y, const u16 *words, const void *scale, const u8 *zero,
    const float *table, u16 *out, int first, int last, int N, int K, int stride, int blocks) {
    run(blocks_x, blocks_y, [=] { expand(words, scale, zero, table, out, first, last, N, K, stride, blocks); });
}
"""
CASES = [  # format, columns (whole blocks or not), inputs, tokens
    (LinearSpec(bits=2, group_size=128), 1024, BFLOAT, 3),
    (LinearSpec(bits=3, group_size=64, kind="asymmetric"), 2496, HALF, 16),
    (LinearSpec(bits=4, group_size=32), 384, BFLOAT, 9),
    (LinearSpec(bits=4, group_size=256, kind="asymmetric"), 768, HALF, 1),
    (LinearSpec(bits=8, group_size=320), 320, BFLOAT, 8),
    (LinearSpec(bits=4, group_size=64, kind="nf4"), 512, BFLOAT, 5),
]
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")


def built(folder: Path, made: compiler.Definitions) -> ctypes.CDLL:
    """Both kernels as a library."""
    code = "\n".join((compiler.FOLDER / f"{name}.cu").read_text() for name in ("codes", "decode", "expand"))
    source, target = folder / "kernels.cpp", folder / "kernels.so"
    source.write_text(f'#include "{HERE / "host_ptx.h"}"\n{code}\n{ENTRIES}')
    flags = [f"-D{name}={value}" for name, value in made]
    command = ["g++", "-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-pthread", *flags, str(source), "-o", str(target)]
    subprocess.run(command, check=True, capture_output=True)
    return ctypes.CDLL(str(target))


def given(*values: Tensor | int | None) -> list[ctypes.c_void_p | ctypes.c_int]:
    """As C takes them."""
    return [
        ctypes.c_int(value) if isinstance(value, int) else ctypes.c_void_p(None if value is None else value.data_ptr())
        for value in values
    ]


@needs_compiler
@pytest.mark.parametrize(("spec", "columns", "dtype", "tokens"), CASES, ids=lambda value: getattr(value, "label", None))
def test_values_are_those_of_the_stored_codes(
    spec: LinearSpec, columns: int, dtype: torch.dtype, tokens: int, tmp_path: Path
) -> None:
    codes = triton_cases.random_codes(spec, ROWS, columns)
    prepared = layout.prepare(stored.tensors_of("", codes), spec)
    packing = layout.packing_of(spec, columns)
    assert packing.planar is not None
    assert packing.planar.words >= small.SHORTEST
    scale = prepared["scale"]
    made = small.definitions(packing, dtype, scale.dtype, tiles=-(-tokens // small.TILE), config=Lean(WARPS))
    library = built(tmp_path, made)
    x = torch.randn((tokens, columns), generator=triton_cases.GENERATOR).to(dtype)
    weight = (prepared["words"], scale, prepared.get("zero"), prepared.get("table"))
    numbers = (columns, prepared["words"].shape[1], packing.planar.blocks(columns))
    out = torch.full((tokens, ROWS), float("nan"), dtype=dtype)
    library.all_decode(*given(-(-ROWS // 16), x, *weight, out, tokens, ROWS, *numbers))
    dense = codes.dequantize()
    limit = {BFLOAT: 4e-3, HALF: 6e-4}[dtype]
    assert triton_cases.error(out, x.double() @ dense.double().T) <= limit
    first, last = 3, 30
    rows = torch.full((last - first, columns), float("nan"), dtype=dtype)
    grid = (-(-(last - first) // 16), -(-numbers[-1] // WARPS))
    library.all_expand(*given(*grid, *weight, rows, first, last, ROWS, *numbers))
    assert torch.equal(rows, dense[first:last].to(dtype))


@pytest.mark.skipif(compiler.library() is None, reason="NVRTC is not installed")
@pytest.mark.skipif(not triton_cases.HAS_TRITON, reason="Triton, which has the disassembler, is not installed")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_machine_code_for_gpus_that_are_not_here(architecture: str, tmp_path: Path) -> None:
    """It compiles, keeps everything in registers, and has matrix instructions."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    nvrtc = compiler.library()
    assert nvrtc is not None
    for number, (spec, columns, dtype, tokens) in enumerate(CASES):
        packing = layout.packing_of(spec, columns)
        scale = torch.float32 if spec.kind == "nf4" else torch.bfloat16
        made = small.definitions(packing, dtype, scale, tiles=-(-tokens // small.TILE), config=Lean(8))
        path = tmp_path / "kernel.cubin"
        name = ("decode", "expand")[number % 4 == 3]
        path.write_bytes(compiler.compiled(compiler.source_of(name), dict(made), architecture, nvrtc))
        said = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", path], capture_output=True, text=True
        ).stdout
        stack = re.search(r"STACK:(\d+)", said)
        assert stack is not None, said
        assert int(stack[1]) <= MOST_STACK
        code = subprocess.run([tools / "nvdisasm", "-c", path], capture_output=True, text=True).stdout
        assert ("HMMA" in code) == (name == "decode")


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
