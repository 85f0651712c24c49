"""Output-side feedback: what it minimises, what it reduces to, and when it is taken."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmcompress.compress import planning, trial
from llmcompress.compress.allocate.budget import parse_budget
from llmcompress.compress.curvatures import SEED, output_curvatures
from llmcompress.compress.feedback import damped
from llmcompress.compress.formats import maker
from llmcompress.compress.grid import find_scale
from llmcompress.compress.kronecker import DAMP, row_factor
from llmcompress.compress.measuring import MeasureJob
from llmcompress.compress.pipeline import calibration, open_model, score
from llmcompress.compress.quantizers import gptq, rtn
from llmcompress.compress.rounding import Request, Seen
from llmcompress.compress.scorers.fisher import seed_of
from llmcompress.errors import InputError
from llmcompress.hub.source import Source
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.trace import trace
from llmcompress.recipes import load_recipe
from llmcompress.types import BitAllocation, FeedbackTrial, LinearSpec, QuantizerOptions

SPEC = LinearSpec(bits=2, group_size=6)


def curved(size: int, seed: int) -> Tensor:
    """A symmetric matrix whose directions count very differently."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.randn(size, 3 * size, generator=generator) * torch.logspace(-1, 1, size)[:, None]
    mixed = torch.randn(size, size, generator=generator) @ factor
    return mixed @ mixed.T / (3 * size)


def rounded(weight: Tensor, hessian: Tensor, curvature: Tensor | None, rows: int) -> Tensor:
    options = QuantizerOptions(order="plain", output_feedback=rows)
    requests = [Request(weight, SPEC, curvature)]
    (found,) = gptq.quantize(requests, Seen(hessian), options=options, dtype=torch.float32)
    return found.codes.dequantize()


