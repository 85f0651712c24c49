"""`tying.json`: which blocks share their weights, why, and what it measured."""

from llmcompress.compress.output import Origin
from llmcompress.compress.prune.records import RemovalStep
from llmcompress.types import Noun

TYING_NAME = "tying.json"


class Instead(Noun):
    """What removing blocks costs, as many as save at least the same bytes, on the same text.

    more, more_error  how much more KL tying measures than removing, and the standard error of that, by sequence
    """

    removed: tuple[int, ...]
    saved_bytes: int
    kld: float
    standard_error: float
    more: float
    more_error: float

    def verdict(self, saved_bytes: int) -> str:
        """What the comparison says, in words; `saved_bytes` is what tying saves."""
        clear = abs(self.more) > 2 * self.more_error
        costs = ("costs more" if self.more > 0 else "costs less") if clear else "costs neither more nor less"
        gap = self.saved_bytes - saved_bytes
        return f"tying {costs}: {self.more:+.5f} ± {self.more_error:.5f}, and saves {abs(gap):,} bytes " + (
            "less" if gap >= 0 else "more"
        )


class TyingRecord(Noun):
    """Everything about one tied model. Blocks are numbered from 0, groups are written `4+5`.

    size, rank     blocks in a group, and the rank of corrections that was asked for
    single         KL of tying each group alone, for each weight it could share: `4+5 mean`
    steps          the best set of every number of groups; `removed` are the groups that are tied
    groups, bases  the groups of the result, and whose weight each shares: `first`, `last` or `mean`
    bytes_before, bytes_after  of all shards
    kld            of the result on text that the choice did not see, with its standard error and 95 % upper bound
    """

    version: int = 1
    llmcompress: str
    origin: Origin
    command: str
    size: int
    rank: int
    single: dict[str, float]
    steps: tuple[RemovalStep, ...]
    groups: tuple[str, ...]
    bases: tuple[str, ...]
    blocks: int
    bytes_before: int
    bytes_after: int
    kld: float
    standard_error: float
    upper: float
    instead: Instead
    sequences: int
    calibration: str
    calibration_digest: str
    seed: int

    @property
    def verdict(self) -> str:
        """How it compares with removing, in words."""
        return self.instead.verdict(self.bytes_before - self.bytes_after)
