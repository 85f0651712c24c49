"""The contract every reparameterization keeps: the function stays, or the family is refused with a reason."""

import copy
from pathlib import Path

import pytest
import torch
from reparam_help import (
    FAMILIES,
    SIZES,
    block_subject,
    blocks_of,
    distance,
    logits_of,
    model_subject,
    randomized,
    tiny,
)
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig

from llmcompress.compress.rewriting.edits import BiasedNorm
from llmcompress.compress.rewriting.work import TOLERANCE, Call, Rewritten, Subject, working
from llmcompress.errors import InputError
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import BlockStream
from llmcompress.options import ReparamOptions
from llmcompress.plugins import available, find, summary

PACKAGE = "llmcompress.compress.reparam"
NAMES = available(PACKAGE)
VARIANTS: dict[str, list[dict[str, object]]] = {
    "smooth": [{}, {"alpha": 0.8}],
    "repquant": [{}, {"bias": True}, {"clip": "grid", "bits": 4}, {"clip": "learn", "steps": 3}],
    "awq": [{"ratios": 4}, {"ratios": 3, "duo": True, "clip": True, "bits": 3, "group_size": 8}],
    "equalize": [{}, {"by": "activations"}],
    "rmsnorm": [{}, {"norms": "keep"}],
    "rotate": [{}, {"base": "orthogonal", "heads": False}, {"learn": True, "steps": 2}],
}
RMS_FAMILIES = ("llama", "llama_tied", "qwen3", "gemma", "phi3")
REFUSED = {("rmsnorm", family): "already has RMSNorms" for family in RMS_FAMILIES} | {
    ("rmsnorm", "gemma2"): "writes the residual",
    ("rotate", "gemma2"): "writes the residual",
}
LINKED = {"gpt2": 1, "neox": 1}  # GELU between the linears of the MLP cannot be scaled through; elsewhere there are two


def apply(name: str, model: nn.Module, options: ReparamOptions) -> list[Rewritten]:
    """Rewrite a model, whole or block by block."""
    plugin = find(PACKAGE, name)
    if plugin.SCOPE == "model":
        return [plugin.rewrite(model_subject(model), options)]
    return [plugin.rewrite(block_subject(model, index), options) for index in range(len(blocks_of(model)))]


def test_every_plugin_says_what_it_is() -> None:
    assert set(VARIANTS) == set(NAMES)
    for name in NAMES:
        assert find(PACKAGE, name).SCOPE in ("block", "model")
        assert len(summary(PACKAGE, name)) > 20


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", NAMES)
def test_the_function_stays_or_the_family_is_refused(name: str, family: str) -> None:
    for variant in VARIANTS[name]:
        model = tiny(family)
        before = logits_of(model)
        state = {key: value.clone() for key, value in model.state_dict().items()}
        options = ReparamOptions.model_validate({name: variant})
        if (name, family) in REFUSED:
            with pytest.raises(InputError, match=REFUSED[name, family]):
                apply(name, model, options)
            assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
            continue
        results = apply(name, model, options)
        assert distance(logits_of(model), before) <= TOLERANCE
        assert all(result.sites and not result.fallbacks for result in results)
        assert all(result.difference <= TOLERANCE for result in results)
        assert any(not torch.equal(state[key], value) for key, value in model.state_dict().items() if key in state)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_is_found(family: str) -> None:
    model = tiny(family)
    options = ReparamOptions.model_validate({"awq": {"ratios": 2}})
    links = LINKED.get(family, 2)
    assert [len(result.sites) for result in apply("smooth", model, options)] == [2, 2]
    assert [len(result.sites) for result in apply("repquant", model, options)] == [2 + links, 2 + links]
    assert [len(result.sites) for result in apply("equalize", model, options)] == [links, links]
    assert [len(result.sites) for result in apply("awq", model, options)] == [2 + links, 2 + links]


@pytest.mark.parametrize("family", FAMILIES)
def test_rewrites_compose(family: str) -> None:
    model = tiny(family)
    before = logits_of(model)
    options = ReparamOptions.model_validate({"awq": {"ratios": 2}, "repquant": {"bias": family != "llama"}})
    order = ["smooth", "equalize", "repquant", "awq"]
    whole = [name for name in ("rmsnorm", "rotate") if (name, family) not in REFUSED]
    for name in [*whole, *order, *reversed(order)]:
        assert all(result.sites for result in apply(name, model, options))
    assert distance(logits_of(model), before) <= TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_dtypes_and_mode_are_given_back(name: str) -> None:
    family = "gpt2" if name == "rmsnorm" else "llama"
    model = tiny(family).float().train()
    before = logits_of(copy.deepcopy(model).double().eval())
    apply(name, model, ReparamOptions.model_validate({"repquant": {"bias": True}, "awq": {"ratios": 2}}))
    assert model.training
    assert {tensor.dtype for tensor in [*model.parameters(), *model.buffers()] if tensor.is_floating_point()} == {
        torch.float32
    }
    assert distance(logits_of(model.double().eval()), before) < 1e-5


