"""The nouns: frozen, strict, hashable values that pass between the stages. No tensor enters one.

Each stage file (`trace.json`, `scores.json`, `plan.json`, ...) is one of these as JSON, so a
corrupted or hand-edited file is refused with the place named.
"""

from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from llmcompress.options import QuantizerOptions as QuantizerOptions
from llmcompress.spec import InputSpec as InputSpec
from llmcompress.spec import LinearSpec as LinearSpec
from llmcompress.spec import Noun as Noun

Unit = Literal["nats/token", "proxy loss", "unitless"]


class LinearInfo(Noun):
    """One linear `(rows = outputs, columns = inputs)` and where its weight is kept.

    `transposed` marks GPT-2's Conv1D, stored `(columns, rows)`. Linears of one `unit` are fused by
    serving runtimes and must share a format; `shared_input` numbers the tensor the linear reads.
    """

    name: str
    tensor: str
    rows: int
    columns: int
    transposed: bool = False
    unit: str
    shared_input: int

    @property
    def weights(self) -> int:
        return self.rows * self.columns

    @property
    def stem(self) -> str:
        """What the names of its tensors begin with in a packed file."""
        return self.tensor.removesuffix(".weight")


class NormFeed(Noun):
    """The norm module whose output is the input of one shared-input group."""

    shared_input: int
    norm: str


class StreamWriter(Noun):
    """A linear whose output is added to a stream of the block: what enters the block, or what `norm` reads.

    `after` are linears whose outputs were added to that stream before, where several write side by side.
    """

    linear: str
    norm: str = ""
    after: tuple[str, ...] = ()


class ChildEnd(Noun):
    """A child of a block (attention, MLP) that returns the output of a linear inside it as it is.

    `beside` is how many Nones it returns after that in a tuple; 0 is a bare tensor.
    """

    child: str
    linear: str
    beside: int = 0


class BlockTrace(Noun):
    """What one forward of a block showed: its linears in call order, the norms that feed them, what they write to."""

    index: int
    name: str
    linears: tuple[LinearInfo, ...]
    norms: tuple[NormFeed, ...]
    writers: tuple[StreamWriter, ...] = ()
    ends: tuple[ChildEnd, ...] = ()


class ModelTrace(Noun):
    """The traced model: its blocks, the head where it is a linear of its own, and the size of everything else.

    `head` is the linear outside the blocks that makes the logits. One tied to the input embedding has no weight
    of its own: it is None, and stays at the source precision.
    """

    model_type: str
    blocks: tuple[BlockTrace, ...]
    head: LinearInfo | None = None
    parameters: int
    other_bytes: int  # tensors in the checkpoint that belong to no linear of the blocks
    untraced_share: float  # of the weights inside the blocks, e.g. fused experts

    @property
    def linears(self) -> tuple[LinearInfo, ...]:
        return tuple(linear for block in self.blocks for linear in block.linears)

    @property
    def every(self) -> tuple[LinearInfo, ...]:
        """The linears of the blocks and the head."""
        return self.linears if self.head is None else (*self.linears, self.head)


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


class Kept(Noun):
    """A linear left at the source precision, and why."""

    linear: str
    reason: str


class Assigned(Noun):
    """The format one linear gets."""

    linear: str
    spec: LinearSpec


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
    seed: int
    batch_size: int

    def left_alone(self, outside: Iterable[str]) -> list[str]:
        """Linears at the source precision, sorted: those kept, and of those `outside` the blocks what has no format."""
        alone = {name for name in outside if self.spec_of(name) is None}
        return sorted(alone | {kept.linear for kept in self.allocation.kept})

    def spec_of(self, linear: str) -> LinearSpec | None:
        """The format of one linear, None where it is kept at the source precision."""
        return next((a.spec for a in self.allocation.assigned if a.linear == linear), None)


class LinearOutcome(Noun):
    """What quantizing one linear cost."""

    linear: str
    bits: int
    proxy_loss: float
    relative_loss: float


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
