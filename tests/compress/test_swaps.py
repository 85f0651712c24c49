"""Measured swaps against the whole model with that one weight changed."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scoring_help import job_for, scored

from llmcompress.compress.head import head_input
from llmcompress.compress.measuring import (
    MeasureJob,
    Noise,
    Text,
    changed_weight,
    nearest_width,
    sequence_dnll,
    sequence_kld,
    units_of,
)
from llmcompress.compress.quantizers import gptq, rtn
from llmcompress.compress.scorers.adaquant_delta import LEAST
from llmcompress.compress.swap_scores import base_bits, decreasing, swap_text, uniform_base
from llmcompress.compress.swaps import measure_swaps
from llmcompress.model.stream import BlockStream
from llmcompress.types import LinearSpec, QuantizerOptions

THREE = LinearSpec(bits=3, group_size=64)
PLENTY = 1 << 30


def text() -> Text:
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randint(96, (2, 24), generator=generator) for _ in range(4)]
    return Text(rows[:2], rows[2:])


def measuring(folder: Path, quantizer: object = rtn) -> MeasureJob:
    job = job_for(folder)
    return MeasureJob(job.skeleton, job.trace, quantizer, QuantizerOptions(), torch.bfloat16)  # type: ignore[arg-type]


def whole_model_kld(
    folder: Path, changes: dict[str, LinearSpec], job: MeasureJob, tokens: torch.Tensor
) -> torch.Tensor:
    """KL per sequence of the transformers model with weights replaced by their rounded selves, in float64."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        p = torch.log_softmax(model(tokens).logits.double(), -1)
        for name, change in changes.items():
            weight = model.get_submodule(name).weight
            weight.copy_(changed_weight(job, weight.clone(), None, change))
        q = torch.log_softmax(model(tokens).logits.double(), -1)
    return (p.exp() * (p - q)).sum(-1).mean(-1)


def test_a_swap_is_the_whole_model_with_that_weight_changed(llama: Path) -> None:
    job, parts = measuring(llama), text()
    tokens = torch.cat(parts.judging)
    names = [linear.name for linear in job.trace.linears]
    variants = [{names[0]: THREE}, {names[-1]: THREE}, {names[3]: THREE, names[-2]: THREE}, {"lm_head": THREE}]
    klds = measure_swaps(job, {}, variants, text=parts, memory_bytes=PLENTY)
    assert klds.shape == (5, 4)
    assert float(klds[0].abs().max()) < 1e-9
    for row, changes in zip(klds[1:], variants, strict=True):
        expected = whole_model_kld(llama, changes, job, tokens)
        assert torch.allclose(row, expected, rtol=1e-3, atol=1e-7)


def test_around_a_base_the_base_stays_and_the_change_is_added(llama: Path) -> None:
    job, parts = measuring(llama), text()
    tokens = torch.cat(parts.judging)
    base = {linear.name: LinearSpec(bits=4, group_size=64) for linear in job.trace.every}
    changed = {job.trace.linears[2].name: THREE}
    klds = measure_swaps(job, base, [changed], text=parts, memory_bytes=PLENTY)
    assert torch.allclose(klds[0], whole_model_kld(llama, base, job, tokens), rtol=1e-3)
    assert torch.allclose(klds[1], whole_model_kld(llama, base | changed, job, tokens), rtol=1e-3)


@pytest.mark.parametrize("quantizer", [rtn, gptq])
def test_memory_changes_the_number_of_passes_and_nothing_else(llama: Path, quantizer: object) -> None:
    job, parts = measuring(llama, quantizer), text()
    base = {linear.name: LinearSpec(bits=4, group_size=64) for linear in job.trace.linears}
    variants = [{linear.name: THREE} for linear in job.trace.linears[::3]]
    together = measure_swaps(job, base, variants, text=parts, memory_bytes=PLENTY)
    alone = measure_swaps(job, base, variants, text=parts, memory_bytes=1)
    assert torch.equal(together, alone)


def test_noise_has_the_size_asked_for_and_is_the_same_again() -> None:
    weight = torch.randn(200, 100, generator=torch.Generator().manual_seed(0)) * 3
    job = MeasureJob(None, None, rtn, QuantizerOptions(), torch.bfloat16)  # type: ignore[arg-type]
    noisy = changed_weight(job, weight, None, Noise(0.1, 5))
    assert float((noisy - weight).norm() / weight.norm()) == pytest.approx(0.1, rel=0.02)
    assert torch.equal(noisy, changed_weight(job, weight, None, Noise(0.1, 5)))
    assert not torch.equal(noisy, changed_weight(job, weight, None, Noise(0.1, 6)))


