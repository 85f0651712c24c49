"""The C library at every level of instructions, on inputs of all sizes and kinds, against arithmetic in float64."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmcompress.errors import InputError
from llmcompress.kernels import compiled, stored
from llmcompress.kernels.backends import native_cpu
from llmcompress.kernels.samples import random_codes
from llmcompress.spec import FOUR_BIT, LinearSpec
from tests.forked import Forker
from tests.kernels.level_cases import allowance, levels, linear_at, specs

pytestmark = pytest.mark.skipif(compiled.compiler() is None, reason="there is no C compiler")
HUGE = {torch.float32: 1e30, torch.bfloat16: 1e30, torch.float16: 65504.0}
TINY = {torch.float32: 1e-39, torch.bfloat16: 1e-39, torch.float16: 1e-7}  # subnormal


def inputs(kind: str, tokens: int, columns: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Of some kind that arithmetic might stumble over."""
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed))
    if kind == "zeros":
        x.zero_()
    elif kind == "outlier":
        x[:, seed % columns] = HUGE[dtype] / 1000
    elif kind == "tiny":
        x *= TINY[dtype]
    elif kind == "huge":
        x = x.sign() * HUGE[dtype]
    elif kind == "one in a block":
        x[:, torch.arange(columns) % 128 != seed % 128] = 0
    return x.to(dtype)


KINDS = ("normal", "zeros", "outlier", "tiny", "huge", "one in a block")


@settings(max_examples=300, deadline=None)
@given(
    spec=st.sampled_from(list(specs())), rows=st.integers(1, 9), blocks=st.integers(1, 40),
    tokens=st.sampled_from((1, 2, 3, 4, 5, 17)), dtype=st.sampled_from(native_cpu.INPUTS), kind=st.sampled_from(KINDS),
    seed=st.integers(0, 999),
)  # fmt: skip
def test_every_output_is_as_near_as_its_arithmetic_allows(
    spec: LinearSpec, rows: int, blocks: int, tokens: int, dtype: torch.dtype, kind: str, seed: int
) -> None:
    size = spec.group_size or 24
    columns = min(blocks, 1 + 900 // size) * size + (0 if spec.group_size else seed % 24)
    if spec.kind not in FOUR_BIT and spec.group_size and seed % 3 == 0:  # one scale for a row
        spec = spec.model_copy(update={"group_size": columns})
    codes = random_codes(spec, rows, columns, seed=seed)
    tensors = stored.tensors_of("", codes)
    x = inputs(kind, tokens, columns, dtype, seed)
    exact, room = x.double() @ codes.dequantize().double().T, allowance(x, codes)
    fits = exact.abs() + room < torch.finfo(dtype).max
    for level in levels():
        found = linear_at(level, x, codes, tensors).double()
        assert not found.isnan().any(), level
        assert bool(((found - exact).abs() <= room)[fits].all()), level
        assert torch.equal(found[~fits].sign(), exact[~fits].sign()), level
        if kind == "zeros":
            assert not found.any(), level


@pytest.mark.parametrize("dtype", native_cpu.INPUTS)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_its_token_alone(wrong: float, dtype: torch.dtype) -> None:
    for spec in specs():
        codes = random_codes(spec, 6, 2 * (spec.group_size or 100))
        tensors = stored.tensors_of("", codes)
        x = torch.randn(6, codes.codes.shape[1]).to(dtype)
        bad = x.clone()
        bad[2, -1] = bad[5, 0] = wrong
        for level in levels():
            before, after = (linear_at(level, given, codes, tensors) for given in (x, bad))
            assert not after[[2, 5]].isfinite().any(), (spec, level)
            assert torch.equal(after[[0, 1, 3, 4]], before[[0, 1, 3, 4]]), (spec, level)


@pytest.mark.parametrize("tokens", [1, 3, 9])
def test_no_level_depends_on_the_number_of_threads(tokens: int) -> None:
    before = torch.get_num_threads()
    try:
        for spec in specs():
            codes = random_codes(spec, 301, 2 * (spec.group_size or 300))
            tensors = stored.tensors_of("", codes)
            x = torch.randn(tokens, codes.codes.shape[1]).bfloat16()
            for level in levels():
                found = []
                for threads in (1, 3):
                    torch.set_num_threads(threads)
                    found.append(linear_at(level, x, codes, tensors))
                assert torch.equal(*found), (spec, level)
    finally:
        torch.set_num_threads(before)


def test_nothing_is_read_past_the_end(forker: Forker, tmp_path: Path) -> None:
    found = forker.run((), tmp_path, call="tests.kernels.level_cases:past_the_end")
    assert found.returncode == 0, found.stderr


@pytest.mark.parametrize(("name", "status"), [("scalar", 0), ("avx2", 0), ("best", 0), ("avx3", 1)])
def test_the_user_chooses_a_level(name: str, status: int, forker: Forker, tmp_path: Path) -> None:
    changes = {native_cpu.VARIABLE: name}
    found = forker.run((), tmp_path, changes=changes, call="tests.kernels.level_cases:level_of_the_user")
    assert bool(found.returncode) == bool(status), found.stderr
    assert (InputError.__name__ in found.stderr) == bool(status)
