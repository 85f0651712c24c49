"""The nouns: frozen, strict, hashable values that pass between the stages. No tensor enters one.

Each stage file (`trace.json`, `scores.json`, `plan.json`, ...) is one of these as JSON, so a
corrupted or hand-edited file is refused with the place named.
"""

from collections.abc import Iterable
from functools import cached_property
from typing import Literal

from pydantic import Field

from llmcompress.options import QuantizerOptions as QuantizerOptions
from llmcompress.spec import InputSpec as InputSpec
from llmcompress.spec import LinearSpec as LinearSpec
from llmcompress.spec import Noun as Noun
from llmcompress.traces import BlockTrace as BlockTrace
from llmcompress.traces import ChildEnd as ChildEnd
from llmcompress.traces import LinearInfo as LinearInfo
from llmcompress.traces import ModelTrace as ModelTrace
from llmcompress.traces import NormFeed as NormFeed
from llmcompress.traces import StreamWriter as StreamWriter

Unit = Literal["nats/token", "proxy loss", "unitless"]


class Candidate(Noun):
    """One format a linear could get and the damage expected of it, in the unit of the Scores.

    `standard_error` over sequences, where the damage was measured.
    """

    spec: LinearSpec
    damage: float = Field(ge=0)
    standard_error: float | None = Field(default=None, ge=0)


class LayerScore(Noun):
    """Damage of each candidate for one linear, and the importance it came from where there is one."""

    linear: str
    importance: float | None = None
    candidates: tuple[Candidate, ...]


class Series(Noun):
    """One value per block, or per point of a path through the model, that a scorer found on the way."""

    name: str
    values: tuple[float, ...]


class Scores(Noun):
    """The outcome of one scorer over one model and one calibration text.

    `settings_digest` covers what else the figures depend on: quantizer, candidates, options.
    """

    scorer: str
    unit: Unit
    model_digest: str
    calibration_digest: str
    settings_digest: str = ""
    seed: int
    layers: tuple[LayerScore, ...]
    series: tuple[Series, ...] = ()


class ScoreFile(Noun):
    """`scores.json`: scores with the trace they belong to, enough to plan without the model."""

    version: Literal[2] = 2
    model: str
    trace: ModelTrace
    scores: tuple[Scores, ...]
    group_size: int
    other_bytes: int  # of the shards, beyond the packed linears


class Assigned(Noun):
    """The format one linear gets."""

    linear: str
    spec: LinearSpec


class Kept(Noun):
    """A linear left at the source precision, and why."""

    linear: str
    reason: str


class Fallback(Noun):
    """Something that could not be done as asked, and what was done instead."""

    where: str
    reason: str


class BitAllocation(Noun):
    """Which linear gets which format, and how good that choice provably is."""

    assigned: tuple[Assigned, ...]
    kept: tuple[Kept, ...]
    fallbacks: tuple[Fallback, ...]
    budget: str
    budget_bits: int  # over the quantized linears
    storage_bits: int  # over the quantized linears
    bits_per_weight: float
    file_bytes: int  # expected bytes of all weight shards
    file_bits_per_weight: float
    expected_damage: float
    lower_bound: float
    status: Literal["optimal", "gap"]
    under_budget_reason: str = ""

    @property
    def gap(self) -> float:
        """Relative distance between the choice and the proven bound."""
        span = max(abs(self.expected_damage), 1e-30)
        return max(self.expected_damage - self.lower_bound, 0.0) / span


class Trial(Noun):
    """One allocation carried out on calibration text, and the KL divergence it really gave, nats per token.

    `standard_error` is over sequences; `upper` is the bound that a damage limit was held against, in its own unit.
    """

    label: str
    widths: tuple[int, ...]
    bits_per_weight: float
    expected_damage: float
    measured_kld: float
    standard_error: float | None = None
    upper: float | None = None


class Move(Noun):
    """One unit's width before and after an exchange."""

    unit: str
    before: int
    after: int


class Exchange(Noun):
    """Moves made together within the budget, and the change of KL they measured, nats per token."""

    moves: tuple[Move, ...]
    change: float
    standard_error: float


