"""`eval` as a proof: exact zeros, identities of theory, and an independent computation in float64."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import TEXT
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmcompress.cli import cli
from llmcompress.eval.fidelity import by_token
from llmcompress.eval.run import EvalRequest, run_eval
from llmcompress.eval.statistics import cluster_t
from llmcompress.hub.source import resolve
from llmcompress.model.text import TextRequest, load_tokenizer, sample_tokens, token_batches


def rounded(source: Path, folder: Path, steps: float) -> Path:
    """A copy of a model with the matrices of its blocks rounded to `steps` steps from 0 to the largest weight."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "layers" in name:
                size = parameter.abs().max() / steps
                parameter.copy_((parameter / size).round() * size)
    model.save_pretrained(folder)
    for path in source.glob("*token*.json"):
        shutil.copy(path, folder)
    return folder


def test_a_model_against_itself_is_perfect_in_every_figure(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT * 20)
    words = ["eval", str(llama), "--ref", str(llama), "--data", "text.txt", "--samples", "6"]
    words += ["--sequence-length", "48", "--sweep", "--speed", "-o", "out", "-q"]
    found = CliRunner().invoke(cli, words)
    assert found.exit_code == 0, found.output
    for start in ("KL          0.00000", "top-1       1.0000", "tokens ", "blocks ", "greedy ", "speed ", "memory "):
        assert any(line.startswith(start) for line in found.output.splitlines()), start
    report = json.loads(Path("out/report.json").read_text())
    summary, tokens, sampling = report["summary"], report["tokens"], report["sampling"]
    zeros = [summary["kld_largest_position"], summary["dnll"]["mean"], *report["per_sequence"]["kld"]]
    zeros += [*report["per_sequence"]["dnll"], tokens["flips"]["changed"]]
    zeros += [entry["value"] for entry in (*summary["kld_quantiles"], *tokens["kld_quantiles"])]
    zeros += [entry["kld"] for entry in (*tokens["kld_by_position"], *tokens["worst"])]
    zeros += [entry["relative_error"] for entry in report["trajectory"]]
    for entry in (*sampling["temperatures"], *tokens["top"], {"kld": summary["kld"]}):
        zeros += [entry["kld"]["mean"], entry["kld"]["low"], entry["kld"]["high"]]
    assert set(zeros) == {0.0}
    assert {entry["overlap"] for entry in tokens["top"]} | set(report["per_sequence"]["top1"]) == {1.0}
    assert all(entry["identical"] == 1.0 for entry in sampling["continuations"])
    assert len(report["trajectory"]) == 4
    assert report["footprint"]["resident_bytes"] == report["footprint"]["reference_resident_bytes"] > 0


def test_on_text_of_the_reference_the_rise_of_the_loss_is_the_divergence(llama: Path, tmp_path: Path) -> None:
    """E[NLL of candidate - NLL of reference] = E[KL(reference || candidate)] where the reference wrote the text."""
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    tokens = sample_tokens(model, load_tokenizer(llama), samples=160, sequence_length=60, seed=0)
    other = AutoModelForCausalLM.from_pretrained(rounded(llama, tmp_path / "other", 2), dtype=torch.float32)
    with torch.no_grad():
        found = by_token(model(tokens).logits, other(tokens).logits, tokens)
    klds = torch.stack([one.kld[:-1].mean() for one in found])
    rises = torch.stack([(one.nll[1] - one.nll[0]).mean() for one in found])
    low, high = cluster_t((rises - klds).numpy(), 0.999) or (math.nan, math.nan)
    assert low < 0 < high
    assert high - low < 0.5 * float(klds.mean())  # so that this could fail


def independent(reference: Path, candidate: Path, tokens: Tensor) -> dict[str, Any]:
    """KL and perplexities of whole models in float64, a token at a time."""
    sides = [AutoModelForCausalLM.from_pretrained(folder).double().eval() for folder in (reference, candidate)]
    klds, losses, agree = [], [[], []], 0  # type: ignore[var-annotated]
    with torch.no_grad():
        for row in tokens:
            p, q = (torch.log_softmax(side(row[None]).logits[0].double(), dim=-1) for side in sides)
            klds.append(sum(float(torch.sum(a.exp() * (a - b))) for a, b in zip(p, q, strict=True)) / len(row))
            agree += sum(int(a.argmax()) == int(b.argmax()) for a, b in zip(p, q, strict=True))
            for place in range(len(row) - 1):
                losses[0].append(-float(p[place, row[place + 1]]))
                losses[1].append(-float(q[place, row[place + 1]]))
    return {
        "kld": sum(klds) / len(klds),
        "perplexities": [math.exp(sum(each) / len(each)) for each in losses],
        "top1": agree / tokens.numel(),
    }


@pytest.mark.parametrize("name", ["demo", "tiny1m"])
def test_figures_equal_an_independent_computation(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = None if name == "demo" else request.getfixturevalue("shared")
    source = resolve("demo" if folder is None else str(folder / "models" / name))
    data = "builtin" if folder is None else str(folder / "data" / "tinystories" / "heldout.txt")
    text = TextRequest(data, 6, 128, 0, "evaluation")
    other = resolve(str(rounded(source.path, tmp_path / "other", 7)))
    report = run_eval(EvalRequest(other, source, text, 4, "cpu", "")).summary
    expected = independent(source.path, other.path, token_batches(text, source.path).tokens)
    assert report.kld.mean == pytest.approx(expected["kld"], rel=1e-6)
    found = [report.perplexity_reference, report.perplexity_candidate]
    assert found == pytest.approx(expected["perplexities"], rel=1e-6)
    assert report.top1.mean == pytest.approx(expected["top1"])
