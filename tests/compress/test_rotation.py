"""Rotations and the RMSNorm form: orthogonal matrices, centred streams, learned turns."""

import itertools

import pytest
import torch
from reparam_help import blocks_of, distance, logits_of, model_subject, randomized, tiny, tokens
from torch import Tensor
from transformers import LlamaConfig, OPTConfig

from llmcompress.compress.reparam import rmsnorm, rotate
from llmcompress.compress.rewriting.exact import exact
from llmcompress.compress.rewriting.orthogonal import cayley_step, hadamard, random_hadamard, random_orthogonal
from llmcompress.errors import InputError
from llmcompress.model.stream import hidden_of
from llmcompress.options import ReparamOptions

LAYERNORMS = ("gpt2", "opt", "neox")


@pytest.mark.parametrize("size", [1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 48, 60, 76, 108, 144, 180, 256])
def test_hadamard_matrices(size: int) -> None:
    found = hadamard(size)
    assert found is not None
    assert bool((found.abs() == 1).all())
    assert torch.equal(found @ found.T, size * torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("size", [1, 3, 6, 24, 64, 92, 172, 176])
def test_random_rotations_are_orthogonal(size: int) -> None:
    for draw in (random_hadamard, random_orthogonal):
        one, two = (draw(size, torch.Generator().manual_seed(seed)) for seed in (0, 1))
        assert torch.allclose(one @ one.T, torch.eye(size, dtype=torch.float64), atol=1e-12)
        assert torch.equal(one, draw(size, torch.Generator().manual_seed(0)))
        assert size == 1 or not torch.allclose(one, two)
    known = hadamard(size)
    flat = random_hadamard(size, torch.Generator().manual_seed(0)).abs() * size**0.5
    assert (known is not None) == torch.allclose(flat, torch.ones_like(flat))


def test_a_cayley_step_stays_orthogonal_and_falls() -> None:
    generator = torch.Generator().manual_seed(0)
    point, target = random_orthogonal(12, generator), torch.randn(12, 12, generator=generator, dtype=torch.float64)
    losses = []
    for _ in range(200):
        losses.append(float((target * point).sum()))
        point = cayley_step(point, target, 0.05)
        assert torch.allclose(point @ point.T, torch.eye(12, dtype=torch.float64), atol=1e-10)
    assert all(after < before for before, after in itertools.pairwise(losses[:50]))
    left, _, right = torch.linalg.svd(target)
    lowest = float((target * (-left @ right)).sum())  # of all orthogonal matrices, reflections included
    assert lowest <= losses[-1] < 0.8 * lowest
    first = cayley_step(point, target, 1e-6) - point
    slope = (target @ point.T - point @ target.T) @ point
    assert torch.allclose(first, -slope / (target @ point.T - point @ target.T).norm() * 1e-6, atol=1e-11)


def streams(model: torch.nn.Module) -> list[Tensor]:
    """Hidden states that enter and leave every block."""
    seen: list[Tensor] = []
    handles = []
    for block in blocks_of(model):
        handles.append(block.register_forward_pre_hook(lambda _, args: seen.append(args[0])))
        handles.append(block.register_forward_hook(lambda _, __, output: seen.append(hidden_of(output))))
    with exact(), torch.no_grad():
        model(input_ids=tokens(3), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", LAYERNORMS)
@pytest.mark.parametrize("norms", ["replace", "keep"])
def test_the_stream_is_centred_and_stays_so(family: str, norms: str) -> None:
    model = tiny(family)
    options = ReparamOptions.model_validate({"rmsnorm": {"norms": norms}})
    before = logits_of(model)
    assert max(float(each.mean(-1).abs().max()) for each in streams(model)) > 1e-3
    rmsnorm.rewrite(model_subject(model), options)
    assert max(float(each.mean(-1).abs().max()) for each in streams(model)) < 1e-12
    assert distance(logits_of(model), before) < 1e-10
    kinds = {type(part).__name__ for part in model.modules() if "Norm" in type(part).__name__}
    assert kinds == ({"RMSNorm"} if norms == "replace" else {"LayerNorm"})
    once = {name: value.clone() for name, value in model.state_dict().items()}
    if norms == "replace":
        with pytest.raises(InputError, match="already has RMSNorms"):
            rmsnorm.rewrite(model_subject(model), options)
    else:
        rmsnorm.rewrite(model_subject(model), options)
    assert all(torch.allclose(value, once[name], atol=1e-14) for name, value in model.state_dict().items())


def test_post_norm_models_are_refused() -> None:
    config = OPTConfig(
        vocab_size=61, hidden_size=24, ffn_dim=40, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, word_embed_proj_dim=24, do_layer_norm_before=False,
    )  # fmt: skip
    model = randomized(config)
    for plugin in (rmsnorm, rotate):
        with pytest.raises(InputError, match=r"residual|norm"):
            plugin.rewrite(model_subject(model), ReparamOptions())


def test_tied_embeddings_are_untied_once() -> None:
    model = tiny("llama_tied")
    embedding = model.get_input_embeddings()
    assert model.get_output_embeddings().weight is embedding.weight
    result = rotate.rewrite(model_subject(model), ReparamOptions())
    assert model.get_output_embeddings().weight is not embedding.weight
    assert model.config.tie_word_embeddings is False
    assert any("weight of its own" in note for note in result.notes)
    assert not rotate.rewrite(model_subject(model), ReparamOptions()).notes


def kurtosis(weight: Tensor) -> float:
    """Excess kurtosis of all entries."""
    centred = weight - weight.mean()
    return float(centred.pow(4).mean() / centred.square().mean() ** 2 - 3)


def test_rotation_spreads_outliers() -> None:
    config = LlamaConfig(
        vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32,
    )  # fmt: skip
    model = randomized(config)
    block = blocks_of(model)[0]
    block.self_attn.q_proj.weight[:, 5] *= 30  # type: ignore[operator, index, union-attr]
    block.mlp.down_proj.weight[7] *= 30  # type: ignore[operator, index, union-attr]
    watched = ("self_attn.q_proj", "mlp.down_proj")
    before, hidden = [kurtosis(block.get_submodule(name).weight) for name in watched], streams(model)[1]  # type: ignore
    rotate.rewrite(model_subject(model), ReparamOptions())
    after, turned = [kurtosis(block.get_submodule(name).weight) for name in watched], streams(model)[1]  # type: ignore
    assert min(before) > 20
    assert max(map(abs, after)) < 1.5
    assert torch.allclose(hidden.norm(dim=-1), turned.norm(dim=-1))
    peak = [float((each.abs().amax(-1) / each.square().mean(-1).sqrt()).mean()) for each in (hidden, turned)]
    assert peak[1] < 0.6 * peak[0]
    for norm in ("input_layernorm", "post_attention_layernorm"):
        assert torch.equal(block.get_submodule(norm).weight, torch.ones(64, dtype=torch.float64))


def test_values_are_turned_inside_heads_only_if_asked() -> None:
    def rotated(**options: object) -> Tensor:
        model = tiny("llama")
        rotate.rewrite(model_subject(model), ReparamOptions.model_validate({"rotate": options}))
        found: Tensor = blocks_of(model)[0].self_attn.v_proj.weight  # type: ignore[union-attr, assignment]
        return found

    plain, turned = rotated(heads=False), rotated()
    assert not torch.allclose(plain, turned)
    for head in range(2):
        rows = slice(6 * head, 6 * head + 6)
        assert torch.allclose(plain[rows].T @ plain[rows], turned[rows].T @ turned[rows])
    assert not torch.allclose(rotated(heads=False, seed=1), plain)


@pytest.mark.parametrize("family", ["llama", "neox"])
def test_learned_rotations_lower_the_divergence_of_rounded_activations(family: str) -> None:
    found = {}
    for learn in (False, True):
        model = tiny(family)
        model.get_input_embeddings().weight[:, [5, 9]] *= 10
        before = logits_of(model)
        subject = model_subject(model)
        options = {"rotate": {"base": "identity", "learn": learn, "steps": 25, "bits": 3}}
        rotate.rewrite(subject, ReparamOptions.model_validate(options))
        assert distance(logits_of(model), before) < 1e-10
        with torch.no_grad(), exact():
            found[learn] = float(rotate.quantized_kl(model, {}, subject.calls, 3))
            assert float(rotate.quantized_kl(model, {}, subject.calls, 16)) < 1e-6
    assert found[True] < 0.7 * found[False]


def test_learning_never_ends_above_its_start() -> None:
    found = []
    for learn in (False, True):
        model = tiny("llama")
        subject = model_subject(model)
        options = {"rotate": {"learn": learn, "steps": 3, "rate": 100.0, "bits": 6}}  # wild steps
        rotate.rewrite(subject, ReparamOptions.model_validate(options))
        with torch.no_grad(), exact():
            found.append(float(rotate.quantized_kl(model, {}, subject.calls, 6)))
    assert found[1] <= found[0] * (1 + 1e-9)
