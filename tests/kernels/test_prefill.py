"""The kernel for many tokens: its values on a CPU, by the semantics of the instructions, and its machine code."""

import ctypes
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton_cases
from on_host import built, needs_compiler

from llmcompress.errors import InputError
from llmcompress.kernels import fourbit, stored
from llmcompress.kernels.codes import Codes
from llmcompress.kernels.nvrtc import compiler, many, small
from llmcompress.kernels.triton import layout, tuning
from llmcompress.kernels.triton.tuning import Fused
from llmcompress.spec import FOUR_BIT, LinearSpec

HERE = Path(__file__).resolve().parent
BFLOAT, HALF = torch.bfloat16, torch.float16
ROUNDING = {BFLOAT: 2.0**-8, HALF: 2.0**-11}  # of an output at most; weights are rounded before
MOST = {BFLOAT: 2.6e-3, HALF: 4e-4}  # relative, weights and outputs rounded
SUMS = 1e-3  # of a usual output: what float32 sums may lose
REGISTERS = 65536  # of a processor
MOST_ROWS, MOST_STACK = 256, 16  # bytes of a thread with few registers that are not in them
ENTRY = """
extern "C" int shared_bytes() { return SHARED_BYTES; }
extern "C" void all_prefill(int blocks_x, int blocks_y, const u16 *x, const u16 *words, const void *scale,
    const u8 *zero, const float *table, u16 *out, int M, int N, int K, int stride, int blocks) {
    run_warpgroups(blocks_x, blocks_y, [=] { prefill(x, words, scale, zero, table, out, M, N, K, stride, blocks); });
}
"""
CASES = [  # format, columns (whole blocks or not), inputs, tokens and rows (whole tiles or not), tile
    (LinearSpec(bits=2, group_size=128), 1024, BFLOAT, (130, 100), Fused(128, 128, 5)),
    (LinearSpec(bits=3, group_size=64, kind="asymmetric"), 2496, HALF, (40, 37), Fused(64, 128, 6)),
    (LinearSpec(bits=4, group_size=32), 384, BFLOAT, (300, 37), Fused(64, 256, 4)),
    (LinearSpec(bits=4, group_size=256, kind="asymmetric"), 768, BFLOAT, (128, 64), Fused(64, 128, 4)),
    (LinearSpec(bits=8, group_size=128), 1280, HALF, (60, 72), Fused(64, 128, 6)),
    (LinearSpec(bits=8, group_size=640, kind="asymmetric"), 640, BFLOAT, (9, 130), Fused(128, 128, 4)),
    (LinearSpec(bits=4, group_size=64, kind="nf4"), 512, BFLOAT, (140, 200), Fused(192, 128, 4)),
    (LinearSpec(bits=4, group_size=128), 128, BFLOAT, (5, 64), Fused(64, 128, 4)),
]
MACHINE_CODE = [
    ("int2", Fused(128, 256, 4)), ("int3z", Fused(192, 128, 6)), ("int4", Fused(128, 256, 5)),
    ("int8", Fused(128, 128, 6)), ("nf4", Fused(192, 128, 6)), ("int4", Fused(256, 128, 6)),
]  # fmt: skip


def dense_of(codes: Codes) -> torch.Tensor:
    """The weights that the kernel rounds: a table's values are float16."""
    if codes.spec.kind not in FOUR_BIT:
        return codes.dequantize()
    values = fourbit.table_of(codes.spec.kind).half().float()[codes.codes.long()]
    return values * codes.scale.view(len(codes.codes), -1).repeat_interleave(codes.spec.group_size, 1)


