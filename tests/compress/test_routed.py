"""What is measured of an expert is measured on the tokens that are routed to it."""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcompress.compress.observe import collect_hessians, module_of
from llmcompress.compress.replay import in_memory
from llmcompress.compress.rounding import Seen
from llmcompress.compress.routed import Routed, rows_of
from llmcompress.compress.scorers.fisher import Sums
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import BlockStream, call_block
from llmcompress.model.trace import trace
from llmcompress.types import BlockTrace, LinearInfo, LinearSpec
from tests.compress.scoring_help import job_for, scored
from tests.experts_help import EXPERTS, UNREACHED, family


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Qwen3-MoE; do not write into it."""
    return family("qwen3_moe", tmp_path_factory.mktemp("models") / "qwen3_moe")


def entered(folder: Path, tokens: Tensor) -> tuple[Any, BlockTrace, Tensor, Any]:
    """Block 0, loaded, its trace, and what enters it."""
    skeleton = Skeleton.open(folder)
    info = trace(skeleton).blocks[0]
    hidden, calls = BlockStream(skeleton).start([tokens])
    return skeleton.blocks[0], info, hidden[0], calls[0][0]


def arriving(block: Any, hidden: Tensor, call: Any) -> tuple[Tensor, Tensor]:
    """What the experts of a block are given: hidden states `(tokens, hidden)` and the experts of each token."""
    found: list[tuple[Tensor, Tensor]] = []
    handle = block.mlp.experts.register_forward_pre_hook(lambda _, args: found.append((args[0], args[1])))
    with torch.no_grad():
        call_block(block, hidden, call)
    handle.remove()
    return found[0]


@torch.no_grad()
def by_hand(block: Any, number: int, hidden: Tensor, rows: list[int], leaf: str) -> Tensor:
    """What a projection of an expert reads of some tokens, one at a time."""
    expert, act = getattr(block.mlp.experts, str(number)), torch.nn.functional.silu
    x = torch.stack([hidden[row] for row in rows]) if rows else hidden[:0]
    if leaf != "down_proj":
        return x
    return act(x @ expert.gate_proj.weight.T) * (x @ expert.up_proj.weight.T)


def test_an_expert_reads_its_tokens_and_the_full_model_is_asked_about_the_same(folder: Path) -> None:
    tokens = torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(1))
    block, info, hidden, call = entered(folder, tokens)
    full, shifted = copy.deepcopy(block), hidden + 0.3 * torch.randn_like(hidden)  # another stream, other routes
    stored_in, routes = arriving(block, shifted, call)
    full_in, others = arriving(full, hidden, call)
    assert not torch.equal(routes, others)
    stored, beside = Routed(block, info, in_memory), Routed(full, info, in_memory)
    for linear in (x for x in info.linears if x.expert is not None):
        number, leaf = int(linear.expert or 0), linear.name.rpartition(".")[2]
        arrival = stored.arrival(0, linear, partial(call_block, block, shifted, call))
        rows = rows_of(linear, arrival)
        wanted = [row for row in range(len(routes)) if number in routes[row].tolist()]
        assert rows.tolist() == wanted
        assert (wanted == []) == (str(number) in UNREACHED)
        found = stored.read(linear, arrival, rows)
        assert torch.allclose(found, by_hand(block, number, stored_in, wanted, leaf), atol=1e-5)
        other = beside.arrival(0, linear, partial(call_block, full, hidden, call))
        same = beside.read(linear, other, rows)
        assert torch.allclose(same, by_hand(full, number, full_in, wanted, leaf), atol=1e-5)


def test_hessians_of_experts_are_of_their_tokens_and_steadied(folder: Path) -> None:
    tokens = torch.randint(96, (2, 24), generator=torch.Generator().manual_seed(1))
    block, info, hidden, call = entered(folder, tokens)
    stored_in, routes = arriving(block, hidden, call)
    known = collect_hessians(block, info, [partial(call_block, block, hidden, call)])
    for linear in (x for x in info.linears if x.expert is not None):
        number, seen = int(linear.expert or 0), known[linear.shared_input]
        rows = [row for row in range(len(routes)) if number in routes[row].tolist()]
        x = by_hand(block, number, stored_in, rows, linear.name.rpartition(".")[2])
        assert seen.tokens == len(rows)
        assert seen.nothing == (rows == [])
        if rows:
            mean = x.T @ x / len(rows)
            wanted = mean + torch.eye(len(mean)) * mean.diagonal().mean() * linear.columns / len(rows)
            assert torch.allclose(seen.hessian, wanted, atol=1e-4 * float(wanted.max()))
    assert Seen(torch.eye(2)).steadied().hessian.equal(torch.eye(2))  # of how many tokens is not known


def test_products_of_experts_meet_at_their_tokens() -> None:
    """`dot` and `sequence` add what the linears of a unit do to one token, wherever it stands in their inputs."""
    generator, spec = torch.Generator().manual_seed(0), LinearSpec(bits=4, group_size=32)
    draw = partial(torch.randn, generator=generator)
    names, rows = ("a", "b"), {"a": torch.tensor([0, 3, 4]), "b": torch.tensor([3, 5])}
    linears = {
        n: LinearInfo(name=n, tensor=n, rows=3, columns=4, unit="experts", shared_input=i, expert=i)
        for i, n in enumerate(names)
    }
    errors = {n: [(spec, draw(3, 4))] for n in names}
    inputs, gradients = ({n: draw(len(rows[n]), size) for n in names} for size in (4, 3))
    dots = [0.0] * 6
    for n in names:
        for place, row in enumerate(rows[n].tolist()):
            dots[row] += float(gradients[n][place] @ errors[n][0][1] @ inputs[n][place])
    wanted = {"dot": sum(d**2 for d in dots), "sequence": sum(dots[:3]) ** 2 + sum(dots[3:]) ** 2}
    for reduce, value in wanted.items():
        sums = Sums(linears, errors, reduce)
        sums.shape = (2, 3)
        for n in names:
            sums.add(n, inputs[n], gradients[n], rows[n])
        sums.settle()
        damages = [layer.candidates[0].damage for layer in sums.layers(1)]
        assert 2 * sum(damages) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("name", ["fisher", "hessian", "kurtosis", "lim", "kl"])
def test_scorers_say_something_of_every_expert(name: str, folder: Path) -> None:
    tokens = torch.randint(96, (4, 12), generator=torch.Generator().manual_seed(0))
    found = scored(folder, name, tokens, fisher={"reduce": "dot"}, swaps={"samples": 2, "tokens": 8})
    layers = {layer.linear: layer for layer in found.layers}
    experts = [x for x in job_for(folder).trace.linears if x.expert is not None]
    assert len(experts) == 2 * 3 * EXPERTS
    for linear in experts:
        assert [c.spec.bits for c in layers[linear.name].candidates]
    if name == "hessian":
        of_nobody = [layers[x.name] for x in experts if ".layers.0." in x.name and str(x.expert) in UNREACHED]
        assert all(c.damage == 0 for layer in of_nobody for c in layer.candidates)


def test_modules_of_experts_are_found_like_all_others(folder: Path) -> None:
    skeleton = Skeleton.open(folder)
    info = trace(skeleton).blocks[1]
    for linear in info.linears:
        module: Any = module_of(skeleton.blocks[1], info, linear)
        assert tuple(module.weight.shape) == (linear.rows, linear.columns)
