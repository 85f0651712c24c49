"""report.json: one schema, with a version; strict JSON, readable without torch."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy
from pydantic import Field, model_validator

from llmcompress.errors import InputError
from llmcompress.eval.facts import BlockCost as BlockCost
from llmcompress.eval.facts import BlockError as BlockError
from llmcompress.eval.facts import Estimate as Estimate
from llmcompress.eval.facts import Quantile as Quantile
from llmcompress.eval.facts import Sampling as Sampling
from llmcompress.eval.facts import Speed as Speed
from llmcompress.eval.facts import TokenFacts as TokenFacts
from llmcompress.eval.statistics import cluster_t, design_effect, kl_interval
from llmcompress.types import Noun

if TYPE_CHECKING:
    from llmcompress.eval.fidelity import SequenceFidelity

QUANTILES = (0.5, 0.9, 0.95, 0.99)
LARGEST_EXPONENT = 700.0  # exp() of more is not a number worth reporting


class ModelFacts(Noun):
    """One of the two models compared."""

    name: str
    model_digest: str
    revision: str | None = None


class DataFacts(Noun):
    """The text both models read."""

    source: str
    text_digest: str
    tokens_digest: str
    tokenizer_digest: str
    sequences: int
    sequence_length: int
    seed: int


class PerSequence(Noun):
    """One entry per sequence, in order. `kld`, `dnll` and `nll_reference` in nats per token."""

    seq_ids: tuple[int, ...]
    kld: tuple[float | None, ...]
    dnll: tuple[float | None, ...]
    nll_reference: tuple[float | None, ...]
    top1: tuple[float, ...]

    @model_validator(mode="after")
    def _same_length(self) -> Self:
        lengths = {len(values) for values in (self.seq_ids, self.kld, self.dnll, self.nll_reference, self.top1)}
        if len(lengths) != 1:
            raise ValueError(f"arrays of different lengths: {sorted(lengths)}")
        return self


class Summary(Noun):
    """What the comparison comes to, at the 95 % level, sequences being the unit."""

    level: float
    kld: Estimate
    kld_quantiles: tuple[Quantile, ...]
    kld_largest_position: float | None
    dnll: Estimate
    perplexity_reference: float | None
    perplexity_candidate: float | None
    perplexity_ratio: Estimate
    top1: Estimate
    design_effect: float | None


class Footprint(Noun):
    """Sizes on disk, and in memory where speed was measured: bytes of parameters and buffers."""

    shard_bytes: int
    directory_bytes: int
    reference_shard_bytes: int
    parameters: int
    quantized_weights: int
    bits_per_weight: float | None
    file_bits_per_weight: float
    resident_bytes: int | None = None
    reference_resident_bytes: int | None = None
    reference_parameters: int | None = None

    @property
    def original_parameters(self) -> int:
        """Of the original: more than `parameters` where blocks were removed. Reports did not say it at first."""
        return max(self.reference_parameters or self.parameters, 1)

    @property
    def bits_per_original_weight(self) -> float:
        """All shards over the original's weights: what models with and without all blocks are compared by."""
        return 8 * self.shard_bytes / self.original_parameters


class TaskDocuments(Noun):
    """One public task, document by document: what each model scored, paired by position (0 or 1, or a value)."""

    metric: str
    doc_ids: tuple[int | str, ...]
    reference: tuple[float, ...]
    candidate: tuple[float, ...]


class VoidRun(Noun):
    """One way to run the model, against the reference. `kld` in nats per token.

    protocol  `whole`; `attribution`, the paper's, where every block runs; or `skip` and the parts it is done in
    usage     of each block, the share of tokens it was no void for
    """

    protocol: str
    usage_prompt: tuple[float, ...]
    usage_response: tuple[float, ...]
    kld_prompt: Estimate
    kld_response: Estimate
    dnll_response: Estimate
    top1_response: Estimate


class VoidSkipping(Noun):
    """Voids skipped per token (L2 adaptive computation); the first `prompt_tokens` of a text are its prompt."""

    alpha: float
    prompt_tokens: int
    runs: tuple[VoidRun, ...]


