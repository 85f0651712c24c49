"""What must hold whatever the statistics say: figures are finite, sizes and digests are what they should be."""

import math
from collections.abc import Iterator
from typing import Any

from llmcompress.eval.report import EvalReport
from llmcompress.gate.limits import Limits
from llmcompress.gate.pairs import same_model, shares
from llmcompress.gate.verdict import Condition

WORST_PERPLEXITY = 10.0  # times the reference's; beyond it no limit means anything


def conditions(report: EvalReport, limits: Limits, baseline: EvalReport | None) -> tuple[Condition, ...]:
    """Every condition that can be told from the reports, whether it holds, and what was found."""
    return tuple(_conditions(report, limits, baseline))


def _conditions(report: EvalReport, limits: Limits, baseline: EvalReport | None) -> Iterator[Condition]:
    broken = sum(None in pair for pair in zip(report.per_sequence.kld, report.per_sequence.dnll, strict=True))
    count = len(report.per_sequence.seq_ids)
    yield Condition(
        name="finite",
        holds=report.finite,
        found="all figures are finite" if report.finite else f"{broken} of {count} sequences have figures that are not",
    )
    if report.finite:
        yield _perplexity(report)
    yield from _budget(report)
    digests = {
        "model": report.model.model_digest,
        "ref": report.ref.model_digest,
        "tokens": report.data.tokens_digest,
        "tokenizer": report.data.tokenizer_digest,
    }
    for name, wanted in limits.expect.items():
        holds = digests[name] == wanted
        found = "as expected" if holds else f"digest {digests[name]}, expected {wanted}"
        yield Condition(name=f"{name} digest", holds=holds, found=found)
    for task, documents in report.documents.items():
        if not shares(documents):
            yield Condition(name=f"task {task}", holds=True, found="not judged: its scores are not between 0 and 1")
    if baseline is not None and same_model(report, baseline):
        yield Condition(name="baseline", holds=True, found="the baseline's weights, bit for bit")


def _perplexity(report: EvalReport) -> Condition:
    differences = [value for value in report.per_sequence.dnll if value is not None]
    mean = sum(differences) / len(differences)
    ratio = f"{math.exp(mean):.4g}" if mean < 100 else "over 1e+43"
    return Condition(
        name="perplexity ratio",
        holds=mean <= math.log(WORST_PERPLEXITY),
        found=f"{ratio} times the reference's, at most {WORST_PERPLEXITY:g}",
    )


def _budget(report: EvalReport) -> Iterator[Condition]:
    """Bits of the packed linears, counted from the file, beside what the plan was allowed."""
    allocation = (report.plan or {}).get("allocation")
    allowed: Any = allocation.get("budget_bits") if isinstance(allocation, dict) else None
    size = report.footprint
    if size.bits_per_weight is None or not isinstance(allowed, int | float) or not size.quantized_weights:
        return
    most = allowed / size.quantized_weights
    yield Condition(
        name="budget",
        holds=round(size.bits_per_weight * size.quantized_weights) <= allowed,
        found=f"{size.bits_per_weight:.4f} bits per weight, at most {most:.4f}",
    )
