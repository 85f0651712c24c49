"""How much memory a run needs, stage by stage, and what it does to keep to less.

Counted is anonymous memory: what the system cannot get back by dropping or writing pages of files.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from llmcompress.errors import InputError

PROGRAM = 320 << 20  # the interpreter, torch and transformers, as imported
HOLES = 96 << 20  # at most, and at most half of what is in use: kept by the C library's heap, of small tensors


@dataclass(frozen=True)
class Stage:
    """One stage of a run and what is in memory at its height, bytes by name.

    `hidden` are hidden states and what else waits for the next block: in files instead, where memory is limited.
    `limited` are terms that are others then, `files` what that puts into files.
    """

    name: str
    terms: Mapping[str, int]
    hidden: int = 0
    limited: Mapping[str, int] = field(default_factory=dict)
    files: int = 0

    def total(self, *, spilled: bool) -> int:
        """Bytes, with hidden states in memory or not."""
        return sum(self.every(spilled=spilled).values())

    def every(self, *, spilled: bool) -> dict[str, int]:
        """All terms that are not nothing, the largest first."""
        found = {**self.terms, **self.limited} if spilled else {**self.terms, "hidden states": self.hidden}
        found |= {"program": PROGRAM, "heap": min(sum(found.values()) // 2, HOLES)}
        return dict(sorted(((k, v) for k, v in found.items() if v), key=lambda pair: -pair[1]))


Stages = tuple[Stage, ...]


def peak(found: Stages, *, spilled: bool) -> Stage:
    """The stage that needs most."""
    return max(found, key=lambda stage: stage.total(spilled=spilled))


@dataclass(frozen=True)
class Fitted:
    """How a run keeps to a limit: sequences in a batch, whether hidden states are in files, and what it comes to."""

    batch_size: int
    spilled: bool
    needed_bytes: int

    def words(self, batch_size: int) -> str:
        """What is done about the limit, in place of batches of `batch_size`; nothing where nothing is."""
        said = ["hidden states go to files"] if self.spilled else []
        if self.batch_size != batch_size:
            said.append(f"batches of {self.batch_size}, so that last bits may differ")
        return " and ".join(said) and f"to keep to the memory: {', '.join(said)}"


def fit(stages: Callable[[int], Stages], batch_size: int, limit: int | None, *, other: str = "") -> Fitted:
    """Hidden states go to files first, which changes no result; then text goes through in smaller batches.

    stages  by the number of sequences in a batch
    limit   in bytes; None is none

    Raises InputError with the memory that is needed where even batches of one sequence do not fit, and `other` advice.
    """
    found, spilled = peak(stages(batch_size), spilled=False), False
    while limit is not None and found.total(spilled=spilled) > limit:
        if spilled and batch_size == 1:
            least = f"{math.ceil(found.total(spilled=True) / 1e6)}MB"
            raise InputError(
                f"memory of {limit / 1e6:.0f} MB is too little: {found.name} takes {least}",
                f"give --max-memory {least} or more{other}",
            )
        batch_size = batch_size // 2 if spilled else batch_size
        spilled = True
        found = peak(stages(batch_size), spilled=True)
    return Fitted(batch_size, spilled, found.total(spilled=spilled))
