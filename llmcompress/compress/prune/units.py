"""What a search removes: whole blocks, or the halves of blocks, by the numbers that the search gives them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from llmcompress.compress.prune.halves import Half, Halves, Removal, find_halves, whole
from llmcompress.compress.prune.measure import NO_HALVES
from llmcompress.compress.prune.records import RemovalStep
from llmcompress.errors import InputError
from llmcompress.model.skeleton import Skeleton
from llmcompress.runtime.skipping import PARTS, SkipRecord
from llmcompress.types import ModelTrace


@dataclass(frozen=True)
class Scope:
    """What is searched: blocks, or with `sublayers` their halves, with `pairs` both of a block at once as well."""

    sublayers: bool = False
    pairs: bool = False
    exclude: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Units:
    """What can be removed, in the order of its numbers in the search.

    names     the linears of each
    exclude   numbers of those that stay
    earlier   halves that the model skips already: they go along with everything that is removed
    pairs     numbers that can be removed at once
    """

    units: tuple[int | Half, ...]
    names: tuple[tuple[str, ...], ...]
    halves: Halves
    exclude: frozenset[int]
    earlier: frozenset[Half]
    pairs: tuple[frozenset[int], ...] = ()

    def removal(self, places: Collection[int]) -> Removal:
        """The blocks and halves that stand behind numbers; both halves of a block are the block."""
        return whole({self.units[place] for place in places} | self.earlier)

    def named(self, step: RemovalStep) -> RemovalStep:
        """A step of the search in the words of the user."""
        removed, rival = (tuple(self._name(place) for place in some) for some in (step.removed, step.rival))
        return step.model_copy(update={"removed": removed, "rival": rival})

    def _name(self, place: int | str) -> int | str:
        unit = self.units[int(place)]
        return unit if isinstance(unit, int) else str(unit)


def find_units(skeleton: Skeleton, trace: ModelTrace, scope: Scope) -> Units:
    """The blocks of a model, or their halves; those that `scope.exclude` names stay.

    Raises InputError where there is no such block, or where no block of this family can be halved.
    """
    blocks = len(trace.blocks)
    wrong = [block for block in sorted(scope.exclude) if not 0 <= block < blocks]
    if wrong:
        raise InputError(f"--exclude {wrong[0]}: there is no such block", f"blocks are numbered 0 to {blocks - 1}")
    record = SkipRecord.of(skeleton.files.config)
    halves = find_halves(skeleton) if scope.sublayers or record is not None else NO_HALVES
    earlier = frozenset(half for half in halves.modules if record is not None and str(half) in record.halves)
    linears = [[linear.name for linear in info.linears] for info in trace.blocks]
    if not scope.sublayers:
        return Units(tuple(range(blocks)), tuple(map(tuple, linears)), halves, scope.exclude, earlier)
    if not halves.modules:
        family, reason = skeleton.config.model_type, next(iter(halves.refused.values()))
        raise InputError(f"a {family} model has no halves to leave out: {reason}", "remove whole blocks: --blocks")
    units = tuple(Half(block, part) for block in range(blocks) for part in PARTS)
    stay = {i for i, u in enumerate(units) if u.block in scope.exclude or u in earlier or u not in halves.modules}
    names = tuple(_linears_of(skeleton, half, halves, linears[half.block]) for half in units)
    pairs = tuple(frozenset({place, place + 1}) for place in range(0, len(units), 2)) if scope.pairs else ()
    return Units(units, names, halves, frozenset(stay), earlier, pairs)


def _linears_of(skeleton: Skeleton, half: Half, halves: Halves, linears: Sequence[str]) -> tuple[str, ...]:
    """The linears of a half; all of its block where that is not known."""
    modules, start = halves.modules.get(half), skeleton.block_name(half.block)
    if modules is None:
        return tuple(linears)
    inside = tuple(f"{start}.{name}" for name in modules.weights)
    return tuple(name for name in linears if name in inside or name.startswith(tuple(f"{x}." for x in inside)))
