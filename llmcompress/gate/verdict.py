"""The nouns of a verdict: what was asked, what was found, and what follows."""

from typing import Literal

from llmcompress.gate.limits import Limits
from llmcompress.types import Noun

Word = Literal["pass", "fail", "undecided"]
EXIT_CODES: dict[Word, int] = {"pass": 0, "fail": 1, "undecided": 4}


class Condition(Noun):
    """Something that must hold whatever the statistics say."""

    name: str
    holds: bool
    found: str


class Criterion(Noun):
    """A damage, its limit, and the answer.

    estimate   null where it is not finite, as the bounds are
    low, high  one-sided bounds, each at level `1 - alpha / looks`
    needed     sequences or documents that would probably decide; null where decided, or where no number would
    note       what else a reader should know
    """

    name: str
    unit: Literal["nats/token", "share"]
    verdict: Word
    estimate: float | None
    low: float | None
    high: float | None
    limit: float
    count: int
    counted: Literal["sequences", "documents"]
    needed: int | None = None
    note: str = ""


class Verdict(Noun):
    """All answers together. `level` is that of every bound;"""

    verdict: Word
    model: str
    ref: str
    baseline: str | None
    limits: Limits
    level: float
    conditions: tuple[Condition, ...]
    criteria: tuple[Criterion, ...]

    @property
    def exit_code(self) -> int:
        """0 passed, 1 failed, 4 undecided."""
        return EXIT_CODES[self.verdict]

    def needed(self, counted: Literal["sequences", "documents"]) -> int | None:
        """The most sequences or documents that an undecided criterion asks for; None where none does, or none helps."""
        asked = [c.needed for c in self.criteria if c.verdict == "undecided" and c.counted == counted]
        return max((number for number in asked if number is not None), default=None) if None not in asked else None
