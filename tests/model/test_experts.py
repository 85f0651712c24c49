"""Experts taken apart compute what transformers' fused ones do, and are traced one by one."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import save_model
from safetensors import safe_open

from llmcompress.experts import Experts
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import BlockStream
from llmcompress.model.trace import trace
from tests.experts_help import EXPERTS, FAMILIES, SIZES, family, plain_logits


@pytest.mark.parametrize("name", FAMILIES)
def test_streamed_apart_equals_the_fused_model(name: str, tmp_path: Path) -> None:
    folder = family(name, tmp_path / name)
    tokens = torch.randint(96, (2, 24))
    found = next(iter(BlockStream(Skeleton.open(folder)).logits([tokens])))
    assert float((found - plain_logits(folder, tokens)).abs().max()) < 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_every_projection_of_every_expert_is_a_linear_and_no_router_is(name: str, tmp_path: Path) -> None:
    folder = family(name, tmp_path / name)
    traced = trace(Skeleton.open(folder))
    names = [key for path in folder.glob("*.safetensors") for key in safe_open(path, "pt").keys()]  # noqa: SIM118
    for block in traced.blocks:
        experts = [linear for linear in block.linears if linear.expert is not None]
        assert {linear.expert for linear in experts} == set(range(EXPERTS))
        stored = {n for n in names if f".layers.{block.index}." in n and ".experts." in n}
        assert {linear.tensor for linear in experts} == stored
        assert len({linear.unit for linear in experts}) == 1
        assert len({linear.shared_input for linear in experts}) == 2 * EXPERTS  # gate and up read one input
        gates = {
            n for n in names if f".layers.{block.index}." in n and n.endswith(("gate.weight", "expert_gate.weight"))
        }
        assert set(block.routers) == gates
        assert not gates & {linear.tensor for linear in block.linears}
    assert traced.untraced_share == 0


def fused_and_apart() -> tuple[Any, Experts]:
    """Experts of a family as transformers keeps them, and the same weights apart."""
    config = transformers.Qwen3MoeConfig(**SIZES, moe_intermediate_size=32, num_experts=EXPERTS, head_dim=16)
    model: Any = transformers.AutoModelForCausalLM.from_config(config)
    fused = model.model.layers[0].mlp.experts
    for parameter in fused.parameters():
        torch.nn.init.normal_(parameter)
    with torch.device("meta"):
        other: Any = transformers.AutoModelForCausalLM.from_config(config)
    apart = Experts(other.model.layers[0].mlp.experts, ("gate_proj", "up_proj", "down_proj"))
    state = {}
    for number in range(EXPERTS):
        gate, up = fused.gate_up_proj[number].chunk(2)
        state |= {f"{number}.gate_proj.weight": gate, f"{number}.up_proj.weight": up}
        state[f"{number}.down_proj.weight"] = fused.down_proj[number]
    apart.load_state_dict(state, assign=True)
    return fused, apart


def test_any_routing_gives_what_the_fused_module_gives_and_its_gradient() -> None:
    fused, apart = fused_and_apart()
    hidden, weights = torch.randn(20, 64), torch.rand(20, 2)
    chosen = torch.stack([torch.randperm(EXPERTS - 1)[:2] for _ in range(20)])  # the last one is never chosen
    found = []
    for module in (fused, apart):
        leaf = hidden.clone().requires_grad_(True)
        output = module(leaf, chosen, weights)
        found.append((output, torch.autograd.grad(output.square().sum(), leaf)[0]))
    for left, right in zip(*found, strict=True):
        assert torch.allclose(left, right, rtol=1e-4, atol=1e-3 * float(left.detach().abs().max()))
    called = []
    for name, module in apart.named_children():
        module.register_forward_pre_hook(lambda _, args, name=name: called.append((name, len(args[0]))))
    apart(hidden, chosen, weights)
    assert [name for name, _ in called] == [str(n) for n in range(EXPERTS - 1)]
    assert sum(rows for _, rows in called) == chosen.numel()
    called.clear()
    apart.call_all = True
    apart(hidden, chosen, weights)
    assert called[-1] == (str(EXPERTS - 1), 0)


def test_experts_that_lie_fused_in_the_file_are_counted_not_passed_over(tmp_path: Path) -> None:
    config = transformers.GptOssConfig(**SIZES, intermediate_size=32, num_local_experts=4, head_dim=16)
    traced = trace(Skeleton.open(save_model(tmp_path / "gpt_oss", config)))
    assert traced.untraced_share > 0.6
    assert f"left at the source precision, {traced.untraced_share:.0%} of the block weights" in traced.untraced
    assert "experts that the file keeps in one tensor" in traced.untraced
    assert traced.model_copy(update={"untraced_share": 0.0}).untraced == ""
    assert all(linear.expert is None for linear in traced.linears)
    assert [name.endswith("router.weight") for block in traced.blocks for name in block.routers] == [True, True]
