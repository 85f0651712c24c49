"""The Triton kernels: values from Triton's interpreter, and machine code for GPUs that are not here."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton_cases

from llmcompress.kernels import triton as backend
from llmcompress.kernels.triton.tuning import Config, read_shipped
from llmcompress.spec import LinearSpec

HERE = Path(__file__).resolve()
ROUNDING = {"torch.float32": 1e-6, "torch.float16": 6e-4, "torch.bfloat16": 4e-3}
GPU_SHARES = 12  # of the formats, so that several processes can compile their kernels
needs_triton = pytest.mark.skipif(not triton_cases.HAS_TRITON, reason="Triton is not installed")


def check(cases: list[dict[str, Any]]) -> None:
    """All errors are those of rounding the output (and, in strips, the weights); nothing is left over."""
    for case in cases:
        assert case["error"] <= ROUNDING[case["dtype"]], case
        assert case.get("counters", 0) == 0, case
        assert case.get("same", True), case


@needs_triton
def test_values_are_those_of_the_stored_codes() -> None:
    """Interpreted, in a process of its own: Triton decides when it is imported whether it interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE.parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(HERE.with_name("triton_cases.py"))], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    cases = json.loads(done.stdout)
    assert len(cases) > 100
    check(cases)


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("share", range(GPU_SHARES))
def test_values_on_a_gpu(share: int) -> None:
    cases = triton_cases.errors("cuda", (torch.bfloat16, torch.float16, torch.float32), (share, GPU_SHARES))
    assert len(cases) > 8
    check(cases)


LIMITS = {  # of instructions per weight, in parts of what an H200 issues while its memory delivers one
    "int2": 0.85, "int3": 0.7, "int4": 0.7, "int8": 0.7, "int4z": 0.8, "table4": 0.8,
}  # fmt: skip


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("label", LIMITS)
def test_machine_code(label: str, capability: int) -> None:
    """No spills, shared memory that is there, matrix instructions, wide asynchronous loads, few instructions."""
    sys.path.insert(0, str(HERE.parents[2] / "bench"))
    import kernels_static

    config = read_shipped()["sm_80"][label]["8"]
    assert isinstance(config, Config)
    dtype = torch.bfloat16 if capability == 90 else torch.float16
    found = kernels_static.measure(label, 128, config._replace(split=2), dtype, capability)
    assert found.stack == 0
    assert found.shared <= kernels_static.SHARED_BYTES[capability]
    assert found.matrix.startswith(("HMMA", "HGMMA"))
    assert found.per_weight <= LIMITS[label] * found.budget


WEIGHT = {"words": "*i32", "scale": "*bf16", "zero": "*u8", "table": "*fp32", "out": "*bf16"}
INT8 = {"x_scale": "*fp32", "zero": "*i8", "scale": "*bf16", "weight_sums": "*i32", "out": "*bf16"}
SIZES = dict.fromkeys(("first", "last", "N", "K", "stride"), "i32")
PARTS = {"partials": "*i32", "counters": "*i32", "M": "i32", "N": "i32", "K": "i32"}
COLUMNS = dict.fromkeys(("first", "count", "N", "K"), "i32")
OTHERS: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
    "strips of planar codes": (
        "dequantize.dequantize_planar", WEIGHT | {"words": "*i16"} | SIZES,
        {"BITS": 3, "WORDS": 32, "FIELDS": 16, "PLANES": 3, "GROUP": 128, "ZERO": True, "TABLE": 0, "BN": 16},
    ),
    "strips of a table's codes": (
        "dequantize.dequantize_planar", WEIGHT | {"words": "*i16", "scale": "*fp32"} | SIZES,
        {"BITS": 4, "WORDS": 64, "FIELDS": 4, "PLANES": 1, "GROUP": 64, "ZERO": False, "TABLE": 1, "BN": 16},
    ),
    "strips of codes as in the file": (
        "dequantize.dequantize_dense", WEIGHT | SIZES,
        {"BITS": 5, "GROUP": 128, "ZERO": False, "TABLE": 0, "BN": 16, "BK": 256},
    ),
    "columns with feedback": (
        "columns.round_block",
        dict.fromkeys(("left", "upper", "steps", "half"), "*fp32") | {"codes": "*u8", "errors": "*fp32"} | COLUMNS,
        {"BK": 128, "BN": 16},
    ),
    "columns settled": (
        "columns.settle_block",
        dict.fromkeys(("gradient", "metric", "steps"), "*fp32") | {"codes": "*u8", "moves": "*fp32"} | COLUMNS
        | {"top": "i32"}, {"BK": 128, "BN": 16},
    ),
    "8-bit inputs of a token": (
        "int8.quantize",
        {"x": "*bf16", "scale": "*fp32", "zero": "*fp32", "codes": "*i8", "token_scale": "*fp32", "K": "i32"},
        {"STATIC": False, "ZERO": False, "STEPS": 2, "BK": 4096},
    ),
    "8-bit product": (
        "int8.multiply", {"x": "*i8", "words": "*i8"} | INT8 | PARTS,
        {"STATIC": False, "ZERO": True, "STEPS": 32, "SPLIT": 2, "BN": 64, "BM": 16, "BK": 128},
    ),
    "after the library's 8-bit product": (
        "int8.finish", {"sums": "*i32"} | INT8 | {"M": "i32", "N": "i32"},
        {"STATIC": True, "ZERO": True, "BN": 128, "BM": 8},
    ),
}  # fmt: skip


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("what", OTHERS)
def test_every_kernel_compiles_without_spills(what: str, capability: int) -> None:
    sys.path.insert(0, str(HERE.parents[2] / "bench"))
    import sass

    place, types, constants = OTHERS[what]
    module, name = place.split(".")
    kernel = getattr(importlib.import_module(f"llmcompress.kernels.triton.jit.{module}"), name)
    found = sass.compiled(kernel, types, constants, (capability, 4, 3))
    assert found.stack == 0
    if name == "multiply":
        assert found.count("IMMA") + found.count("IGMMA") > 0, found.operations
        assert found.count("LDGSTS") > 0, found.operations


def test_reasons_against() -> None:
    """In words that go after "cannot do this: ", the format before the machine."""

    def reason(device: str = "cuda", dtype: torch.dtype = torch.float16, columns: int = 256, **fields: Any) -> str:
        spec = LinearSpec.model_validate({"bits": 4, "group_size": 128} | fields)
        return backend.why_not(spec, 8, columns, tokens=1, dtype=dtype, device=device) or ""

    assert reason(high_share=0.1) == "some columns have two bits more"
    assert reason(kind="nf4", group_size=64, columns=100) == "rows of 100 weights are not whole groups of 64"
    assert reason(dtype=torch.float64) == "inputs are torch.float64"
    if not triton_cases.HAS_TRITON:
        assert reason() == "Triton is not installed"
        return
    assert reason("cpu") == "it is for NVIDIA GPUs, not cpu"
    assert reason() == ("" if torch.cuda.is_available() else "PyTorch sees no GPU")