def test_an_edit_that_changes_the_output_is_undone() -> None:
    model = tiny("llama")
    subject = block_subject(model)
    block = subject.module
    state = {key: value.clone() for key, value in block.state_dict().items()}
    norm, linear = block.get_submodule("input_layernorm"), block.get_submodule("self_attn.q_proj")

    def wrong() -> None:
        norm.weight.data.mul_(1.001)  # type: ignore[operator, union-attr]
        linear.bias = nn.Parameter(torch.ones(24, dtype=torch.float64))
        block.input_layernorm = BiasedNorm(norm, torch.ones(24, dtype=torch.float64))

    with working(subject) as work:
        assert not work.attempt("both", [block, norm, linear], wrong)
        with pytest.raises(InputError, match="the output would change"):
            work.require("both", [block, norm, linear], wrong)
    assert [fallback.where for fallback in work.result().fallbacks] == ["both", "both"]
    assert "would change by" in work.result().fallbacks[0].reason
    assert block.state_dict().keys() == state.keys()
    assert all(torch.equal(state[key], value) for key, value in block.state_dict().items())


def test_nan_is_no_agreement() -> None:
    subject = block_subject(tiny("llama"))
    norm = subject.module.get_submodule("input_layernorm")
    with working(subject) as work:
        assert not work.attempt("norm", [norm], lambda: norm.weight.data.mul_(torch.nan))  # type: ignore
    assert bool(torch.isfinite(norm.weight).all())  # type: ignore[arg-type]


def test_a_subject_without_calls_is_refused() -> None:
    for name in NAMES:
        with pytest.raises(InputError, match="at least one call"):
            find(PACKAGE, name).rewrite(Subject(tiny("llama"), ()), ReparamOptions())


def test_experts_are_left_alone_with_a_reason() -> None:
    config = MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=3)
    model = randomized(config).float()
    before = logits_of(copy.deepcopy(model).double())
    result = apply("smooth", model, ReparamOptions())[0]
    assert result.sites == ("input_layernorm",)
    with pytest.raises(InputError, match="something else writes the residual"):
        apply("rotate", model, ReparamOptions())
    assert distance(logits_of(model.double()), before) < 1e-5


def test_a_streamed_block_is_rewritten_while_the_rest_is_not_loaded(llama: Path) -> None:
    skeleton = Skeleton.open(llama)
    stream = BlockStream(skeleton)
    batches = [torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    whole = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    hidden, calls = stream.start(batches)
    skeleton.free_rest()
    for index in range(len(skeleton.blocks)):
        block = skeleton.load_block(index)
        inputs = [Call((each, *call[index].args), call[index].kwargs) for each, call in zip(hidden, calls, strict=True)]
        for name in ("smooth", "equalize", "awq", "repquant"):
            assert find(PACKAGE, name).rewrite(Subject(block, inputs), ReparamOptions()).sites
        hidden = [call.run(block) for call in inputs]
        skeleton.free(block)
    skeleton.load_rest()
    for ids, states in zip(batches, hidden, strict=True):
        with torch.no_grad():
            assert distance(stream.leave(ids, states), whole(input_ids=ids).logits) < 1e-5


def test_native_says_what_plain_transformers_opens(tmp_path_factory: pytest.TempPathFactory) -> None:
    cases = [("rotate", "llama_tied", {}), ("rmsnorm", "gpt2", {"rmsnorm": {"norms": "keep"}}), ("smooth", "opt", {})]
    cases += [("rmsnorm", "opt", {"rmsnorm": {"norms": "keep"}}), ("rotate", "gemma", {}), ("repquant", "neox", {})]
    for name, family, options in cases:
        model = tiny(family)
        before = logits_of(model)
        assert all(result.native for result in apply(name, model, ReparamOptions.model_validate(options)))
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
        assert distance(logits_of(again), before) <= TOLERANCE
    for name, family, options in [("repquant", "llama", {"repquant": {"bias": True}}), ("rotate", "gpt2", {})]:
        result = apply(name, tiny(family), ReparamOptions.model_validate(options))[0]
        assert not result.native
        assert result.notes
