"""Blocks that share their weights: one stored weight for several linears, and low-rank factors of each one's own.

A checkpoint in our own layout says so under `tied` of its `quantization_config`. The shared weight lies where the
linear of a group's first block has it. The linears of the other blocks have an empty `weight`, of a shape that makes
plain transformers stop, and every linear may have `weight_up` and `weight_down`, whose product is added to the shared
weight, the way round that the file keeps it.
"""

from collections.abc import Mapping
from typing import Any, Protocol, Self

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from llmcompress.errors import InputError
from llmcompress.kernels import stored
from llmcompress.runtime.shards import ShardReader
from llmcompress.spec import Noun

KEY = "tied"  # in quantization_config
AGAIN = "tie the model again: llmcompress prune --tie"
DAMAGED = f"config.json: {KEY} is damaged"


class TieRecord(Noun):
    """Which blocks share their weights.

    groups  the blocks of each group, counted from 0, ascending
    shared  whose weight a linear has, by what their names in the file begin with; first blocks have no entry
    rank    of the factors; 0 where there are none
    """

    version: int = 1
    groups: tuple[tuple[int, ...], ...]
    shared: dict[str, str]
    rank: int = 0

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self | None:
        """The record in a config.json, None where there is none. Raises InputError where it is damaged."""
        section = config.get("quantization_config")
        if not isinstance(section, Mapping) or KEY not in section:
            return None
        try:
            document = dict(section[KEY])
            document["groups"] = tuple(tuple(group) for group in document["groups"])
            found = cls.model_validate(document)
        except (ValidationError, KeyError, TypeError, ValueError):
            raise InputError(DAMAGED, AGAIN) from None
        if found.version != 1:
            raise InputError(f"config.json: {KEY} of version {found.version}", "update llmcompress")
        if set(found.shared) & set(found.shared.values()):
            raise InputError(f"{DAMAGED}: a weight is shared and shares", AGAIN)
        return found

    @property
    def stems(self) -> tuple[str, ...]:
        """Every linear that shares a weight, those that have it first."""
        return (*dict.fromkeys(self.shared.values()), *self.shared)


class _Base(Protocol):
    def names(self) -> tuple[str, ...]: ...

    def read(self, name: str) -> Tensor: ...


class TiedReader:
    """A checkpoint whose blocks share weights, seen as one in which every block has its own.

    Raises InputError where config.json names weights that are not there.
    """

    def __init__(self, base: _Base, record: TieRecord) -> None:
        self._base, self._record = base, record
        present = set(base.names())
        missing = [stem for stem in record.stems if stem + stored.WEIGHT not in present]
        if missing:
            raise InputError(f"config.json: {KEY}: there is no {missing[0]}{stored.WEIGHT}", AGAIN)
        self._factors = {stem for stem in record.stems if {stem + stored.UP, stem + stored.DOWN} <= present}
        hidden = {stem + part for stem in self._factors for part in (stored.UP, stored.DOWN)}
        self._names = tuple(name for name in base.names() if name not in hidden)

    def names(self) -> tuple[str, ...]:
        return self._names

    def read(self, name: str) -> Tensor:
        """A tensor as stored; of a tied linear the shared weight, float32 where factors are added to it."""
        stem = name.removesuffix(stored.WEIGHT)
        if stem == name or not (stem in self._record.shared or stem in self._factors):
            return self._base.read(name)
        weight = self.shared(stem)
        if stem not in self._factors:
            return weight
        up, down = self.factors(stem)
        if up.ndim != 2 or down.ndim != 2 or (up.shape[0], down.shape[1]) != tuple(weight.shape):
            raise InputError(f"{stem}: factors {tuple(up.shape)} and {tuple(down.shape)} do not fit", AGAIN)
        return corrected(weight, up, down)

    def shared(self, stem: str) -> Tensor:
        """The weight that a linear shares, as stored."""
        return self._base.read(self._record.shared.get(stem, stem) + stored.WEIGHT)

    def factors(self, stem: str) -> tuple[Tensor, Tensor]:
        """What a linear adds to it: `(rows, rank)` and `(rank, columns)` of the tensor in the file."""
        return self._base.read(stem + stored.UP), self._base.read(stem + stored.DOWN)

    @property
    def made_up(self) -> frozenset[str]:
        """Names of the weights that are not in the file as they are read."""
        return frozenset(stem + stored.WEIGHT for stem in (*self._record.shared, *self._factors))

    @property
    def with_factors(self) -> frozenset[str]:
        """The linears that have factors."""
        return frozenset(self._factors)


