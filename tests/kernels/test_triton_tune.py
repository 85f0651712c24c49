"""Choosing the fastest: the search with a clock of our own, and the command where there is no GPU."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton_cases

from llmcompress.kernels.triton.trial import Case, is_right
from llmcompress.kernels.triton.tuning import Choice, Config
from llmcompress.spec import LinearSpec

HERE = Path(__file__).resolve()

SEARCH = """
import functools, json, sys, torch
from llmcompress.kernels.triton import large, measure, tune, ways
from llmcompress.spec import LinearSpec

tried, dense = [None], {}

def product(x, weight, packing, rows, config):
    tried.append(config)
    if config.rows == 128 and config.warps == 8:
        raise measure.OutOfResources(1, 0, "shared memory")
    if weight["words"].data_ptr() not in dense:
        dense[weight["words"].data_ptr()] = large.dequantize(weight, packing, (0, rows), x.dtype)
    out = x @ dense[weight["words"].data_ptr()].T
    if config[2:] == (1, 4, 3):  # the fastest, were it right: one output is a tenth off
        out[:, -1] *= 1.1
    return out

def clock(work, copies):
    tried.append(None)
    work(copies - 1)
    if tried[-1] is None:
        return 50.0
    fast = 100 * (tried[-1][2:] == (1, 4, 3))
    return abs(tried[-1].rows - 64) + abs(tried[-1].split - 2) + tried[-1].stages / 10 - fast

ways.multiply_tile = product
linears = [(LinearSpec(bits=4, group_size=64), 96, 512), (LinearSpec(bits=4, group_size=64), 96, 512),
           (LinearSpec(bits=5, group_size=64), 96, 512)]
found = list(tune.tune(linears, torch.float16, torch.device("cpu"), workers=0,
                       measure=functools.partial(measure.measured, timer=clock)))
json.dump([[f.key, f.tokens, f.config, f.microseconds, f.before, f.wrong] for f in found], sys.stdout)
"""


@pytest.mark.skipif(not triton_cases.HAS_TRITON, reason="Triton is not installed")
def test_the_fastest_that_runs_and_is_right_wins_once_for_each_linear() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE.parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SEARCH], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert [(key, tokens) for key, tokens, *_ in found] == [
        ("int4 96x512", most) for most in (8, 16, 32, 64, 128, 512, 2048)
    ]
    for _, tokens, config, microseconds, before, wrong in found[:5]:
        assert config[:3] == [64, tokens, 2]
        assert config[4] == 2
        assert microseconds <= before
        assert [64, tokens, 1, 4, 3] in wrong
        assert all(other[2:] == [1, 4, 3] for other in wrong)
    for _, _, config, microseconds, before, wrong in found[5:]:
        assert config == []  # strips: the tile that would be faster is wrong
        assert microseconds == before
        assert wrong == [[64, 128, 1, 4, 3]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wrong_products_are_told_from_rounded_ones(dtype: torch.dtype) -> None:
    """One row that is a tenth off, one token that is another's, one output that was not written."""
    wanted = torch.randn(8, 300, generator=torch.Generator().manual_seed(1))
    right = wanted.to(dtype)
    row, token, hole = right.clone(), right.clone(), right.clone()
    row[:, 7] *= 1.1
    token[3] = right[4]
    hole[7, 299] = float("nan")
    assert is_right(lambda _: right, wanted)
    one = torch.cat([wanted.flatten(), torch.tensor([4.0156, 8.031])])[None]  # one token, with rounding at its worst
    assert is_right(lambda _: one.to(dtype), one)
    assert not is_right(lambda _: (one * 1.04).to(dtype), one)
    assert not any(is_right(lambda _, found=found: found, wanted) for found in (row, token, hole))


def test_users_without_a_home_have_the_shipped_table(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmcompress.kernels.triton import tuning

    monkeypatch.setattr(tuning, "cache_folder", lambda *_: Path("/nowhere").joinpath(*os.listdir("/nowhere")))
    tuning._tables.cache_clear()
    assert tuning._tables("NVIDIA H200", "sm_90") == ({}, tuning.read_shipped()["sm_90"])
    tuning._tables.cache_clear()


def deadly(_: Case, config: Choice) -> float:
    """A clock that some configurations do not survive."""
    assert isinstance(config, Config)
    if config.split == 8:
        os._exit(3)
    if config.split == 4:
        time.sleep(600)
    if config.split == 2:
        raise torch.AcceleratorError("an illegal memory access")
    return config.rows + config.stages / 10


@pytest.mark.skipif(not triton_cases.HAS_TRITON, reason="Triton is not installed")
def test_kernels_that_end_their_process_or_never_end_lose() -> None:
    """The others are measured all the same, in a new process."""
    from llmcompress.kernels.triton.measure import FAULT, Apart, Died

    case = Case(LinearSpec(bits=4, group_size=64), 96, 512, 8, torch.float16, torch.device("cpu"))
    found: list[float | str] = []
    with Apart(deadly, patience=1) as measuring:
        for split in (8, 1, 4, 2, 1):
            try:
                found.append(measuring(case, Config(64, 8, split, 4, 3)))
            except Died as how:
                found.append(str(how))
    assert found == ["its process ended with 3", 64.3, "no answer in 1 s", f"its process ended with {FAULT}", 64.3]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("json_flag", [(), ("--json",)])
def test_without_a_gpu_the_command_says_so(run: Callable[..., subprocess.CompletedProcess[str]],
                                           tmp_path: Path, json_flag: tuple[str, ...]) -> None:  # fmt: skip
    done = run("tune", str(tmp_path), *json_flag)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "error: " in done.stderr
    assert "hint: " in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_kept_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One entry after the other, beside what was there."""
    from llmcompress.kernels.triton import tuning

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    table = tuning.read_own("A GPU")
    assert table == {}
    tuning.keep("A GPU", table, "int4", most=8, config=tuning.Lean(4, 2, 1, 2))
    tuning.keep("A GPU", tuning.read_own("A GPU"), "int4", most=512, config=tuning.Strips())
    document = tuning.keep("A GPU", tuning.read_own("A GPU"), "int4 8x8", most=16, config=Config(64, 16, 0, 4, 3))
    assert document == {"int4": {"8": [4, 2, 1, 2], "512": []}, "int4 8x8": {"16": [64, 16, 0, 4, 3]}}
    assert tuning.read_own("A GPU")["int4"] == {"8": tuning.Lean(4, 2, 1, 2), "512": tuning.Strips()}
