"""What experts read: each only the tokens that are routed to it.

A block runs once per batch as far as its experts, and what arrives there waits. Every expert is then looked at by
itself, on its own rows: an expert costs its share of the tokens, and its Hessians are in memory one at a time. Where
the full-precision model runs beside, its copy of an expert reads what arrives there in *its* stream for the tokens that
the stored model routes: the router may have changed its mind, but it is the stored model that is to be corrected.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.compress.observe import Enough, local_name
from llmcompress.experts import Expert
from llmcompress.model.shelf import Keep
from llmcompress.types import BlockTrace, LinearInfo


@dataclass(frozen=True)
class Arrival:
    """One batch at the experts of a block: hidden states `(tokens, hidden)` and experts of each token `(tokens, k)`."""

    hidden: Tensor
    experts: Tensor


class Routed:
    """The experts of one copy of a block, and what reached them, batch by batch."""

    def __init__(self, block: nn.Module, info: BlockTrace, keep: Keep) -> None:
        self._block, self._info, self._keep = block, info, keep
        self._arrived: dict[tuple[str, int], Arrival] = {}

    def _expert(self, linear: LinearInfo) -> tuple[str, Expert]:
        """The module of all experts, by name, and the expert of a linear."""
        name = local_name(self._info, linear).rpartition(".")[0]
        found: Any = self._block.get_submodule(name)
        return name.rpartition(".")[0], found

    @torch.no_grad()
    def arrival(self, place: int, linear: LinearInfo, run: Callable[[], object]) -> Arrival:
        """Batch `place` where the experts of a linear's block read it; `run` sends it through the block."""
        key = (self._expert(linear)[0], place)
        if key not in self._arrived:

            def arrive(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                hidden, experts = (*args, *kwargs.values())[:2]
                self._arrived[key] = Arrival(self._keep(hidden), experts.clone())
                raise Enough

            handle = self._block.get_submodule(key[0]).register_forward_pre_hook(arrive, with_kwargs=True)
            try:
                with suppress(Enough):
                    run()
            finally:
                handle.remove()
        return self._arrived[key]

    @torch.no_grad()
    def read(self, linear: LinearInfo, arrival: Arrival, rows: Tensor) -> Tensor:
        """What a linear of an expert reads of some tokens, float32 `(rows, columns)`, its expert as it is now."""
        _, expert = self._expert(linear)
        return expert.read_by(linear.name.rpartition(".")[2], arrival.hidden[rows]).float()


def rows_of(linear: LinearInfo, arrival: Arrival) -> Tensor:
    """The tokens of a batch that are routed to the expert of a linear."""
    return (arrival.experts == int(linear.expert or 0)).nonzero()[:, 0]