def test_the_hessian_of_the_head_is_the_mean_square_of_what_the_head_reads(llama: Path) -> None:
    job = measuring(llama)
    stream, tokens = BlockStream(job.skeleton), text().judging
    hidden, _ = stream.start(tokens)
    head = job.skeleton.model.get_output_embeddings()
    found = head_input(head, stream, tokens, hidden)
    with torch.no_grad():
        read = job.skeleton.model.model.norm(torch.cat(hidden)).flatten(0, 1)
    assert found is not None
    assert torch.allclose(found.hessian, read.T @ read / len(read), rtol=1e-4, atol=1e-6)


def test_small_divergences_keep_their_digits() -> None:
    logits = torch.randn(3, 50, 200, generator=torch.Generator().manual_seed(1))
    change = 1e-3 * torch.randn(3, 50, 200, generator=torch.Generator().manual_seed(2))
    p, q = torch.log_softmax(logits, -1), torch.log_softmax(logits + change, -1)
    wide = torch.log_softmax(logits.double(), -1), torch.log_softmax((logits + change).double(), -1)
    exact = (wide[0].exp() * (wide[0] - wide[1])).sum(-1).mean(-1)
    assert torch.allclose(sequence_kld(p, q), exact, rtol=2e-3)
    assert float(sequence_kld(p, p).abs().max()) == 0.0


def test_likelihood_rises_as_the_model_gets_worse() -> None:
    logits = torch.zeros(2, 4, 5, dtype=torch.float64)
    tokens = torch.tensor([[0, 1, 2, 3], [4, 3, 2, 1]])
    better = logits.clone()
    better.scatter_(-1, torch.roll(tokens, -1, 1)[..., None], 2.0)  # every next token twice as likely and more
    p, q = torch.log_softmax(better, -1), torch.log_softmax(logits, -1)
    expected = float(torch.log_softmax(torch.tensor([2.0, 0, 0, 0, 0], dtype=torch.float64), 0)[0]) + torch.log(
        torch.tensor(5.0, dtype=torch.float64)
    )
    assert torch.allclose(sequence_dnll(p, q, tokens), expected.expand(2))


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8))
def test_decreasing_is_the_projection(values: list[float]) -> None:
    from scipy.optimize import isotonic_regression

    found = decreasing(values)
    assert found == pytest.approx(isotonic_regression(values, increasing=False).x.tolist(), abs=1e-9)


def test_a_working_point_counts_what_is_gained_and_lost_around_it(llama: Path) -> None:
    found = scored(llama, "working_point", swaps={"base_bits": 3})
    damages = torch.tensor([[c.damage for c in layer.candidates] for layer in found.layers])
    assert bool((damages[:, 0] >= damages[:, 1]).all())
    assert bool((damages[:, 1] >= damages[:, 2]).all())
    assert all(c.standard_error is not None for layer in found.layers for c in layer.candidates)


def test_base_width_is_asked_for_or_nearest_to_the_budget_or_the_middle(llama: Path) -> None:
    job = job_for(llama)
    assert base_bits(job) == 3
    assert base_bits(job_for(llama, swaps={"base_bits": 7})) == 4
    assert {spec.bits for spec in uniform_base(job, 2).values()} == {2}
    assert nearest_width((2, 3, 4), 3.5) == 4
    assert nearest_width((2, 3, 4), 2.4) == 2


def test_text_to_judge_by_is_not_the_text_of_the_hessians(llama: Path) -> None:
    job = job_for(llama, swaps={"tokens": 8, "samples": 2})
    parts = swap_text(job)
    assert torch.equal(torch.cat(parts.calibration), job.batches.tokens[:-2])
    assert torch.equal(torch.cat(parts.judging), job.batches.tokens[-2:, :8])


def test_adaquant_delta_never_falls_below_the_floor(llama: Path) -> None:
    found = scored(llama, "adaquant_delta")
    totals: dict[tuple[str, int], float] = {}
    job = job_for(llama)
    unit = {x.name: name for name, members in units_of(job.trace, job.candidates).items() for x in members}
    for layer in found.layers:
        for candidate in layer.candidates:
            key = (unit[layer.linear], candidate.spec.bits)
            totals[key] = totals.get(key, 0.0) + candidate.damage
    assert min(totals.values()) == pytest.approx(LEAST)
    assert all(totals[name, 4] == pytest.approx(LEAST) for name, _ in totals)