def corrected(weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """A shared weight with the product of factors added, float32."""
    return weight.float() + up.float() @ down.float()


class TiedLinear(nn.Module):
    """Multiplies with a weight that it has itself or another has, and with factors of its own.

    of          the linear whose weight it is; None where this one has it
    transposed  the weight is `(columns, rows)`, as `Conv1D` keeps it, and so is the product of the factors
    """

    weight_up: nn.Parameter | None
    weight_down: nn.Parameter | None

    def __init__(self, *, transposed: bool, bias: nn.Parameter | None, of: nn.Module | None = None) -> None:
        super().__init__()
        self.transposed = transposed
        self._of = () if of is None else (of,)  # a tuple, so that it is no module of this one
        self.register_parameter("bias", bias)
        self.register_parameter("weight_up", None)
        self.register_parameter("weight_down", None)

    def forward(self, x: Tensor) -> Tensor:
        """Inputs `(..., columns)` to outputs `(..., rows)`."""
        weight: Any = (self._of[0] if self._of else self).weight
        bias: Any = self.bias
        out = functional.linear(x, weight.T if self.transposed else weight, bias)
        if self.weight_up is None or self.weight_down is None:
            return out
        up, down = self.weight_up, self.weight_down
        return out + ((x @ up) @ down if self.transposed else (x @ down.T) @ up.T)


def tie_modules(model: nn.Module, shards: ShardReader, record: TieRecord, names: Mapping[str, str]) -> None:
    """Let the linears of a model on the meta device share weights; `names` gives modules by stem.

    Raises InputError where the model has no such linear, or the tensors do not fit it.
    """
    present = set(shards.names())
    made: dict[str, TiedLinear] = {}
    for stem in record.stems:
        try:
            old = model.get_submodule(names[stem])
        except AttributeError:
            old = None
        if not isinstance(old, nn.Linear | Conv1D):
            raise InputError(f"{stem}: the model has no linear of this name", AGAIN)
        owner = made.get(record.shared.get(stem, ""))
        new = TiedLinear(transposed=isinstance(old, Conv1D), bias=old.bias, of=owner)
        if owner is None:
            new.weight = old.weight
        else:
            new.register_buffer("weight", shards.outline(stem + stored.WEIGHT))  # the empty one that stops strangers
            if old.weight.shape != shards.outline(record.shared[stem] + stored.WEIGHT).shape:
                raise InputError(f"{stem}: its weight does not have the shape of the one it shares", AGAIN)
        if {stem + stored.UP, stem + stored.DOWN} <= present:
            up, down = shards.outline(stem + stored.UP), shards.outline(stem + stored.DOWN)
            if (up.shape[0], down.shape[1]) != tuple(old.weight.shape) or up.shape[1] != down.shape[0]:
                raise InputError(f"{stem}: factors {tuple(up.shape)} and {tuple(down.shape)} do not fit", AGAIN)
            new.weight_up, new.weight_down = (nn.Parameter(x.to(old.weight.dtype)) for x in (up, down))
        new._is_hf_initialized = True  # type: ignore[assignment]
        made[stem] = new
        parent, _, leaf = names[stem].rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)


def on_one_device(device_map: Any) -> None:
    """Raises InputError where a model that shares weights would be spread over several devices."""
    if isinstance(device_map, Mapping) and len({_device(place) for place in device_map.values()}) > 1:
        raise InputError("blocks that share weights lie on one device", 'give device="cuda", or device_map={"": 0}')


def _device(place: Any) -> str:
    """A device as accelerate names it, in one way; weights may also lie on the `disk`."""
    return str(place) if place == "disk" else str(torch.device(place))