def test_each_entry_goes_to_where_the_loss_is_least_with_the_entries_to_come_free() -> None:
    """The oracle solves for all entries still unrounded, by the Kronecker product written out."""
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))
    inputs, outputs = curved(6, 1), curved(4, 2)
    full = outputs.double() + DAMP * outputs.double().diagonal().mean() * torch.eye(4).double()
    metric = torch.kron(full, damped(inputs, QuantizerOptions().damp))
    errors, decided = torch.zeros(24).double(), torch.zeros(24, dtype=torch.bool)

    def wanted() -> Tensor:
        best = errors.clone()
        free = ~decided
        best[free] = -torch.linalg.solve(metric[free][:, free], metric[free][:, decided] @ errors[decided])
        return (weight.double().flatten() + best).view(4, 6)

    for row in reversed(range(4)):
        scale = find_scale(wanted()[row : row + 1].float(), SPEC, torch.float32, importance=Seen(inputs).importance)
        for column in range(6):
            step = float(scale)
            code = torch.clamp(torch.round(wanted()[row, column] / step) + 2, 0, 3)
            place = row * 6 + column
            errors[place], decided[place] = (code - 2) * step - weight[row, column], True
    oracle = (weight.double().flatten() + errors).view(4, 6).float()
    assert torch.allclose(rounded(weight, inputs, outputs, 1), oracle, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(rounded(weight, inputs, None, 1), oracle, rtol=1e-4, atol=1e-5)


def test_without_curvature_it_is_gptq() -> None:
    weight, inputs = torch.randn(8, 6, generator=torch.Generator().manual_seed(4)), curved(6, 5)
    plain = rounded(weight, inputs, None, 2)
    assert torch.equal(rounded(weight, inputs, torch.eye(8), 2), plain)
    assert torch.equal(rounded(weight, inputs, curved(8, 6), 8), plain)  # rows of one block do not interact
    assert torch.equal(rounded(weight, inputs, curved(8, 6), 0), plain)
    assert torch.equal(rounded(weight, inputs, torch.full((8, 8), torch.nan), 2), plain)


def test_the_two_sided_loss_falls() -> None:
    """Over a few draws, and more the fewer rows are rounded at a time."""
    totals = dict.fromkeys((0, 8, 1), 0.0)
    for seed in range(8):
        weight = torch.randn(32, 24, generator=torch.Generator().manual_seed(seed))
        inputs, outputs = curved(24, seed + 50), curved(32, seed + 90)
        for rows in totals:
            error = rounded(weight, inputs, outputs, rows) - weight
            totals[rows] += float(((outputs @ error) * (error @ inputs)).sum() / (outputs.trace() * inputs.trace()))
    assert totals[1] < totals[8] < 0.9 * totals[0]


def test_blocks_of_the_factor_are_identities() -> None:
    factor = row_factor(curved(6, 7), 4)
    assert factor is not None
    assert torch.allclose(factor[:4, :4], torch.eye(4), atol=1e-5)
    assert torch.allclose(factor[4:, 4:], torch.eye(2), atol=1e-5)


def test_curvatures_are_those_of_the_whole_model(llama: Path) -> None:
    skeleton = Skeleton.open(llama)
    found, tokens = trace(skeleton), torch.randint(96, (4, 16), generator=torch.Generator().manual_seed(1))
    batches = list(torch.split(tokens, 2))
    names = [x.name for x in found.linears if not x.name.endswith("k_proj")]
    curvatures = output_curvatures(skeleton, found, batches, names)
    assert sorted(curvatures) == sorted(names)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    drawn = [torch.Generator().manual_seed(seed_of(SEED, 0, sequence)) for sequence in range(4)]
    oracle = {name: torch.zeros(len(curvatures[name]), len(curvatures[name])) for name in names}
    kept: dict[str, Tensor] = {}
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda _, __, out, n=name: kept.update({n: out}))
    for place, batch in enumerate(batches):
        logits = model(batch, use_cache=False).logits.flatten(0, 1)
        chances = torch.softmax(logits.detach(), -1).view(2, 16, -1)
        pairs = zip(chances, drawn[2 * place :], strict=False)
        labels = torch.cat([torch.multinomial(x, 1, generator=each).flatten() for x, each in pairs])
        loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        gradients = torch.autograd.grad(loss, [kept[name] for name in names])
        for name, gradient in zip(names, gradients, strict=True):
            oracle[name] += gradient.flatten(0, 1).T @ gradient.flatten(0, 1)
    for name in names:
        assert torch.allclose(curvatures[name], oracle[name], rtol=1e-3, atol=1e-4 * float(oracle[name].max()))


CHANGES = ("plan.bits=[3]", "plan.group_size=32", "calibration.samples=6", "calibration.sequence_length=32")


@pytest.mark.parametrize("change", [-0.1, 0.0, 0.1])
def test_a_plan_takes_it_only_where_the_measured_kl_falls(
    llama: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch, change: float
) -> None:
    """And says so either way. The measurement itself is one of two models on the same text."""
    measured: list[FeedbackTrial] = []
    genuine = trial.try_output_feedback

    def told(job: MeasureJob, allocation: BitAllocation, text: trial.Text) -> FeedbackTrial:
        measured.append(genuine(job, allocation, text))
        return measured[-1].model_copy(update={"kld_with": measured[-1].kld_without + change})

    monkeypatch.setattr(trial, "try_output_feedback", told)
    recipe = load_recipe("balanced", (*CHANGES, f"calibration.source={text_file}", "quantize.output_feedback=16"))
    opened = open_model(Source(llama, "model"), recipe, "cpu")
    batches = calibration(opened, recipe)
    scores = score(opened, recipe, batches, "")
    plan = planning.make_plan(opened, recipe, batches, scores, parse_budget("4.6bits"))
    assert plan.output_feedback is not None
    assert plan.output_feedback.accepted == (change < 0)
    assert plan.options.output_feedback == (16 if change < 0 else 0)
    assert ("accepted" if change < 0 else "refused") in plan.output_feedback.words
    assert measured[0].kld_with != measured[0].kld_without > 0


def test_it_is_refused_for_what_has_no_feedback() -> None:
    with pytest.raises(InputError, match="output_feedback"):
        maker(rtn, QuantizerOptions(output_feedback=16), 64)
