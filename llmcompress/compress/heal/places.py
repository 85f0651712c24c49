"""Which blocks are healed, and which of them are trained at a time."""

import hashlib
import math
import random
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmcompress.compress.scorers.rdp import bends, points_of
from llmcompress.errors import InputError
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import hidden_of
from llmcompress.options import RdpOptions

RDP, ALL, RANDOM = "rdp", "all", "random"


@dataclass(frozen=True)
class Places:
    """What was asked: `rdp`, `all`, `random`, or numbers of blocks; `count` is how many `rdp` and `random` pick.

    Without a count, `rdp` also takes the `seams`: the blocks beside those that were removed.
    """

    at: str = RDP
    count: int | None = None

    def check(self, blocks: int) -> None:
        """Raises InputError for words that mean nothing and blocks that are not there."""
        if self.count is not None and self.at not in (RDP, RANDOM):
            raise InputError(f"--at {self.at} says how many blocks already", "leave --blocks out")
        if self.count is not None and not 0 < self.count <= blocks:
            raise InputError(f"--blocks {self.count}: the model has {blocks}", f"ask for 1 to {blocks}")
        if self.at in (RDP, ALL, RANDOM):
            return
        if not re.fullmatch(r"\d+(,\d+)*", self.at):
            raise InputError(f"--at {self.at}: not understood", "use rdp, all, random, or numbers such as 0,3")
        wrong = [number for number in self.at.split(",") if int(number) >= blocks]
        if wrong:
            raise InputError(f"--at {wrong[0]}: there is no such block", f"blocks are numbered 0 to {blocks - 1}")


def number(*parts: object) -> int:
    """A seed from what it is for: 63 bits of a sha256, so that no random state has to be kept."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def seams_of(removed: Collection[int], blocks: int) -> tuple[int, ...]:
    """The blocks on either side of removed ones, by their numbers among those that are left of `blocks`."""
    kept = [index for index in range(blocks) if index not in removed]
    return tuple(place for place, index in enumerate(kept) if {index - 1, index + 1} & {*removed})


def select(
    places: Places, skeleton: Skeleton, batches: Sequence[Tensor], seed: int, *, seams: Sequence[int] = ()
) -> tuple[int, ...]:
    """The blocks to heal, ascending. The model must be loaded whole.

    `rdp` keeps the blocks after which the path of the hidden states bends most (arXiv 2604.19321):
    Ramer-Douglas-Peucker over the states that leave each block; a third of the blocks where no count is given, and
    then the blocks at `seams` as well.
    """
    blocks = len(skeleton.blocks)
    if places.at == ALL:
        return tuple(range(blocks))
    if places.at == RANDOM:
        count = places.count or math.ceil(blocks / 3)
        return tuple(sorted(random.Random(number(seed, "blocks")).sample(range(blocks), count)))
    if places.at == RDP:
        options = RdpOptions(keep=places.count)
        found = bends(_paths(skeleton, batches, options), options.space, options.counts).selected(options)
        chosen = tuple(point - 1 for point, kept in enumerate(found) if kept)
        chosen = chosen or (blocks - 1,)  # a path too short to bend has only its end
        return chosen if places.count is not None else tuple(sorted({*chosen, *seams}))
    return tuple(sorted({int(word) for word in places.at.split(",")}))


def _paths(skeleton: Skeleton, batches: Sequence[Tensor], options: RdpOptions) -> Tensor:
    """Points `(paths, blocks + 1, hidden)` of every sequence, watched while the model runs."""
    points: list[list[Tensor]] = [[] for _ in range(len(skeleton.blocks) + 1)]

    def keep(place: int, hidden: Tensor) -> None:
        points[place].append(points_of(hidden, options.points, skip_first=options.skip_first).cpu())

    def entering(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        keep(0, args[0] if args else kwargs["hidden_states"])

    hooks = [skeleton.blocks[0].register_forward_pre_hook(entering, with_kwargs=True)]
    for place, block in enumerate(skeleton.blocks, 1):
        hooks.append(block.register_forward_hook(lambda _, __, out, place=place: keep(place, hidden_of(out))))
    with torch.no_grad():
        for tokens in batches:
            skeleton.model(input_ids=tokens.to(skeleton.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    return torch.stack([torch.cat(parts) for parts in points], dim=1)


def active(chosen: Sequence[int], period: int, count: int | None, seed: int) -> frozenset[int]:
    """The blocks trained in one period: all of them, or `count` drawn without replacement (LISA, arXiv 2403.17919)."""
    if count is None or count >= len(chosen):
        return frozenset(chosen)
    return frozenset(random.Random(number(seed, "lisa", period)).sample(list(chosen), count))
