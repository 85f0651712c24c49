"""The contract every scorer keeps, and the numbers each must give on inputs with a known answer."""

import math
from pathlib import Path

import pytest
import torch
from scipy import stats

from llmcompress.compress.quantizers import rtn
from llmcompress.compress.scorers.lim import modification
from llmcompress.compress.scorers.zd import z_share
from llmcompress.compress.scoring import ScoreJob, candidates_for
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import BlockStream
from llmcompress.model.text import Batches
from llmcompress.model.trace import trace
from llmcompress.plugins import available, find
from llmcompress.types import LayerScore, LinearSpec, ScorerOptions

PACKAGE = "llmcompress.compress.scorers"


def job_for(folder: Path, **options: str) -> ScoreJob:
    skeleton = Skeleton.open(folder)
    traced = trace(skeleton)
    tokens = torch.randint(96, (6, 24), generator=torch.Generator().manual_seed(0))
    return ScoreJob(
        skeleton=skeleton,
        trace=traced,
        batches=Batches(tokens, "random", "none"),
        candidates=candidates_for(traced, (2, 3, 4), 64),
        scale_dtype=torch.bfloat16,
        quantizer=rtn,
        options=ScorerOptions.model_validate(options),
        batch_size=4,
    )


@pytest.mark.parametrize("name", available(PACKAGE))
def test_contract(name: str, llama: Path) -> None:
    scorer = find(PACKAGE, name)
    job = job_for(llama)
    layers: tuple[LayerScore, ...] = scorer.score(job)
    assert scorer.UNIT in ("nats/token", "proxy loss", "unitless")
    assert [layer.linear for layer in layers] == [x.name for x in job.trace.linears]
    for layer in layers:
        damages = [c.damage for c in sorted(layer.candidates, key=lambda c: c.spec.bits)]
        assert [c.spec.bits for c in layer.candidates] == [2, 3, 4]
        assert damages == sorted(damages, reverse=True)
        assert damages[0] > 0
        assert (layer.importance is not None) == (scorer.UNIT == "unitless")
    assert scorer.score(job_for(llama)) == layers


@pytest.mark.parametrize("mode", ["token", "flat"])
def test_lim_of_known_blocks(mode: str) -> None:
    hidden = torch.randn(3, 10, 16, generator=torch.Generator().manual_seed(0))
    assert modification(hidden, hidden, mode=mode).tolist() == pytest.approx([-1.0] * 3)
    assert modification(hidden, -hidden, mode=mode).tolist() == pytest.approx([1.0] * 3)
    turned = torch.stack([hidden[..., 1::2], -hidden[..., ::2]], -1).flatten(-2)
    turned = torch.stack([-hidden[..., 1::2], hidden[..., ::2]], -1).flatten(-2)  # a quarter turn of every pair
    assert modification(hidden, hidden + turned, mode=mode).tolist() == pytest.approx([-1 / math.sqrt(2)] * 3)
    assert torch.allclose(modification(hidden, hidden + turned), modification(7 * hidden, 7 * (hidden + turned)))


def test_lim_skips_the_first_token_when_asked() -> None:
    before = torch.ones(1, 4, 8)
    after = before.clone()
    after[:, 0] = -100
    assert modification(before, after, skip_first=True).item() == pytest.approx(-1.0)
    assert modification(before, after, skip_first=False).item() == pytest.approx(-0.5)
    assert modification(before, after, mode="flat", skip_first=False).item() == pytest.approx(
        776 / math.sqrt(32 * 80_024)
    )


def test_zd_of_known_distributions() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(2_000_000, generator=generator) * 3 + 5
    uniform = torch.rand(2_000_000, generator=generator) * 4 - 1
    assert z_share([normal]) == pytest.approx(0.15866, abs=1e-3)
    assert z_share([normal], two_sided=True) == pytest.approx(0.31731, abs=1e-3)
    assert z_share([uniform]) == pytest.approx((1 - 1 / math.sqrt(3)) / 2, abs=1e-3)
    spikes = torch.cat([torch.zeros(900), torch.full((100,), 4.0)])
    assert z_share([spikes[:500], spikes[500:]]) == pytest.approx(0.1)


