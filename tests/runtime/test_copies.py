"""Packed models copied, pickled and filled anew, which must neither share nor keep what was made of weights."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import llmcompress
from llmcompress.compress.allocate.budget import parse_budget
from llmcompress.compress.run import QuantizeRequest, quantize
from llmcompress.errors import InputError
from llmcompress.hub.source import Source
from llmcompress.kernels import backends
from llmcompress.kernels.samples import random_codes
from llmcompress.kernels.stored import tensors_of
from llmcompress.recipes import load_recipe
from llmcompress.runtime.modules import PackedLinear
from llmcompress.spec import InputSpec, LinearSpec
from tests.conftest import llama_config, save_model

TOKENS = torch.arange(3, 33)[None]
FORMATS = {
    "int": LinearSpec(bits=4, group_size=32),
    "nf4": LinearSpec(bits=4, group_size=64, kind="nf4", double=True),
    "int8": LinearSpec(bits=8, group_size=128, kind="int8", inputs=InputSpec(bits=8, scale="token")),
}


@pytest.fixture(scope="module")
def output(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in 4 bits."""
    folder = tmp_path_factory.mktemp("copies") / "out"
    recipe = load_recipe("fast", ("plan.bits=[4]", "plan.group_size=64"))
    list(quantize(QuantizeRequest(Source(llama, "llama"), folder, recipe, parse_budget("4.5bits"), "cpu", "")))
    return folder


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    found: Tensor = model(TOKENS).logits
    return found


def test_a_model_that_was_used_is_copied_and_pickled(output: Path) -> None:
    model = llmcompress.load(output)
    wanted = logits_of(model)
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    assert all(torch.equal(logits_of(twin), wanted) for twin in twins)
    for twin in twins:
        for module in twin.modules():
            if isinstance(module, PackedLinear):
                module.qweight.zero_()
    assert torch.equal(logits_of(model), wanted)
    assert torch.equal(logits_of(twins[0]), logits_of(twins[1]))
    assert not torch.equal(logits_of(twins[0]), wanted)


def test_what_torch_saves_it_loads_again(llama: Path, tmp_path: Path) -> None:
    recipe = load_recipe("fast", ("plan.bits=[4]", "plan.group_size=64", "quantize.correction_rank=2"))
    budget = parse_budget("7bits")
    list(quantize(QuantizeRequest(Source(llama, "llama"), tmp_path / "out", recipe, budget, "cpu", "")))
    model, other = llmcompress.load(tmp_path / "out"), llmcompress.load(tmp_path / "out")
    assert any(not tensor.numel() for tensor in model.state_dict().values())
    torch.save(model.state_dict(), tmp_path / "state.pt")
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(logits_of(other), logits_of(model))


def test_threads_that_load_at_once_get_whole_models(tmp_path: Path) -> None:
    source = Source(save_model(tmp_path / "tied", llama_config(tie_word_embeddings=True)), "tied")
    recipe, budget = load_recipe("fast", ("plan.bits=[4]", "plan.group_size=64")), parse_budget("4.5bits")
    list(quantize(QuantizeRequest(source, tmp_path / "out", recipe, budget, "cpu", "")))
    wanted = logits_of(llmcompress.load(tmp_path / "out"))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: logits_of(llmcompress.load(tmp_path / "out")), range(8)))
    assert all(torch.equal(logits, wanted) for logits in found)


@pytest.mark.parametrize("backend", ["native_cpu", "torch_cpu", "reference"])
@pytest.mark.parametrize("name", FORMATS)
def test_weights_that_come_into_a_linear_that_was_used_are_those_it_multiplies(name: str, backend: str) -> None:
    spec, x = FORMATS[name], torch.randn(3, 128).bfloat16()
    first, second = (
        PackedLinear(spec, tensors_of("", random_codes(spec, 32, 128, seed=seed)), (32, 128)) for seed in range(2)
    )
    able = backends.named(backend).why_not
    reason = able(spec.plain, 32, 128, tokens=3, dtype=x.dtype, device="cpu")
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")
    with backends.use(backend):
        wanted, before = second(x), first(x)
        twin = copy.deepcopy(first)
        for linear in (twin, first):
            linear.load_state_dict(second.state_dict())
            assert torch.equal(linear(x), wanted)
            assert torch.equal(linear.dequantize(), second.dequantize())
        first.settle(x)
        first.load_state_dict(twin.state_dict())
        assert torch.equal(first(x), wanted)
    assert not torch.equal(before, wanted)


@pytest.mark.parametrize(
    ("device", "said"), [("cuda:99", "no CUDA device"), ("gpu", "no such device"), ("", "no such device")]
)
def test_a_device_that_is_not_there_is_refused(output: Path, device: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        llmcompress.load(output, device=device)
