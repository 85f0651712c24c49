"""Mixtures of experts, an expert at a time.

transformers keeps the experts of a block as two 3-D parameters, which it merges from the tensors of single experts
while it loads, and multiplies with all at once. Here they stay apart: every projection of every expert is a linear
with a weight of its own, under the name that published checkpoints have for it, so that whatever watches, replaces
or packs linears finds them. Nothing is held twice, and nothing has to be split again to be written.

Which families can be taken apart is not tabulated: those whose experts transformers multiplies in the common way, and
whose checkpoints have a tensor for each projection of each expert, as transformers' own conversions say.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)

GATE_UP, DOWN = "gate_up_proj", "down_proj"
COMMON = {
    "is_concatenated": True,
    "is_transposed": False,
    "has_bias": False,
    "has_gate": True,
    "has_post_expert_norm": False,
}
SINGLE = re.compile(r"\*\.(\w+)\\?\.weight$")  # the pattern of one projection of every expert

Leaves = tuple[str, str, str]  # what a file calls the gate, up and down projection of an expert


class Expert(nn.Module):
    """One expert: `down(act(gate(x)) * up(x))`, or whatever its family makes of gate and up."""

    def __init__(self, linears: Mapping[str, nn.Linear], gated: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        for name, linear in linears.items():
            self.add_module(name, linear)
        self.names, self._gated = tuple(linears), gated

    def inner(self, x: Tensor) -> Tensor:
        """What the down projection reads, `(tokens, intermediate)`, of the expert's inputs `(tokens, hidden)`."""
        gate, up = (self.get_submodule(name) for name in self.names[:2])
        return self._gated(torch.cat((gate(x), up(x)), -1))

    def read_by(self, name: str, x: Tensor) -> Tensor:
        """What the projection of this name reads of the expert's inputs."""
        return self.inner(x) if name == self.names[2] else x

    def forward(self, x: Tensor) -> Tensor:
        """`(tokens, hidden)` to the same."""
        found: Tensor = self.get_submodule(self.names[2])(self.inner(x))
        return found


class Experts(nn.Module):
    """The experts of one block, apart; children are called by their numbers. Takes the place of a fused module.

    `call_all` also calls experts that no token was routed to, with no rows: who watches them then sees every one.
    While a projection runs, its `rows` are the tokens that were routed to it, `(tokens,)` of the flattened batch.
    """

    def __init__(self, fused: Any, leaves: Leaves) -> None:
        super().__init__()
        self.num_experts, self.call_all = int(fused.num_experts), False
        gate_up, down = getattr(fused, GATE_UP), getattr(fused, DOWN)
        inner = gate_up.shape[1] // 2
        shapes = ((inner, gate_up.shape[2]), (inner, gate_up.shape[2]), (down.shape[1], inner))
        for parameter in (GATE_UP, DOWN):
            delattr(fused, parameter)
        gated = partial(type(fused)._apply_gate, fused)
        for number in range(self.num_experts):
            linears = {
                leaf: nn.Linear(columns, rows, bias=False, device="meta", dtype=gate_up.dtype)
                for leaf, (rows, columns) in zip(leaves, shapes, strict=True)
            }
            self.add_module(str(number), Expert(linears, gated))

    def routed(self, top_k_index: Tensor) -> Iterator[tuple[Expert, Tensor, Tensor]]:
        """Every expert, the tokens routed to it, and at which of their places it stands."""
        for number in range(self.num_experts):
            rows, places = torch.where(top_k_index == number)
            found: Any = self.get_submodule(str(number))
            yield found, rows, places

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`(tokens, hidden)` through the experts `(tokens, k)` of each token, added with its weights `(tokens, k)`."""
        total = torch.zeros_like(hidden_states)
        for expert, rows, places in self.routed(top_k_index):
            if not len(rows) and not self.call_all:
                continue
            for linear in expert.children():
                linear.rows = rows
            part = expert(hidden_states[rows]) * top_k_weights[rows, places, None]
            total = total.index_add(0, rows, part.to(total.dtype))
        return total


def _leaves(entry: Any) -> tuple[str, ...]:
    """What a conversion that merges single experts calls their projections; empty for any other."""
    if not isinstance(entry, WeightConverter):
        return ()
    found = [SINGLE.search(pattern) for pattern in entry._original_source_patterns]
    kinds = tuple(type(operation) for operation in entry.operations)
    known = {1: (MergeModulelist,), 2: (MergeModulelist, Concatenate)}.get(len(found))
    return tuple(match[1] for match in found if match) if all(found) and kinds == known else ()


def fused_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model that keep experts as 3-D parameters, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if hasattr(module, "is_concatenated") and any(p.ndim == 3 for p in module.parameters(recurse=False))
    }


def _takes_apart(module: Any) -> bool:
    own = dict(module.named_parameters(recurse=False))
    return set(own) == {GATE_UP, DOWN} and all(getattr(module, key, None) == value for key, value in COMMON.items())


def split_experts(model: Any, names: Iterable[str]) -> None:
    """Take the experts of a model on the meta device apart, all of them or none.

    names  the tensors of the checkpoint: experts that lie fused in the file stay so
    """
    fused = fused_modules(model)
    mapping = get_model_conversion_mapping(model)
    merging = [entry for entry in mapping if _leaves(entry)]
    by_count = {len(_leaves(entry)): _leaves(entry) for entry in merging}
    if not fused or len(merging) != 2 or set(by_count) != {1, 2} or not all(map(_takes_apart, fused.values())):
        return
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    state = model.state_dict()
    given = set()
    for name in names:
        target, pattern = rename_source_key(name, renamings, merging, model.base_model_prefix, state)
        if pattern is not None:
            given.add(target)
    if given < {f"{name}.{parameter}" for name in fused for parameter in (GATE_UP, DOWN)}:
        return
    gate, up = by_count[2]
    for name, module in fused.items():
        model.set_submodule(name, Experts(module, (gate, up, by_count[1][0])))


def conversions_of(model: Any) -> list[Any]:
    """transformers' conversions for a model, without those that would merge experts that are apart."""
    return unmerged(model, get_model_conversion_mapping(model))


def unmerged(model: nn.Module, conversions: Iterable[Any]) -> list[Any]:
    """Conversions without those that merge experts, where experts are apart."""
    apart = any(isinstance(module, Experts) for module in model.modules())
    return [entry for entry in conversions if not (apart and _leaves(entry))]


def routing_modules(block: nn.Module) -> dict[str, int]:
    """Names of the modules that hold experts and a router, apart or fused, and how many experts there are."""
    found = {name: module for name, module in block.named_modules() if isinstance(module, Experts)}
    return {
        name.rpartition(".")[0]: int(module.num_experts)  # type: ignore[arg-type]
        for name, module in (found | fused_modules(block)).items()
        if hasattr(module, "num_experts")
    }


def router_weights(block: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that decide which experts a token goes to, and with what weight, by name in the block.

    They are the matrices beside the experts with a row for each expert, or with one row (the gate of a shared expert).
    """
    found = {}
    inside = {id(p) for module in block.modules() if isinstance(module, Experts) for p in module.parameters()}
    inside |= {id(p) for module in fused_modules(block).values() for p in module.parameters(recurse=False)}
    for parent, count in routing_modules(block).items():
        for name, parameter in block.get_submodule(parent).named_parameters():
            if parameter.ndim == 2 and parameter.shape[0] in (1, count) and id(parameter) not in inside:
                found[f"{parent}.{name}" if parent else name] = parameter
    return found
