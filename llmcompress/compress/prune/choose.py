"""Choose the blocks, or halves of blocks, to remove by what removing them together measures, not by a score.

A score (voids, block influence, measured single removals) only says where to look first. Sets grow by one block at a
time; several of the best of each size are kept, and the winner of a size is then improved by exchanging one of its
blocks for another. Damages do not add up, so no sum of single damages decides anything.
Here a half of a block is searched like a block; `pairs` can be removed at once, as the two halves of a block, and sets
that are not `allowed` are never tried.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.compress.prune.records import RemovalStep
from llmcompress.compress.statistics import mean, standard_error, upper_bound

Measure = Callable[[Sequence[frozenset[int]]], Tensor]  # KL by sequence, float64 (sets, sequences)


@dataclass(frozen=True)
class Search:
    """How far to look: `beam` sets of each size are grown, by the `shortlist` blocks of least importance."""

    beam: int = 3
    shortlist: int = 12


class Chooser:
    """The search over sets of removed blocks, with everything measured on the way."""

    def __init__(
        self,
        measure: Measure,
        importance: Sequence[float],
        search: Search,
        *,
        exclude: frozenset[int] = frozenset(),
        pairs: Sequence[frozenset[int]] = (),
        allowed: Callable[[frozenset[int]], bool] | None = None,
    ) -> None:
        self._measure, self._search, self._exclude = measure, search, exclude
        blocks = self.blocks = len(importance)
        self._allowed = allowed or (lambda some: len(some) < blocks)
        self._pairs = tuple(pair for pair in pairs if not pair & exclude)
        self.ranking = sorted(range(self.blocks), key=lambda block: (importance[block], block))
        self.measured: dict[frozenset[int], tuple[float, ...]] = {}

    def steps(self) -> Iterator[RemovalStep]:
        """The best set found of one block, of two, and so on; where nothing else is said, one block always stays."""
        smaller: list[frozenset[int]] = []
        kept: list[frozenset[int]] = [frozenset()]
        for _ in range(self.blocks - len(self._exclude)):
            grown = {start | {block} for start in kept for block in self._look(start)}
            grown |= {start | pair for start in smaller for pair in self._pairs if not pair & start}
            grown = set(filter(self._allowed, grown))
            if not grown:
                return
            smaller, kept = kept, self._best(grown)
            kept[0] = self._exchanged(kept[0])
            yield self._step(kept)

    def _look(self, start: frozenset[int]) -> list[int]:
        others = [block for block in self.ranking if block not in start | self._exclude]
        return others[: self._search.shortlist]

    def _best(self, sets: set[frozenset[int]]) -> list[frozenset[int]]:
        """The sets of least mean KL, best first."""
        new = sorted((s for s in sets if s not in self.measured), key=sorted)
        if new:
            for removed, klds in zip(new, self._measure(new).tolist(), strict=True):
                self.measured[removed] = tuple(klds)
        return sorted(sets, key=self._order)[: self._search.beam]

    def _order(self, removed: frozenset[int]) -> tuple[float, list[int]]:
        """By measured KL; equals by the ranks of their blocks."""
        return mean(self.measured[removed]), sorted(self.ranking.index(block) for block in removed)

    def _exchanged(self, best: frozenset[int]) -> frozenset[int]:
        """The set after exchanges of one block for another, as long as one measures better."""
        while len(best) > 1:
            others = self._look(best)
            exchanged = (best - {out} | {block} for out in best for block in others)
            found = self._best({best, *filter(self._allowed, exchanged)})[0]
            if found == best:
                break
            best = found
        return best

    def cheapest(self) -> RemovalStep:
        """The single block that costs least of those measured."""
        return self._step(self._best({s for s in self.measured if len(s) == 1}))

    def _step(self, kept: Sequence[frozenset[int]]) -> RemovalStep:
        best = kept[0]
        klds = self.measured[best]
        rivals = [s for s in self.measured if len(s) == len(best) and s != best]
        rival = min(rivals, key=self._order, default=None)
        more, error = 0.0, 0.0
        if rival is not None:
            gaps = (torch.tensor(self.measured[rival]) - torch.tensor(klds)).tolist()
            more, error = mean(gaps), standard_error(gaps) if len(gaps) > 1 else 0.0
        return RemovalStep(
            removed=tuple(sorted(best)),
            kld=mean(klds),
            standard_error=standard_error(klds) if len(klds) > 1 else 0.0,
            upper=upper_bound(klds) if len(klds) > 1 else mean(klds),
            rival=() if rival is None else tuple(sorted(rival)),
            rival_more=more,
            rival_error=error,
        )


def choose(chooser: Chooser, *, count: int | None, max_kld: float | None) -> tuple[RemovalStep, ...]:
    """The steps up to `count` blocks, or as long as the upper bound of the KL stays within `max_kld`; may be empty."""
    found: list[RemovalStep] = []
    if count == 0:
        return ()
    for step in chooser.steps():
        if max_kld is not None and step.upper > max_kld:
            break
        found.append(step)
        if len(found) == count:
            break
    return tuple(found)
