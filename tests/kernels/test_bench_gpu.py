"""The GPU benchmark's own arithmetic, with an invented clock, and the weights that its makers say they store."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton_cases

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import json, sys, torch
import gpu_backends, kernels_gpu
ways = {name: make for name, make in gpu_backends.makers().items() if name.startswith("ours")}
weight = torch.randn(48, 256, generator=torch.Generator().manual_seed(0)) / 16
errors = {}
for name, make in ways.items():
    made = make(weight)
    rounding = float((made.weight - weight).norm() / weight.norm())
    errors[name] = [kernels_gpu.error_of(made, torch.randn(3, 256)), rounding]
Cell = kernels_gpu.Cell
cells = [Cell("cuBLAS bf16", 8, 8, 1, 4.0, 1.0, 0.5, 0.0), Cell("a", 8, 8, 1, 1.0, 1.0, 0.9, 0.0),
         Cell("cuBLAS bf16", 9, 8, 1, 9.0, 1.0, 0.5, 0.0), Cell("a", 9, 8, 1, 9.0, 1.0, 0.4, 0.0)]
json.dump({"errors": errors, "means": kernels_gpu.means(cells)}, sys.stdout)
"""


@pytest.mark.skipif(not triton_cases.HAS_TRITON, reason="Triton is not installed")
def test_makers_store_what_they_say() -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "bench")])
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert len(found["errors"]) == 6
    for name, (product, rounding) in found["errors"].items():
        assert product < (2e-2 if "int8 x" in name else 1e-6), name
        assert rounding < {"ours int2": 0.6, "ours int3": 0.3}.get(name, 0.15), name
    means = found["means"]["a"]["1"]
    assert means["speed"] == pytest.approx(2.0)  # geometric mean of 4 and 1
    assert means["floor"] == pytest.approx(0.6)
