"""Every backend against float64 arithmetic on the stored codes, in every format it takes, at odd sizes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmcompress.errors import InputError
from llmcompress.kernels import backends, compiled, ops, reference
from llmcompress.kernels.backends import bnb, native_cpu, torch_cpu, use
from llmcompress.kernels.backends import reference as plain
from llmcompress.spec import LinearSpec
from tests.kernels.formats import FORMATS, arguments, columns_of, linear_of

ROWS = (1, 6, 67)
TOKENS = (1, 3, 16, 64, 300)
LIMITS = {torch.float32: 1e-5, torch.float16: 3.2e-4, torch.bfloat16: 2.5e-3}
LOOSE = 4e-3  # kernels that are not ours round weights to bfloat16 besides
needs_compiler = pytest.mark.skipif(compiled.compiler() is None, reason="there is no C compiler")


def error(found: Tensor, x: Tensor, weight: Tensor) -> float:
    """Relative to the largest that rounding alone could explain: norm over norm, in float64."""
    exact = x.double() @ weight.double().T
    return float((found.double() - exact).norm() / exact.norm())


def check(name: str, dtype: torch.dtype, call: object, limit: float) -> None:
    """Outputs of all sizes of a format, put together so that bfloat16 rounding averages out."""
    spec = FORMATS[name]
    found, exact = [], []
    for place, rows in enumerate(ROWS):
        columns = columns_of(spec, place + 1)
        if spec.high_share and not spec.high_columns(columns):
            continue
        codes, tensors = linear_of(name, rows, columns)
        for tokens in TOKENS if rows == ROWS[-1] else TOKENS[:3]:
            x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).to(dtype)
            found.append(call(x, tensors, spec, rows, columns).double().flatten())  # type: ignore[operator]
            exact.append((x.double() @ codes.dequantize().double().T).flatten())
            assert found[-1].shape == exact[-1].shape
            scale = exact[-1].norm() / len(exact[-1]) ** 0.5
            assert float((found[-1] - exact[-1]).abs().max()) <= 20 * limit * float(scale) + limit * float(
                exact[-1].abs().max()
            )
    whole = torch.cat(exact)
    assert float((torch.cat(found) - whole).norm() / whole.norm()) <= limit


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors are NaN, so that an output nobody wrote shows."""
    real = torch.empty

    def empty(*words: object, **more: object) -> Tensor:
        made = real(*words, **more)  # type: ignore[call-overload]
        return made.fill_(float("nan")) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", empty)


@needs_compiler
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("level", ["scalar", "avx2", "avx2_vnni", "avx512", "best"])
@pytest.mark.parametrize("name", FORMATS)
def test_native(name: str, level: str) -> None:
    library, why = compiled.library()
    assert library is not None, why
    best = library.llmcompress_level()
    if native_cpu.LEVELS[level] > best:
        pytest.skip("this processor has no such instructions")

    def call(x: Tensor, tensors: dict[str, Tensor], spec: LinearSpec, rows: int, columns: int) -> Tensor:
        assert native_cpu.why_not(spec, rows, columns, tokens=len(x), dtype=x.dtype, device="cpu") is None
        prepared = native_cpu.prepare(tensors, spec)
        return native_cpu.linear(x, prepared, spec, rows, columns, level=native_cpu.LEVELS[level])

    for dtype, limit in LIMITS.items():
        check(name, dtype, call, limit)


@pytest.mark.parametrize("name", FORMATS)
def test_plain_torch(name: str) -> None:
    def call(x: Tensor, tensors: dict[str, Tensor], spec: LinearSpec, rows: int, columns: int) -> Tensor:
        return plain.linear(x, plain.prepare(tensors, spec), spec, rows, columns)

    for dtype, limit in LIMITS.items():
        check(name, dtype, call, limit)


@pytest.mark.parametrize("name", FORMATS)
def test_without_a_compiler(name: str) -> None:
    def call(x: Tensor, tensors: dict[str, Tensor], spec: LinearSpec, rows: int, columns: int) -> Tensor:
        return torch_cpu.linear(x, torch_cpu.prepare(tensors, spec), spec, rows, columns)

    for dtype, limit in LIMITS.items():
        check(name, dtype, call, limit)


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_torchs_own_kernel_takes_over(bits: int, tokens: int) -> None:
    codes, tensors = linear_of(f"int{bits}-g64", 48, 192)
    prepared = torch_cpu.prepare(tensors, codes.spec)
    assert torch_cpu.INT4 in prepared
    x = torch.randn(tokens, 192).bfloat16()
    assert error(torch_cpu.linear(x, prepared, codes.spec, 48, 192), x, codes.dequantize()) < LOOSE


