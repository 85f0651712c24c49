"""The attention and the MLP half of a block: which modules are theirs, and what a model without them computes.

A half is left out by modules that write zeros in place of the one that writes into the residual stream, and let pass
what is only read by it. Nothing here knows a family: modules are found by what one forward shows, and a half counts
only if the block without it gives, bit for bit, what the block gives with the half's weights at zero, because that is
what will be stored.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import BlockCall, BlockStream, call_block, hidden_of
from llmcompress.runtime.skipping import ATTENTION, MLP, PARTS, left_out

PROBE_TOKENS = 8


class Half(NamedTuple):
    """One half of one block."""

    block: int
    part: str

    def __str__(self) -> str:
        return f"{self.block}.{self.part}"


Removal = frozenset[int | Half]  # whole blocks, and halves of others


def whole(removal: Collection[int | Half]) -> Removal:
    """The same with a block in place of its two halves."""
    blocks = {unit if isinstance(unit, int) else unit.block for unit in removal}
    full = {b for b in blocks if b in removal or all(Half(b, part) in removal for part in PARTS)}
    return frozenset(full | {unit for unit in removal if isinstance(unit, Half) and unit.block not in full})


@dataclass(frozen=True)
class HalfModules:
    """Modules of a half by their names inside the block: one to write zeros, which `returns` so many values, the rest
    to pass on what they are given. The weights of `weights` are what the half computes with."""

    zero: str
    returns: int
    idle: tuple[str, ...]
    weights: tuple[str, ...]

    @property
    def stand_ins(self) -> dict[str, int | None]:
        """For `left_out`."""
        return {self.zero: self.returns, **dict.fromkeys(self.idle)}


@dataclass(frozen=True)
class Halves:
    """By block and part, its modules; `refused` says why a half cannot be left out by itself."""

    modules: Mapping[Half, HalfModules]
    refused: Mapping[Half, str]

    @contextmanager
    def without(self, skeleton: Skeleton, index: int, removed: Removal) -> Iterator[None]:
        """While inside, block `index` does not compute those of its halves that are removed."""
        names: dict[str, int | None] = {}
        for part in PARTS:
            if Half(index, part) in removed:
                names |= self.modules[Half(index, part)].stand_ins
        with left_out(skeleton.blocks[index], names):
            yield


@dataclass
class _Child:
    """A direct child of a block, and what it was given and gave back."""

    name: str
    module: nn.Module
    given: Tensor
    returned: Any

    @property
    def matrices(self) -> bool:
        return any(parameter.ndim > 1 for parameter in self.module.parameters())


@torch.no_grad()
def find_halves(skeleton: Skeleton) -> Halves:
    """The halves of every block; blocks of one structure are looked at once."""
    stream = BlockStream(skeleton)
    vocabulary = int(skeleton.config.get_text_config().vocab_size)
    tokens = torch.randint(vocabulary, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    (hidden,), (calls,) = stream.start([tokens])
    known: dict[object, dict[str, HalfModules | str]] = {}
    modules, refused = {}, {}
    for index, block in enumerate(skeleton.blocks):
        kind = tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())
        if kind not in known:
            skeleton.load_block(index)
            known[kind] = _Finder(skeleton, index, hidden, calls[index]).find()
        skeleton.free(block)
        for part, found in known[kind].items():
            if isinstance(found, str):
                refused[Half(index, part)] = found
            else:
                modules[Half(index, part)] = found
    skeleton.free_rest()
    return Halves(modules, refused)


class _Finder:
    """One block, loaded, and a hidden state to try it on."""

    def __init__(self, skeleton: Skeleton, index: int, hidden: Tensor, call: BlockCall) -> None:
        self.block, self.hidden, self.call = skeleton.blocks[index], hidden, call
        self.children: list[_Child] = []

    def _run(self) -> Tensor:
        return call_block(self.block, self.hidden, self.call)

    def find(self) -> dict[str, HalfModules | str]:
        """Modules of each half, or why there is none."""
        handles = []
        for name, module in self.block.named_children():

            def keep(module: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
                given = args[0] if args else kwargs.get("hidden_states")
                self.children.append(_Child(name, module, given, output))

            handles.append(module.register_forward_hook(keep, with_kwargs=True))
        self._run()
        for handle in handles:
            handle.remove()
        attention = [child for child in self.children if child.matrices and _keeps_place(child.module)]
        others = [child for child in self.children if child.matrices and not _keeps_place(child.module)]
        if len(attention) != 1:
            return dict.fromkeys(PARTS, f"its blocks have {len(attention)} modules of attention")
        found: dict[str, HalfModules | str] = {ATTENTION: self._checked(attention)}
        split = len(others) > 1 and not all(isinstance(child.module, nn.Linear) for child in others)
        if not others or split:
            return found | {MLP: f"its blocks have {len(others)} modules beside attention"}
        return found | {MLP: self._checked(others)}

    def _checked(self, children: list[_Child]) -> HalfModules | str:
        """The half whose modules with weights are `children`, the last of them the one that writes."""
        last = children[-1]
        returns = len(last.returned) if isinstance(last.returned, tuple) else 0
        names = tuple(child.name for child in children)
        found = HalfModules(last.name, returns, names[:-1], names)
        expected = self._at_zero(names)
        if not self._equal(found, expected):
            return "it does more than add its output to the residual stream"
        for norm in self.children:
            beside = norm.returned is children[0].given or norm.given is hidden_of(last.returned)
            if not norm.matrices and beside:
                more = HalfModules(found.zero, returns, (*found.idle, norm.name), names)
                found = more if self._equal(more, expected) else found
        return found

    def _at_zero(self, names: tuple[str, ...]) -> Tensor:
        """What the block gives with the weights of some children at zero."""
        parameters = [parameter for name in names for parameter in self.block.get_submodule(name).parameters()]
        kept = [parameter.detach().clone() for parameter in parameters]
        for parameter in parameters:
            parameter.zero_()
        answer = self._run()
        for parameter, values in zip(parameters, kept, strict=True):
            parameter.copy_(values)
        return answer

    def _equal(self, half: HalfModules, expected: Tensor) -> bool:
        with left_out(self.block, half.stand_ins):
            return bool(torch.equal(self._run(), expected))


def _keeps_place(module: nn.Module) -> bool:
    """Whether a module knows the number of its block, as attention does for its cache."""
    return any(isinstance(getattr(part, "layer_idx", None), int) for part in module.modules())