def test_zd_sides_are_an_option(llama: Path) -> None:
    scorer = find(PACKAGE, "zd")
    one, two = scorer.score(job_for(llama)), scorer.score(job_for(llama, zd_sides="two"))
    assert one[0].importance != two[0].importance


def test_hessian_score_is_the_mean_squared_output_error(llama: Path) -> None:
    """tr(dW H dW^T) with H the mean of x x^T equals E |x dW^T|^2, recomputed from the whole model."""
    from transformers import AutoModelForCausalLM

    job = job_for(llama)
    layers = {layer.linear: layer for layer in find(PACKAGE, "hessian").score(job)}
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    name = job.trace.blocks[1].linears[0].name
    seen = []
    model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model(job.batches.tokens)
    inputs = seen[0].flatten(0, 1)
    from llmcompress.compress.grid import find_scale, round_weight

    weight = model.get_submodule(name).weight.detach()
    for candidate in layers[name].candidates:
        codes = round_weight(weight, find_scale(weight, candidate.spec, torch.bfloat16), candidate.spec)
        change = inputs @ (codes.dequantize() - weight).T
        assert candidate.damage == pytest.approx(float(change.square().sum(-1).mean()), rel=1e-3)


def test_fisher_predicts_measured_kl(llama: Path) -> None:
    """The score ranks linears as the KL divergence of really rounding them does, and gives its size."""
    from transformers import AutoModelForCausalLM

    job = job_for(llama)
    tokens = torch.randint(96, (48, 48), generator=torch.Generator().manual_seed(1))
    eight = LinearSpec(bits=4, group_size=64)
    job = ScoreJob(
        skeleton=job.skeleton,
        trace=job.trace,
        batches=Batches(tokens, "random", "none"),
        candidates=dict.fromkeys(job.candidates, (eight,)),
        scale_dtype=torch.bfloat16,
        quantizer=rtn,
        batch_size=16,
    )
    layers = find(PACKAGE, "fisher").score(job)
    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    with torch.no_grad():
        before = torch.log_softmax(model(tokens).logits.double(), -1)
        damages, measured = [], []
        from llmcompress.compress.grid import find_scale, round_weight

        for layer in layers:
            module = model.get_submodule(layer.linear)
            kept = module.weight.clone()
            module.weight.copy_(round_weight(kept, find_scale(kept, eight, torch.bfloat16), eight).dequantize())
            after = torch.log_softmax(model(tokens).logits.double(), -1)
            module.weight.copy_(kept)
            kld = float((before.exp() * (before - after)).sum(-1).mean())
            damages.append(layer.candidates[0].damage)
            measured.append(kld)
    assert stats.spearmanr(damages, measured).statistic > 0.85
    # the last linear has no token or output to interact with: there the prediction is exact to sampling error
    assert damages[-1] == pytest.approx(measured[-1], rel=0.1)


def test_streamed_gradient_equals_autograd_of_the_whole_model(llama: Path) -> None:
    """The block-by-block backward gives the gradient the whole model's backward gives."""
    from llmcompress.compress.scorers.fisher import output_gradient

    skeleton = Skeleton.open(llama)
    stream = BlockStream(skeleton)
    tokens = torch.randint(96, (2, 16), generator=torch.Generator().manual_seed(2))
    hidden, calls = stream.start([tokens])
    state = hidden[0]
    entering = []
    with torch.no_grad():
        for index in range(3):
            skeleton.load_block(index)
            entering.append(state)
            state = stream.run_block(index, state, calls[0][index])
    labels = torch.Generator().manual_seed(5)
    gradient = output_gradient(stream, tokens, state, labels)
    for index in reversed(range(3)):
        leaf = entering[index].detach().requires_grad_(True)
        gradient = torch.autograd.grad(stream.run_block(index, leaf, calls[0][index]), leaf, gradient)[0]
    whole = entering[0].detach().requires_grad_(True)
    state = whole
    for index in range(3):
        state = stream.run_block(index, state, calls[0][index])
    logits = stream.logits_of(tokens, state).flatten(0, 1)
    chosen = torch.multinomial(torch.softmax(logits.detach(), -1), 1, generator=torch.Generator().manual_seed(5))
    loss = torch.nn.functional.cross_entropy(logits, chosen.flatten(), reduction="sum")
    expected = torch.autograd.grad(loss, whole)[0]
    assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-5)
