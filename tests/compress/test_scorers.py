"""The contract every scorer keeps, and the damage measures against the whole model."""

from pathlib import Path

import pytest
import torch
from scipy import stats
from scoring_help import PACKAGE, job_for, scored

from llmcompress.compress.quantizers import rtn
from llmcompress.compress.scoring import ScoreJob, run_scorers
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import BlockStream
from llmcompress.model.text import Batches
from llmcompress.plugins import available, find
from llmcompress.types import LayerScore, LinearSpec


@pytest.mark.parametrize("name", available(PACKAGE))
def test_contract(name: str, llama: Path) -> None:
    scorer = find(PACKAGE, name)
    job = job_for(llama)
    layers: tuple[LayerScore, ...] = run_scorers((name,), job)[name].layers
    assert scorer.UNIT in ("nats/token", "proxy loss", "unitless")
    assert [layer.linear for layer in layers] == [x.name for x in job.trace.linears]
    for layer in layers:
        damages = [c.damage for c in sorted(layer.candidates, key=lambda c: c.spec.bits)]
        assert [c.spec.bits for c in layer.candidates] == [2, 3, 4]
        assert damages == sorted(damages, reverse=True)
        assert damages[0] > 0 or name == "working_point"  # where what is within the noise counts nothing
        assert (layer.importance is not None) == (scorer.UNIT == "unitless")
    assert sum(layer.candidates[0].damage for layer in layers) > 0
    assert hasattr(scorer, "observer") != hasattr(scorer, "score")
    assert scored(llama, name).layers == layers


def test_hessian_score_is_the_mean_squared_output_error(llama: Path) -> None:
    """tr(dW H dW^T) with H the mean of x x^T equals E |x dW^T|^2, recomputed from the whole model."""
    from transformers import AutoModelForCausalLM

    job = job_for(llama)
    layers = {layer.linear: layer for layer in scored(llama, "hessian").layers}
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
    layers = find(PACKAGE, "fisher").score(job).layers
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
    gradient = output_gradient(stream, tokens, state, [torch.Generator().manual_seed(seed) for seed in (5, 6)])
    for index in reversed(range(3)):
        leaf = entering[index].detach().requires_grad_(True)
        gradient = torch.autograd.grad(stream.run_block(index, leaf, calls[0][index]), leaf, gradient)[0]
    whole = entering[0].detach().requires_grad_(True)
    state = whole
    for index in range(3):
        state = stream.run_block(index, state, calls[0][index])
    logits = stream.logits_of(tokens, state).flatten(0, 1)
    drawn = zip(torch.softmax(logits.detach(), -1).chunk(2), (5, 6), strict=True)
    chosen = torch.cat([torch.multinomial(x, 1, generator=torch.Generator().manual_seed(seed)) for x, seed in drawn])
    loss = torch.nn.functional.cross_entropy(logits, chosen.flatten(), reduction="sum")
    expected = torch.autograd.grad(loss, whole)[0]
    assert torch.allclose(gradient, expected, rtol=1e-4, atol=1e-5)
