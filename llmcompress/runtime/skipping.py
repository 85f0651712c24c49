"""Halves of blocks that are not run: attention or MLP, whose place in the model is taken by modules without weights.

A checkpoint says which in its config.json, under `llmcompress_skip`, and has zeros for their weights, so that a program
that does not know the record computes the same, the slow way.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers.cache_utils import Cache

from llmcompress.errors import InputError
from llmcompress.spec import Noun

KEY = "llmcompress_skip"
NOTE = "the weights of these halves are zeros; llmcompress.load leaves out computing them, other programs compute zeros"
ATTENTION, MLP = "attn", "mlp"
PARTS = (ATTENTION, MLP)


class SkipRecord(Noun):
    """Which halves of which blocks are skipped, and the modules that are theirs, by their names in the model.

    halves  block, counted from 0 as in this checkpoint, and part: `3.attn`, `5.mlp`
    zero    modules whose outputs are added to the residual stream, and how many values each returns (0: no tuple)
    idle    modules that are not needed any more: what they are given goes through
    """

    version: int = 1
    note: str = NOTE
    halves: tuple[str, ...]
    zero: dict[str, int]
    idle: tuple[str, ...] = ()

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self | None:
        """The record in a config.json, None where there is none. Raises InputError where it is damaged."""
        if KEY not in config:
            return None
        try:
            found = cls.model_validate({k: tuple(v) if isinstance(v, list) else v for k, v in config[KEY].items()})
        except (ValidationError, AttributeError):
            raise InputError(f"config.json: {KEY} is damaged", "prune the model again") from None
        if found.version != 1:
            raise InputError(f"config.json: {KEY} of version {found.version}", "update llmcompress")
        return found

    def covers(self, name: str) -> bool:
        """Whether a module, by its name or that of one of its parameters, belongs to a skipped half."""
        return any(name == module or name.startswith(module + ".") for module in (*self.zero, *self.idle))


class Nothing(nn.Module):
    """Takes the place of a module that writes into the residual stream, and writes zeros.

    In place of attention it also keeps `place` in a cache of keys and values, where models read how many tokens they
    have seen: with one number per token.
    """

    def __init__(self, returns: int, place: int | None = None) -> None:
        super().__init__()
        self.returns, self.place = returns, place

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros shaped like the hidden states given, first of a tuple where the module returned one."""
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        if self.place is not None:
            for cache in (*args, *kwargs.values()):
                if isinstance(cache, Cache):
                    token = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[1], 1)
                    cache.update(token, token, self.place)
        zeros = torch.zeros_like(hidden)
        return (zeros, *[None] * (self.returns - 1)) if self.returns else zeros


class Passing(nn.Module):
    """Takes the place of a module that nothing needs: gives back what it is given."""

    def forward(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        """The hidden states as they are."""
        return hidden


def stand_in(module: nn.Module, returns: int | None) -> nn.Module:
    """What takes the place of a module: `Nothing` where it says how much is returned, else `Passing`."""
    place = getattr(module, "layer_idx", None)
    return Passing() if returns is None else Nothing(returns, place if isinstance(place, int) else None)


@contextmanager
def left_out(root: nn.Module, modules: Mapping[str, int | None]) -> Iterator[None]:
    """While inside, modules have others in their place, by `stand_in`; names are those inside `root`."""
    owners = {name: (root.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in modules}
    kept = {name: root.get_submodule(name) for name in modules}
    try:
        for name, (owner, leaf) in owners.items():
            setattr(owner, leaf, stand_in(kept[name], modules[name]))
        yield
    finally:
        for name, (owner, leaf) in owners.items():
            setattr(owner, leaf, kept[name])


def skip(model: nn.Module, record: SkipRecord) -> None:
    """Put modules without weights in place of those that a record names; what they held is given back.

    Raises InputError where the model has no such module.
    """
    for name, returns in [*record.zero.items(), *((name, None) for name in record.idle)]:
        owner, _, leaf = name.rpartition(".")
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise InputError(f"config.json: {KEY}: the model has no {name}", "prune the model again") from None
        setattr(model.get_submodule(owner), leaf, stand_in(module, returns))
