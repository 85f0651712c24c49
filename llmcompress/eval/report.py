"""report.json: one schema, with a version; strict JSON, readable without torch."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy
from pydantic import Field

from llmcompress.eval.statistics import cluster_t, design_effect, kl_interval
from llmcompress.types import Noun

if TYPE_CHECKING:
    from llmcompress.eval.fidelity import SequenceFidelity

QUANTILES = (0.5, 0.9, 0.95, 0.99)


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


class Estimate(Noun):
    """A mean over sequences with its interval; null where it is not finite or cannot be told."""

    mean: float | None
    low: float | None = None
    high: float | None = None


class Quantile(Noun):
    """Share of sequences at or below a value."""

    share: float
    value: float | None


class PerSequence(Noun):
    """One entry per sequence, in order. `kld`, `dnll` and `nll_reference` in nats per token."""

    seq_ids: tuple[int, ...]
    kld: tuple[float | None, ...]
    dnll: tuple[float | None, ...]
    nll_reference: tuple[float | None, ...]
    top1: tuple[float, ...]


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
    """Sizes on disk."""

    shard_bytes: int
    directory_bytes: int
    reference_shard_bytes: int
    parameters: int
    quantized_weights: int
    bits_per_weight: float | None
    file_bits_per_weight: float


class EvalReport(Noun):
    """The whole of report.json. `tasks` has the shape of lm-evaluation-harness `results`."""

    schema_version: Literal["1"] = "1"
    model: ModelFacts
    ref: ModelFacts
    data: DataFacts
    finite: bool
    summary: Summary
    per_sequence: PerSequence
    footprint: Footprint
    tasks: dict[str, dict[str, float]] = Field(default_factory=dict)
    plan: dict[str, Any] | None = None
    environment: dict[str, str]
    command: str
    date: str


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _estimate(values: Sequence[float], *, kind: Literal["kl", "plain"] = "plain") -> Estimate:
    array = numpy.asarray(values, dtype=numpy.float64)
    if not numpy.isfinite(array).all():
        return Estimate(mean=None)
    found = kl_interval(array) if kind == "kl" else cluster_t(array)
    low, high = found if found else (None, None)
    return Estimate(mean=float(array.mean()), low=low, high=high)


def _exponent(estimate: Estimate) -> Estimate:
    parts = (
        None if v is None else _number(math.exp(min(v, 700))) for v in (estimate.mean, estimate.low, estimate.high)
    )
    mean, low, high = parts
    return Estimate(mean=mean, low=low, high=high)


def _perplexity(likelihoods: Sequence[float], weights: Sequence[int]) -> float | None:
    total = sum(weights)
    mean = sum(x * w for x, w in zip(likelihoods, weights, strict=True)) / total if total else math.nan
    return _number(math.exp(mean)) if math.isfinite(mean) and mean < 700 else None


def summarize(sequences: Sequence["SequenceFidelity"]) -> Summary:
    """Means, intervals and quantiles over sequences. Perplexities weigh every predicted token alike."""
    kld = numpy.asarray([s.kld for s in sequences], dtype=numpy.float64)
    predicted = [s.positions - 1 for s in sequences]
    difference = _estimate([s.nll_candidate - s.nll_reference for s in sequences])
    finite = bool(numpy.isfinite(kld).all())
    effect = design_effect(
        kld,
        numpy.asarray([s.kld_spread for s in sequences], dtype=numpy.float64),
        numpy.asarray([s.positions for s in sequences], dtype=numpy.float64),
    )
    return Summary(
        level=0.95,
        kld=_estimate([s.kld for s in sequences], kind="kl"),
        kld_quantiles=tuple(
            Quantile(share=q, value=float(numpy.quantile(kld, q)) if finite else None) for q in QUANTILES
        ),
        kld_largest_position=_number(max(s.kld_largest for s in sequences)),
        dnll=difference,
        perplexity_reference=_perplexity([s.nll_reference for s in sequences], predicted),
        perplexity_candidate=_perplexity([s.nll_candidate for s in sequences], predicted),
        perplexity_ratio=_exponent(difference),
        top1=_estimate([s.top1 for s in sequences]),
        design_effect=effect if effect is not None and math.isfinite(effect) else None,
    )


def per_sequence(sequences: Sequence["SequenceFidelity"]) -> PerSequence:
    """The arrays behind the summary."""
    return PerSequence(
        seq_ids=tuple(range(len(sequences))),
        kld=tuple(_number(s.kld) for s in sequences),
        dnll=tuple(_number(s.nll_candidate - s.nll_reference) for s in sequences),
        nll_reference=tuple(_number(s.nll_reference) for s in sequences),
        top1=tuple(s.top1 for s in sequences),
    )


def json_schema() -> dict[str, Any]:
    """The JSON Schema of report.json."""
    return EvalReport.model_json_schema()
