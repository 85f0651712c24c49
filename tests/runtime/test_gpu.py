"""Checkpoints loaded on a GPU: what they compute, what they take, and graphs of them."""

from pathlib import Path

import pytest
import torch

import llmcompress
from llmcompress.compress.allocate.budget import parse_budget
from llmcompress.compress.run import QuantizeRequest, quantize
from llmcompress.hub.source import Source
from llmcompress.preflight import check_source
from llmcompress.recipes import load_recipe
from llmcompress.runtime.modules import PackedLinear
from llmcompress.runtime.shards import ShardReader
from tests.conftest import llama_config, save_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
TOKENS = torch.arange(3, 33)[None]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in 2, 3, 4 and 8 bits."""
    folder = tmp_path_factory.mktemp("gpu")
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}
    source = Source(save_model(folder / "model", llama_config(**sizes)), "model")
    recipe = load_recipe("fast", ("quantizer=rtn", "plan.bits=[2, 3, 4, 8]", "plan.group_size=64"))
    list(quantize(QuantizeRequest(source, folder / "out", recipe, parse_budget("3.5bits"), "cpu", "")))
    return folder / "out"


def test_logits_and_tokens_are_those_of_the_cpu(mixed: Path) -> None:
    there, here = (llmcompress.load(mixed, dtype=torch.float32, device=device) for device in ("cuda", "cpu"))
    with torch.no_grad():
        found, wanted = there(TOKENS.cuda()).logits.cpu(), here(TOKENS).logits
    assert float((found - wanted).abs().max()) < 1e-3
    packed = [module for module in there.modules() if isinstance(module, PackedLinear)]
    assert all(module.siblings.settled for module in packed if module.siblings is not None)
    left, right = (
        model.generate(TOKENS.to(model.device), max_new_tokens=12, do_sample=False, pad_token_id=0).cpu()
        for model in (there, here)
    )
    assert torch.equal(left, right)


def test_the_device_holds_the_packed_weights_and_no_more(mixed: Path) -> None:
    torch.zeros((8, 8), device="cuda") @ torch.zeros((8, 8), device="cuda")  # the library's own workspace
    before = torch.cuda.memory_allocated()
    model = llmcompress.load(mixed, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        model(TOKENS.cuda())
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert packed
    on_device = sum(t.numel() * t.element_size() for module in packed for t in module._working()[1] if t.ndim > 1)
    dense = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()] if t.is_cuda)
    shards = sum(path.stat().st_size for path in check_source(mixed, packed=True).paths)
    counters = sum(t.numel() * t.element_size() for module in packed for t in module._working()[1] if t.ndim == 1)
    assert on_device + dense < 1.05 * shards
    assert torch.cuda.memory_allocated() - before < 1.2 * (on_device + dense + counters) + (1 << 20)


def test_saved_from_the_device_it_is_the_same_file(mixed: Path, tmp_path: Path) -> None:
    model = llmcompress.load(mixed, device="cuda")
    with torch.no_grad():
        model(TOKENS.cuda())
    model.save_pretrained(tmp_path)
    before, after = (
        ShardReader(check_source(mixed, packed=True).paths),
        ShardReader(check_source(tmp_path, packed=True).paths),
    )
    assert sorted(before.names()) == sorted(after.names())
    for name in before.names():
        assert torch.equal(before.read(name), after.read(name)), name


def test_compiled_and_captured(mixed: Path) -> None:
    model = llmcompress.load(mixed, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        wanted = model(TOKENS.cuda()).logits
        compiled = torch.compile(model, fullgraph=True)(TOKENS.cuda()).logits
        linear = next(module for module in model.modules() if isinstance(module, PackedLinear))
        x = torch.randn((1, linear.in_features), device="cuda", dtype=torch.bfloat16)
        plain = linear(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = linear(x)
        graph.replay()
        graph.replay()
    assert float((compiled - wanted).abs().max()) < 0.1 * float(wanted.abs().max())
    assert torch.equal(out, plain)
