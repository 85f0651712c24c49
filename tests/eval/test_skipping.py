"""Voids skipped per token: against a loop over plain modules, and what must hold whatever the model."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import llama_config, save_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmcompress.compress.scorers.voids import voids_of
from llmcompress.eval.report import VoidSkipping
from llmcompress.eval.skipping import _Rule, void_runs
from llmcompress.model.skeleton import Skeleton

PROMPT, LENGTH = 9, 20


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(0, 3))
def test_the_rule_is_that_of_the_scorer(seed: int, alpha: float) -> None:
    """On one stream, away from position 0; the two share no code."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(7, 2, 5, 4, generator=generator).cumsum(0)
    expected = voids_of(torch.linalg.vector_norm(states.double(), dim=-1), alpha)
    rule = _Rule(alpha)
    for step, pair in enumerate(itertools.pairwise(states)):
        found = rule.voids(*pair)
        assert torch.equal(found[:, 1:], expected[step][:, 1:])
        assert not found[:, 0].any()


def test_voids_of_the_table_in_the_paper_s_terms() -> None:
    lengths = [1.0, 2.0, 3.0, 3.1, 5.0, 5.2]
    states = [torch.tensor([[[x], [x]]]) for x in lengths]
    rule = _Rule(0.8)
    found = [bool(rule.voids(*pair)[0, 1]) for pair in itertools.pairwise(states)]
    assert found == [False, False, False, False, True]


@torch.no_grad()
def slowly(folder: Path, tokens: Tensor, alpha: float, parts: tuple[bool, bool], shown: bool) -> Tensor:
    """Logits of a Llama, token decisions in plain loops; `parts` says whether prompt and response skip."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    hidden = model.model.embed_tokens(tokens)
    places = torch.arange(tokens.shape[1])[None]
    rotary = model.model.rotary_emb(hidden, places)
    mask = torch.full((1, 1, tokens.shape[1], tokens.shape[1]), torch.finfo(torch.float32).min).triu(1)
    changes: list[list[list[float]]] = [[[] for _ in range(tokens.shape[1])] for _ in tokens]
    last = hidden.clone()
    for block in model.model.layers:
        after = block(hidden, attention_mask=mask, position_ids=places, position_embeddings=rotary)
        after = after[0] if isinstance(after, tuple) else after
        new = after.clone()
        for row in range(tokens.shape[0]):
            for place in range(tokens.shape[1]):
                change = float(after[row, place].double().norm() - hidden[row, place].double().norm())
                earlier = changes[row][place]
                limit = alpha * (max(earlier) - min(earlier)) if earlier else 0.0
                earlier.append(change)
                if place == 0 or change >= limit:
                    last[row, place] = after[row, place]
                elif parts[place >= PROMPT]:
                    new[row, place] = hidden[row, place]
        hidden = new
    answer: Tensor = model.lm_head(model.model.norm(last if shown else hidden))
    return answer


def slow_kld(p: Tensor, q: Tensor) -> float:
    p, q = (torch.log_softmax(x.double(), -1) for x in (p, q))
    return float((p.exp() * (p - q)).sum(-1).mean())


def runs_of(folder: Path, batches: list[Tensor], alpha: float) -> VoidSkipping:
    return void_runs(Skeleton.open(folder), Skeleton.open(folder), batches, alpha=alpha, prompt=PROMPT)


@pytest.mark.parametrize("alpha", [0.8, 2.0])
def test_every_run_is_what_a_slow_loop_gives(alpha: float, tmp_path: Path) -> None:
    llama = save_model(tmp_path / "llama", llama_config(num_hidden_layers=6))
    tokens = torch.randint(96, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    runs = {run.protocol: run for run in runs_of(llama, list(tokens.split(2)), alpha).runs}
    expected = slowly(llama, tokens, 0.0, (False, False), False)
    ways = {
        "whole": ((False, False), False),
        "attribution": ((False, False), True),
        "skip prompt": ((True, False), False),
        "skip response": ((False, True), False),
        "skip prompt and response": ((True, True), False),
    }
    assert runs.keys() == ways.keys()
    different = 0
    for name, (parts, shown) in ways.items():
        logits = slowly(llama, tokens, alpha, parts, shown)
        klds = [slow_kld(expected[:, part], logits[:, part]) for part in (slice(PROMPT), slice(PROMPT, None))]
        assert runs[name].kld_prompt.mean == pytest.approx(klds[0], abs=2e-5)
        assert runs[name].kld_response.mean == pytest.approx(klds[1], abs=2e-5)
        different += sum(kld > 1e-3 for kld in klds)
    assert different >= 6
    assert all(share == 1 for share in runs["whole"].usage_prompt + runs["skip prompt"].usage_response)
    assert runs["skip prompt"].usage_prompt == runs["skip prompt and response"].usage_prompt
    assert min(runs["attribution"].usage_response) < 1


def test_the_command_adds_a_section(llama: Path, text_file: Path, run: Callable[..., Any], tmp_path: Path) -> None:
    words = ("--samples", "4", "--sequence-length", "24", "--data", text_file, "-o", "report")
    found = run("eval", llama, "--ref", llama, *words, "--skip-voids", "--void-alpha", "0.5")
    assert found.returncode == 0, found.stderr
    assert "attribution" in found.stdout
    assert "skip prompt and response" in found.stdout
    section = json.loads((tmp_path / "report" / "report.json").read_text())["voids"]
    assert section["alpha"] == 0.5
    assert section["runs"][0]["kld_response"]["mean"] == 0
