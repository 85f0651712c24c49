"""How batches of text are dealt to processes, and how what each finds is put together again.

Batch `i` is that of process `i mod size`. Sums over batches are added in the order of the batches, whoever has them,
a batch's own term after another to one running total: floating-point sums depend on their order, and so one process,
two and four give the same bits.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from llmcompress.model.crew import ALONE, Crew, Form, form_of, json_of, raw

HEADER_BYTES = 1024
Item = TypeVar("Item")


@dataclass(frozen=True)
class Share:
    """This process's part of `count` batches."""

    count: int
    crew: Crew = ALONE

    @property
    def places(self) -> range:
        """Which of all the batches it has, in order."""
        return range(self.crew.rank, self.count, self.crew.size)

    def of(self, items: Sequence[Item]) -> list[Item]:
        """Its own of a list with an entry for each batch."""
        return [items[place] for place in self.places]

    def all(self, mine: Sequence[Tensor]) -> list[Tensor]:
        """From a tensor for each of its own batches those of all, in order, on every process."""
        found: dict[int, Tensor] = {}
        for rank in range(self.crew.size):
            own = {str(place): x for place, x in zip(self.places, mine, strict=True)} if rank == self.crew.rank else {}
            found |= {int(place): x for place, x in self.crew.spread(own, rank).items()}
        return [found[place] for place in range(self.count)]

    def gathered(self, mine: Sequence[Tensor]) -> Iterator[Tensor]:
        """The same, one at a time, on process 0 alone; the others give theirs and see nothing."""
        own = iter(mine)
        for place in range(self.count):
            owner = place % self.crew.size
            if owner == self.crew.rank:
                tensor = next(own)
                if owner == 0:
                    yield tensor
                else:
                    settle(self.crew, post(self.crew, 0, str(place), tensor))
            elif self.crew.rank == 0:
                yield self._fetched(owner)

    def _fetched(self, source: int) -> Tensor:
        _, tensor = fetch(self.crew, source)
        if tensor is None:
            raise ValueError("a name came without its tensor")
        return tensor


def post(crew: Crew, to: int, name: str, tensor: Tensor | None) -> list[tuple[Any, Tensor]]:
    """Begin to send a named tensor, or a name alone; the sends to wait for, with what must stay until then."""
    document: dict[str, Any] = {"name": name}
    if tensor is not None:
        document |= {"form": form_of(tensor)}
    words = json.dumps(document).encode().ljust(HEADER_BYTES)
    if len(words) > HEADER_BYTES:
        raise ValueError(f"{name}: too long a name to send")
    parts = [torch.frombuffer(bytearray(words), dtype=torch.uint8)]
    if tensor is not None and tensor.numel():
        parts.append(raw(tensor))
    with crew.speaking():
        return [(dist.isend(part, to), part) for part in parts]


def settle(crew: Crew, sends: list[tuple[Any, Tensor]]) -> None:
    """Wait until what was sent has been taken."""
    with crew.speaking():
        for work, _ in sends:
            work.wait()
    sends.clear()


def fetch(crew: Crew, source: int) -> tuple[str, Tensor | None]:
    """The next that `source` sent."""
    header = torch.empty(HEADER_BYTES, dtype=torch.uint8)
    with crew.speaking():
        dist.recv(header, source)
        document = json_of(header)
        if "form" not in document:
            return document["name"], None
        form = Form(*document["form"])
        data = form.room()
        if data.numel():
            dist.recv(data, source)
    return document["name"], form.tensor(data, crew.device)


class OrderedSums:
    """Sums over batches of tensors by name. A batch need not have a term of every name, and may come more than once.

    Process 0 has the totals, and adds the terms of a batch as its turn comes; the others send theirs.
    """

    def __init__(self, share: Share) -> None:
        self._crew, self._count = share.crew, share.count
        self._totals: dict[str, Tensor] = {}
        self._turn = share.crew.rank  # the batch at hand
        self._sends: list[tuple[Any, Tensor]] = []
        self._begun = False

    def put(self, name: str, term: Tensor) -> None:
        """Add a term of the batch at hand; it is not written to again."""
        if self._crew.rank == 0:
            self._add(name, term)
            return
        if not self._begun:  # the batch before has been taken while this one was run
            settle(self._crew, self._sends)
            self._begun = True
        self._sends += post(self._crew, 0, name, term)

    def _add(self, name: str, term: Tensor) -> None:
        total = self._totals.get(name)
        if total is None:
            self._totals[name] = term
        else:
            total += term

    def close_batch(self) -> None:
        """All terms of the batch at hand are in; the next of this process follows."""
        if self._turn >= self._count:  # once more through all of them
            self._turn = self._crew.rank
        if self._crew.rank:
            self._sends += post(self._crew, 0, "", None)
            self._begun = False
        for rank in range(1, self._crew.size) if self._crew.rank == 0 else ():
            if self._turn + rank < self._count:
                self._take(rank)
        self._turn += self._crew.size

    def _take(self, rank: int) -> None:
        while True:
            name, term = fetch(self._crew, rank)
            if term is None:
                return
            self._add(name, term)

    def take(self) -> dict[str, Tensor]:
        """The sums, on every process, once each has closed all of its batches; they are no longer here."""
        settle(self._crew, self._sends)
        found = self._crew.spread(self._totals)
        self._totals = {}
        return found