class EvalReport(Noun):
    """The whole of report.json.

    `tasks` (the model) and `reference_tasks` have the shape of lm-evaluation-harness `results`, `harness` is what else
    it wrote: versions, shots, numbers of documents, task hashes. `trajectory` is empty where blocks cannot be compared.
    Version 2 adds `tokens`, `trajectory`, `costs`, `sampling`, `speed`, `voids`, `reference_tasks`, `harness`, resident
    bytes; files of version 1, which have none of them, are read as well.
    """

    schema_version: Literal["1", "2"] = "2"
    model: ModelFacts
    ref: ModelFacts
    data: DataFacts
    finite: bool
    summary: Summary
    per_sequence: PerSequence
    footprint: Footprint
    tokens: TokenFacts | None = None
    trajectory: tuple[BlockError, ...] = ()
    costs: tuple[BlockCost, ...] = ()
    sampling: Sampling | None = None
    speed: tuple[Speed, ...] = ()
    tasks: dict[str, dict[str, float | str]] = Field(default_factory=dict)
    reference_tasks: dict[str, dict[str, float | str]] = Field(default_factory=dict)
    harness: dict[str, Any] | None = None
    documents: dict[str, TaskDocuments] = Field(default_factory=dict)
    voids: VoidSkipping | None = None
    plan: dict[str, Any] | None = None
    environment: dict[str, str]
    command: str
    date: str

    @model_validator(mode="after")
    def _says_what_is_missing(self) -> Self:
        arrays = (self.per_sequence.kld, self.per_sequence.dnll)
        if self.finite and any(None in values for values in arrays):
            raise ValueError("finite is true but a sequence has no figure")
        later = (self.tokens, self.trajectory, self.costs, self.sampling, self.speed, self.voids)
        if self.schema_version == "1" and any((*later, self.reference_tasks, self.harness)):
            raise ValueError("schema_version is 1 but there are figures of version 2")
        return self


def number(value: float) -> float | None:
    """A value, null where it is not finite."""
    return value if math.isfinite(value) else None


def estimate(values: Sequence[float], *, kind: Literal["kl", "plain"] = "plain") -> Estimate:
    """The mean of per-sequence values and its 95 % interval, of the kind that suits a KL divergence or any other."""
    array = numpy.asarray(values, dtype=numpy.float64)
    if not numpy.isfinite(array).all():
        return Estimate(mean=None)
    found = kl_interval(array) if kind == "kl" else cluster_t(array)
    low, high = found if found else (None, None)
    return Estimate(mean=float(array.mean()), low=low, high=high)


def _exponent(estimate: Estimate) -> Estimate:
    mean, low, high = map(_exp, (estimate.mean, estimate.low, estimate.high))
    whole = low is not None and high is not None
    return Estimate(mean=mean, low=low if whole else None, high=high if whole else None)


def _exp(value: float | None) -> float | None:
    return math.exp(value) if value is not None and value < LARGEST_EXPONENT else None


def perplexity(sequences: Sequence["SequenceFidelity"]) -> tuple[float | None, float | None]:
    """Perplexities of reference and candidate, every predicted token weighing alike; None where not finite."""
    weights = [s.positions - 1 for s in sequences]
    found = []
    for likelihoods in ([s.nll_reference for s in sequences], [s.nll_candidate for s in sequences]):
        found.append(_exp(number(sum(x * w for x, w in zip(likelihoods, weights, strict=True)) / sum(weights))))
    return found[0], found[1]


def summarize(sequences: Sequence["SequenceFidelity"]) -> Summary:
    """Means, intervals and quantiles over sequences. Perplexities weigh every predicted token alike.

    Raises InputError when there are no sequences.
    """
    if not sequences:
        raise InputError("there are no sequences to summarize", "give a longer text")
    kld = numpy.asarray([s.kld for s in sequences], dtype=numpy.float64)
    before, after = perplexity(sequences)
    difference = estimate([s.nll_candidate - s.nll_reference for s in sequences])
    finite = bool(numpy.isfinite(kld).all())
    effect = design_effect(
        kld,
        numpy.asarray([s.kld_spread for s in sequences], dtype=numpy.float64),
        numpy.asarray([s.positions for s in sequences], dtype=numpy.float64),
    )
    return Summary(
        level=0.95,
        kld=estimate([s.kld for s in sequences], kind="kl"),
        kld_quantiles=tuple(
            Quantile(share=q, value=float(numpy.quantile(kld, q)) if finite else None) for q in QUANTILES
        ),
        kld_largest_position=number(float(numpy.max([s.kld_largest for s in sequences]))),
        dnll=difference,
        perplexity_reference=before,
        perplexity_candidate=after,
        perplexity_ratio=_exponent(difference),
        top1=estimate([s.top1 for s in sequences]),
        design_effect=None if effect is None else number(effect),
    )


def per_sequence(sequences: Sequence["SequenceFidelity"]) -> PerSequence:
    """The arrays behind the summary."""
    return PerSequence(
        seq_ids=tuple(range(len(sequences))),
        kld=tuple(number(s.kld) for s in sequences),
        dnll=tuple(number(s.nll_candidate - s.nll_reference) for s in sequences),
        nll_reference=tuple(number(s.nll_reference) for s in sequences),
        top1=tuple(s.top1 for s in sequences),
    )


def json_schema() -> dict[str, Any]:
    """The JSON Schema of report.json."""
    return EvalReport.model_json_schema()
