"""What the side-by-side benchmark counts and compares, on values small enough to work out by hand."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

BENCH = Path(__file__).resolve().parents[1] / "bench"
sys.path.insert(0, str(BENCH))

from peers import job, process, table, venvs  # noqa: E402
from peers.cells import KINDS, Cell, Row, best_ratios  # noqa: E402


def test_bits_are_counted_from_the_files(tmp_path: Path) -> None:
    tensors = {
        "a.weight_packed": torch.zeros(4, 3, dtype=torch.int32),  # 384 bits
        "a.weight_scale": torch.zeros(4, 2, dtype=torch.bfloat16),  # 128
        "a.weight_shape": torch.zeros(2, dtype=torch.int64),  # 128
        "a.bias": torch.zeros(4),
        "ab.weight": torch.zeros(2, 8),  # left at 32 bits
        "other.weight": torch.zeros(100),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    found = job.count([("a", 4, 32), ("ab", 2, 8)], job.stored(tmp_path))
    assert found["bits_per_weight"] == (384 + 128 + 128) / 128
    assert found["block_bits_per_weight"] == (384 + 128 + 128 + 16 * 32) / (128 + 16)
    assert found["left"] == ["ab"]
    assert found["weight_file_bytes"] == sum(t.numel() * t.element_size() for t in tensors.values())
    with pytest.raises(SystemExit, match="c: nothing"):
        job.count([("c", 1, 1)], job.stored(tmp_path))


@pytest.mark.parametrize("bias", [False, True])
def test_probing_finds_the_weight(bias: bool) -> None:
    linear = nn.Linear(5, 3, bias=bias)
    with torch.no_grad():
        assert torch.allclose(job.probe(linear, 3, 5, torch.float32), linear.weight, atol=1e-6)


def test_only_peers_with_the_same_linears_are_compared() -> None:
    rows = [
        Row("p gptq", gptq=True, kld=0.4),
        Row("p gptq asym", gptq=True, kld=0.2),
        Row("p other", kld=0.1),
        Row("p easy", gptq=True, kld=0.01, left=["down"]),
        Row("p broken", gptq=True, kld=0.0, failed="no"),
    ]
    cells = [
        Cell(3, 64, [*rows, Row("ours x", kld=0.1, ours=True)]),
        Cell(4, 64, [rows[0], Row("ours x", kld=0.1, ours=True)]),
    ]
    found = best_ratios(cells, ["ours x"])["ours x"]
    first = found["cells"][cells[0].label]
    assert [first[kind]["best"] for kind in KINDS] == ["p gptq", "p gptq asym", "p other"]
    assert [first[kind]["ratio"] for kind in KINDS] == [0.25, 0.5, 1.0]
    assert found["geometric_means"]["best of GPTQ"] == pytest.approx(math.sqrt(0.5 * 0.25))


def test_a_variant_runs_only_in_cells_it_can_be_asked_for() -> None:
    by_label = {variant.label: variant for variant in table.VARIANTS}
    assert len(by_label) == len(table.VARIANTS)
    assert by_label["bitsandbytes nf4"].fits(4, 64)
    assert not by_label["bitsandbytes nf4"].fits(3, 64)
    assert not by_label["bitsandbytes nf4"].fits(4, 128)
    mixes = [variant for variant in table.VARIANTS if variant.fits(3.5, 64)]
    assert mixes
    assert not any(variant.fits(bits, 64) for variant in mixes for bits in (2, 3, 4))


def test_every_peer_has_an_environment_and_a_runner() -> None:
    assert set(table.PEERS) == set(venvs.PINS)
    for peer in table.PEERS:
        text = (BENCH / "peers" / f"run_{peer}.py").read_text()
        assert "import llmcompress" not in text.replace("import llmcompressor", "")
        assert "from llmcompress." not in text


def test_a_process_is_measured_and_its_failure_quoted(tmp_path: Path) -> None:
    outside = process.environment(1, tmp_path / "home")
    code = "import os, sys; sys.stdout.write(os.environ['HOME']); sys.exit(int(sys.argv[1]))"
    made = process.launch([sys.executable, "-c", code, "0"], outside, tmp_path / "log", 60, stdout=tmp_path / "said")
    assert (tmp_path / "said").read_text() == str(tmp_path / "home")
    assert made.wall_seconds > 0
    assert made.peak_mib > 1
    with pytest.raises(process.Failed, match="exit 3"):
        process.launch([sys.executable, "-c", code, "3"], outside, tmp_path / "log", 60)
    with pytest.raises(process.Failed, match="exit -9"):
        process.launch([sys.executable, "-c", "import time; time.sleep(60)"], outside, tmp_path / "log", 0.5)


def test_a_cell_is_written_as_json() -> None:
    cell = Cell(3.5, 64)
    cell.add(Row("p", kld=0.5))
    assert cell.mix
    assert json.loads(json.dumps(cell.document()))["rows"][0]["label"] == "p"
