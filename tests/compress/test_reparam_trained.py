"""Reparameterizations of really trained models in float32, and what they are for: outliers under static 8-bit codes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reparam_help import block_subject, blocks_of
from transformers import AutoModelForCausalLM

from llmcompress.compress.rewriting.work import TOLERANCE, Call, Subject
from llmcompress.options import ReparamOptions
from llmcompress.plugins import available, find

PACKAGE = "llmcompress.compress.reparam"
BENCH = Path(__file__).resolve().parents[2] / "bench" / "outliers.py"
MODELS = ("tiny1m", "stories260k", "slm4096-gpt2-char")


@pytest.mark.parametrize("name", available(PACKAGE))
def test_trained_models_stay_what_they_are(shared: Path, name: str) -> None:
    for folder in MODELS:
        if name == "rmsnorm" and "gpt2" not in folder:
            continue
        model = AutoModelForCausalLM.from_pretrained(shared / "models" / folder, dtype=torch.float32).eval()
        ids = torch.randint(3, 50, (2, 48), generator=torch.Generator().manual_seed(0))
        model.requires_grad_(False)
        before = model(input_ids=ids).logits
        plugin = find(PACKAGE, name)
        if plugin.SCOPE == "model":
            results = [plugin.rewrite(Subject(model, [Call((), {"input_ids": ids})]), ReparamOptions())]
        else:
            count = len(blocks_of(model))
            results = [plugin.rewrite(block_subject(model, index), ReparamOptions()) for index in range(count)]
        assert all(result.sites and not result.fallbacks for result in results)
        assert all(result.difference <= TOLERANCE for result in results)
        assert float((model(input_ids=ids).logits - before).abs().max() / before.abs().max()) < 2e-4


def test_outliers_of_norms_are_taken_off_static_ranges(shared: Path, tmp_path: Path) -> None:
    text = shared / "data" / "tinystories"
    words = [sys.executable, BENCH, shared / "models" / "tiny1m", "--calibration", text / "train_part_b.txt"]
    words += ["--data", text / "heldout.txt", "--samples", "8", "--length", "64"]
    words += ["--only", "naive", "repquant", "--json", tmp_path / "table.json"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "table.json").read_text())
    assert document["ratios"]["repquant / naive"] < 0.1
    rows = {row["label"]: row for row in document["rows"]}
    assert rows["naive"]["kld"] > 10 * rows["naive, without outliers"]["kld"]
    assert all(row["refused"] == 0 and row["difference"] <= TOLERANCE for row in rows.values())