def is_rounded(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether every output is the nearest of its dtype, but for the order of sums; numbers only."""
    limit = ROUNDING[found.dtype] * wanted.abs() + SUMS * wanted.abs().mean()
    return bool(((found.cpu().double() - wanted).abs() <= limit).all())


@needs_compiler
@pytest.mark.parametrize(
    ("spec", "columns", "dtype", "sizes", "config"), CASES, ids=lambda value: getattr(value, "label", None)
)
def test_values_are_those_of_the_rounded_weights(
    spec: LinearSpec, columns: int, dtype: torch.dtype, sizes: tuple[int, int], config: Fused, tmp_path: Path
) -> None:
    """Weights are rounded once, as in strips, and values of a table to float16 before; outputs are the nearest."""
    tokens, rows = sizes
    codes = triton_cases.random_codes(spec, rows, columns)
    prepared = layout.prepare(stored.tensors_of("", codes), spec)
    packing = layout.packing_of(spec, columns)
    assert many.knows(packing)
    made = many.definitions(packing, dtype, prepared["scale"].dtype, config)
    library = built(tmp_path, made, "host_wgmma.h", ("codes", "prefill"), ENTRY)
    assert library.shared_bytes() == many.shared_bytes(packing, config) - many.ALIGNMENT
    x = torch.randn((tokens, columns), generator=triton_cases.GENERATOR).to(dtype)
    out = torch.full((tokens, rows), float("nan"), dtype=dtype)
    given = small.given(x, prepared, out, packing)
    library.all_prefill(*map(ctypes.c_int, (-(-tokens // config.tokens), -(-rows // config.rows))), *given)
    dense = dense_of(codes)
    assert is_rounded(out, x.double() @ dense.to(dtype).double().T)
    assert triton_cases.error(out, x.double() @ codes.dequantize().double().T) <= MOST[dtype]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("number", range(len(CASES)))
def test_values_on_a_gpu(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tile that is tried, with poison in all fresh memory, and what the rows do not fill."""
    spec, columns, dtype, (tokens, rows), _ = CASES[number]
    device = torch.device("cuda")
    packing = layout.packing_of(spec, columns)
    if not many.fits(packing, dtype, device):
        pytest.skip("the GPU is not of compute capability 9.0, or there is no NVRTC")
    monkeypatch.setattr(torch, "empty", triton_cases.poisoned)
    for more in (0, 1000):
        codes = triton_cases.random_codes(spec, rows + more, columns)
        prepared = {n: t.to(device) for n, t in layout.prepare(stored.tensors_of("", codes), spec).items()}
        x = torch.randn((tokens + more, columns), generator=triton_cases.GENERATOR).to(dtype)
        wanted = x.double() @ dense_of(codes).to(dtype).double().T
        for config in many.candidates(packing):
            found, again = (many.multiply(x.to(device), prepared, packing, rows + more, config) for _ in range(2))
            assert is_rounded(found, wanted), config
            assert torch.equal(found, again), config


@pytest.mark.skipif(compiler.library() is None, reason="NVRTC is not installed")
@pytest.mark.skipif(not triton_cases.HAS_TRITON, reason="Triton, which has the disassembler, is not installed")
@pytest.mark.parametrize(("label", "config"), MACHINE_CODE)
def test_machine_code(label: str, config: Fused) -> None:
    """Matrix instructions follow each other without waits, with weights in registers that nothing writes too early."""
    sys.path.insert(0, str(HERE.parents[1] / "bench"))
    import prefill_static

    spec = prefill_static.FORMATS[label]
    found = prefill_static.compile_prefill(spec, prefill_static.COLUMNS, BFLOAT, config)
    order = layout.packing_of(spec, prefill_static.COLUMNS).planar
    assert order is not None
    slices, products = order.block // many.SLICE, found.count("HGMMA")
    assert products == slices * 4 * config.tokens // 128
    assert found.count("WARPGROUP.DEPBAR") == slices  # as many waits as slices: the compiler added none
    assert all(re.search(r"HGMMA\S* R\d+, R\d+, gdesc", line) for line in found.loop if "HGMMA" in line)
    assert found.stack <= (0 if config.rows < MOST_ROWS else MOST_STACK)
    assert found.registers <= REGISTERS // (2 * config.rows)
    assert found.shared <= many.SHARED_BYTES
    assert prefill_static.early_writes(found.loop) == 0
    row = prefill_static.counted(label, config, found)
    assert row.issue <= 0.82
    assert row.integer <= 0.6


def test_early_writes_are_found() -> None:
    """To weights before the second wait, to sums ever; not to weights that are done with."""
    sys.path.insert(0, str(HERE.parents[1] / "bench"))
    import prefill_static

    product, wait = "HGMMA.64x128x16.F32.BF16 R24, R180, gdesc[UR12], R24, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x1"
    other = product.replace("R180", "R184")
    assert prefill_static.early_writes((product, wait, "HMUL2 R184, R1, R2", other, wait, "LOP3.LUT R180, R1, R2")) == 0
    assert prefill_static.early_writes((product, wait, "LDSM.16.M88.4 R178, [R3]", other, wait)) > 0
    assert prefill_static.early_writes((product, wait, "FADD R30, R1, R2", other, wait)) > 0


def test_a_table_may_name_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where it can be used, for so many tokens; strips where no table says anything, or the user's says so."""
    packing = layout.packing_of(LinearSpec(bits=4, group_size=128), 4096)
    table = tmp_path / "gpu.json"
    table.write_text(
        '{"int4 4096x4096": {"512": [128, 128, 6], "2048": []}, "int4": {"8": [4], "2048": [192, 128, 6]}}'
    )
    monkeypatch.setattr(tuning, "_tables", lambda *_: (tuning.read_table(table), {}))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="", major=9, minor=0))
    device = torch.device("cuda")
    tuning.choose_many.cache_clear()

    def chosen(rows: int, tokens: int, fused: bool = True) -> tuple[int, ...]:
        return tuple(tuning.choose_many(packing, rows, tokens, device, fused))

    assert chosen(4096, 300) == chosen(4096, 512) == (128, 128, 6)
    assert chosen(4096, 513) == chosen(4096, 9000) == ()
    assert chosen(8192, 512) == ()
    assert chosen(8192, 2048) == (192, 128, 6)
    assert chosen(8192, 2048, fused=False) == ()
    tuning.choose_many.cache_clear()


@pytest.mark.parametrize("numbers", ["[100, 128, 6]", "[128, 128, 3]", "[true, 128, 6]", "[128, 128.0, 6]"])
def test_a_damaged_table_is_refused(numbers: str, tmp_path: Path) -> None:
    (tmp_path / "gpu.json").write_text(f'{{"int4": {{"512": {numbers}}}}}')
    with pytest.raises(InputError, match=r"gpu\.json: not a table of the kernels"):
        tuning.read_table(tmp_path / "gpu.json")
