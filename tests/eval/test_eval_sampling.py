"""The sampling sweep and the stopwatch."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

from llmcompress.eval.loading import context_of, opened
from llmcompress.eval.sampling import (
    NEW_TOKENS,
    continuation,
    continued,
    first_divergence,
    greedy,
    lengths,
    prompts_of,
    repetition,
)
from llmcompress.eval.speed import resident_bytes, speeds

PROMPTS = (torch.arange(30).view(3, 10) * 11) % 96


def test_greedy_is_what_transformers_generates(llama: Path) -> None:
    model = opened(llama, "cpu", torch.float32)
    model.generation_config.eos_token_id = None  # which `greedy` goes past
    how = GenerationConfig(do_sample=False, max_new_tokens=20, pad_token_id=0)
    theirs = model.generate(PROMPTS, attention_mask=torch.ones_like(PROMPTS), generation_config=how)
    assert torch.equal(greedy(model, PROMPTS, 20), theirs[:, 10:])


@given(st.lists(st.integers(0, 2), min_size=1, max_size=12), st.lists(st.integers(0, 2), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_first_divergence_is_where_a_reader_sees_the_first_difference(left: list[int], right: list[int]) -> None:
    size = min(len(left), len(right))
    expected = next((i for i in range(size) if left[i] != right[i]), size)
    assert first_divergence(torch.tensor([left[:size]]), torch.tensor([right[:size]])) == [expected]


@given(st.lists(st.integers(0, 2), max_size=25))
@settings(max_examples=60, deadline=None)
def test_repetition_counts_grams_that_were_there_before(row: list[int]) -> None:
    grams = [row[i : i + 4] for i in range(len(row) - 3)]
    again = sum(gram in grams[:i] for i, gram in enumerate(grams))
    assert repetition(row) == pytest.approx(again / len(grams) if grams else 0.0)


def test_a_model_against_itself_never_parts_and_noise_makes_it_part_sooner(llama: Path) -> None:
    same = continued((llama, llama), PROMPTS.repeat(1, 2), "cpu")[-1]
    assert (same.first_divergence.mean, same.identical) == (same.new_tokens, 1.0)
    assert same.repetition_reference == same.repetition_candidate
    model = opened(llama, "cpu", torch.float32)
    clean, means = greedy(model, PROMPTS, 40), []
    for noise in (0.003, 0.1):
        noisy = opened(llama, "cpu", torch.float32)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in noisy.parameters():
                parameter.add_(torch.randn_like(parameter) * noise)
        means.append(continuation(clean, greedy(noisy, PROMPTS, 40), prompt_tokens=10).first_divergence.mean)
    assert means[0] > means[1]


@pytest.mark.parametrize("context", [None, 40, 96, 2000])
def test_continuations_fit_the_context(context: int | None) -> None:
    found = lengths(32, context)
    assert all(32 + n <= (context or 2000) for n in found)
    assert found == tuple(n for n in NEW_TOKENS if 32 + n <= (context or 2000)) or found == (8,)
    assert prompts_of(torch.zeros(40, 512)).shape == (16, 32)
    assert prompts_of(torch.zeros(3, 10)).shape == (3, 5)


def test_speeds_are_of_both_models_as_users_load_them(llama: Path) -> None:
    found = speeds((llama, llama), PROMPTS, "cpu")
    assert [(speed.side, speed.batch) for speed in found] == [
        ("reference", 1), ("reference", 8), ("candidate", 1), ("candidate", 8),
    ]  # fmt: skip
    model = opened(llama, "cpu")
    weights = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    for speed in found:
        assert speed.prompt_tokens + speed.new_tokens <= (context_of(model) or 0)
        assert speed.resident_bytes == weights
        assert speed.peak_bytes is None or speed.peak_bytes > weights
        assert speed.dtype == "float32"


def test_tied_weights_are_resident_once() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    assert resident_bytes(model) == 8 * 8 * 4