class JointTrial(Noun):
    """Some blocks dropped and the rest within the budget, carried out on calibration text.

    bits_per_weight  over the quantized linears of the original, those of dropped blocks at no bits
    removal_kld      KL of dropping the blocks alone, and `expected_damage` that and the damage of the rest, in nats per
                     token; `measured_kld` of both together, with its standard error over sequences
    """

    dropped: tuple[int, ...]
    bits_per_weight: float
    removal_kld: float
    expected_damage: float
    measured_kld: float
    standard_error: float


class Dropping(Noun):
    """Whether blocks were dropped for bits elsewhere: what was tried, and which blocks of how many went.

    `weights` are those of the original's linears that a budget in bits per weight counts.
    """

    trials: tuple[JointTrial, ...]
    dropped: tuple[int, ...]
    blocks: int
    weights: int


class FeedbackTrial(Noun):
    """Whether output-side feedback is used: the plan carried out without and with it, `rows` rows at a time.

    KL divergence on calibration text that neither saw, nats per token; `standard_error` is that of the difference,
    over sequences.
    """

    rows: int
    kld_without: float
    kld_with: float
    standard_error: float

    @property
    def accepted(self) -> bool:
        """Whether the KL divergence fell."""
        return self.kld_with < self.kld_without

    @property
    def words(self) -> str:
        """The verdict with its figures."""
        change = self.kld_with - self.kld_without
        verdict = "accepted" if self.accepted else "refused"
        return (
            f"output-side feedback, {self.rows} rows at a time, {verdict}: measured KL {self.kld_without:.5f} without, "
            f"{self.kld_with:.5f} with it ({change:+.5f} ± {self.standard_error:.5f})"
        )


class Plan(Noun):
    """All decisions of a run, hashed; a resumed run compares it with the one that began."""

    version: int = 1
    model: str
    model_digest: str
    calibration: str
    calibration_digest: str
    scorer: str
    program: str = "integer"
    quantizer: str
    options: QuantizerOptions
    allocation: BitAllocation
    trials: tuple[Trial, ...] = ()
    exchanges: tuple[Exchange, ...] = ()
    dropping: Dropping | None = None
    output_feedback: FeedbackTrial | None = None
    seed: int
    batch_size: int

    @cached_property
    def specs(self) -> dict[str, LinearSpec]:
        return {a.linear: a.spec for a in self.allocation.assigned}

    def left_alone(self, outside: Iterable[str]) -> list[str]:
        """Linears at the source precision, sorted: those kept, and of those `outside` the blocks what has no format."""
        alone = {name for name in outside if self.spec_of(name) is None}
        return sorted(alone | {kept.linear for kept in self.allocation.kept})

    def spec_of(self, linear: str) -> LinearSpec | None:
        """The format of one linear, None where it is kept at the source precision."""
        return self.specs.get(linear)


class LinearOutcome(Noun):
    """What quantizing one linear cost; of an expert's, how many calibration tokens were routed to it."""

    linear: str
    bits: int
    proxy_loss: float
    relative_loss: float
    tokens: int | None = None


class BlockOutcome(Noun):
    """What became of one block; `shard` is its file in the output.

    A quantized head is a step like a block, numbered after the last of them.
    """

    block: int
    shard: str
    linears: tuple[LinearOutcome, ...]
    fallbacks: tuple[Fallback, ...]
    seconds: float
    resumed: bool = False


class RewriteOutcome(Noun):
    """What one rewrite did, to a block or to the whole model (`block` is None then).

    `difference` is the largest relative difference of its output in float64; `notes` are for whoever saves the model.
    """

    method: str
    block: int | None
    sites: int
    fallbacks: tuple[Fallback, ...] = ()
    difference: float
    notes: tuple[str, ...] = ()


class RewriteRecord(Noun):
    """`rewriting.json`: everything that was done, and the KL (nats per token) of storing it in the source's dtype."""

    outcomes: tuple[RewriteOutcome, ...]
    storing_kld: float

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods, in the order they were used."""
        return tuple(dict.fromkeys(outcome.method for outcome in self.outcomes))