@pytest.mark.parametrize("name", ["nf4-g64", "fp4-g64", "nf4-g64-double"])
def test_bitsandbytes_leaves_the_files_tensors_alone(name: str) -> None:
    pytest.importorskip("bitsandbytes")
    codes, tensors = linear_of(name, 64, 192)
    before = {part: tensor.clone() for part, tensor in tensors.items()}
    prepared = bnb.prepare(tensors, codes.spec)
    for dtype in LIMITS:
        x = torch.randn(3, 192).to(dtype)
        assert error(bnb.linear(x, prepared, codes.spec, 64, 192), x, codes.dequantize()) < LOOSE
    assert all(torch.equal(before[part], tensors[part]) for part in before)


@settings(max_examples=60, deadline=None)
@given(bits=st.integers(2, 8), rows=st.integers(1, 5), columns=st.integers(1, 140), seed=st.integers(0, 99))
def test_unpack_inverts_pack(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = torch.randint(1 << bits, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = reference.pack(codes, bits)
    assert torch.equal(reference.unpack(packed, bits, columns), codes)
    slow = [
        [sum((int(packed[r, b // 32]) >> b % 32 & 1) << i for i, b in enumerate(range(c * bits, (c + 1) * bits)))
         for c in range(columns)] for r in range(rows)
    ]  # fmt: skip
    assert codes.tolist() == slow


def test_the_user_decides_and_is_told_why_not() -> None:
    tensors, names, form, size = arguments("int3-g64", 67, 192)
    x = torch.randn(2, 192)
    with use("bnb"), pytest.raises(InputError, match="bnb cannot do this: it is for nf4 and fp4, not int3") as caught:
        ops.run(x, tensors, names, form, size)
    assert "reference" in caught.value.hint
    with pytest.raises(InputError, match="unknown backend: nativ_cpu"):
        use("nativ_cpu")
    with use("reference"):
        assert backends.choose(form, *size, x) is plain
    with use("torch_cpu"):
        assert backends.choose(form, *size, x) is torch_cpu


@needs_compiler
def test_native_is_the_first_choice_on_cpu() -> None:
    _, _, form, size = arguments("int3-g64", 67, 192)
    assert backends.choose(form, *size, torch.randn(2, 192)) is native_cpu
    assert backends.choose(form, *size, torch.randn(2, 192).double()) is torch_cpu


SILENT = """
import logging, torch
from llmcompress.kernels import backends, compiled
logging.basicConfig(level=logging.DEBUG)
form = '{"bits": 4, "group_size": 64}'
for _ in range(2):
    print(backends.choose(form, 16, 64, torch.randn(1, 64)).__name__.rpartition(".")[2])
"""


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_no_compiler_is_one_quiet_line(compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    told = subprocess.run([sys.executable, "-c", SILENT], capture_output=True, text=True, check=True)
    assert told.stdout.split() == ["torch_cpu", "torch_cpu"]
    ours = [line for line in told.stderr.splitlines() if "llmcompress" in line]
    assert len(ours) == 1
    assert ours[0].startswith("DEBUG")


@needs_compiler
def test_the_library_is_compiled_once_and_only_where_nobody_else_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = compiled.compiler()
    assert program is not None
    (tmp_path / "linear.c").write_text("int one(void) { return 1; }\n")
    monkeypatch.setattr(compiled, "SOURCES", tmp_path)
    folder = tmp_path / "cache"
    first = compiled.build(program, folder)
    stamp = first.stat().st_mtime_ns
    assert compiled.build(program, folder) == first
    assert first.stat().st_mtime_ns == stamp
    assert [path.name for path in folder.iterdir()] == [first.name]
    (tmp_path / "linear.c").write_text("int one(void) { return 2; }\n")
    assert compiled.build(program, folder) != first
    folder.chmod(0o777)
    with pytest.raises(PermissionError, match="others may write"):
        compiled.build(program, folder)


@needs_compiler
@pytest.mark.parametrize("tokens", [1, 3, 9])
@pytest.mark.parametrize("name", ["int3-g64", "nf4-g64", "asymmetric4-g32", "codebook3"])
def test_results_do_not_depend_on_the_number_of_threads(name: str, tokens: int) -> None:
    rows, columns = 1301, 192
    tensors, names, form, size = arguments(name, rows, columns)
    x = torch.randn(tokens, columns).bfloat16()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(ops.run(x, tensors, names, form, size))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@needs_compiler
def test_a_weight_that_moves_and_a_user_who_decides_are_noticed_at_the_next_call() -> None:
    tensors, names, form, size = arguments("int3-g64", 67, 192)
    x = torch.randn(2, 192)
    first = ops.run(x, tensors, names, form, size)
    for tensor in tensors:
        tensor.share_memory_()
    assert torch.equal(ops.run(x, tensors, names, form, size), first)
    tensors[0].zero_()
    changed = ops.run(x, tensors, names, form, size)
    assert not torch.allclose(changed, first)
    with use("bnb"), pytest.raises(InputError, match="bnb cannot do this"):
        ops.run(x, tensors, names, form, size)
    torch.testing.assert_close(ops.run(x.double(), tensors, names, form, size), changed.double(), atol=1e-4, rtol=1e-4)
