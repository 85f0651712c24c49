"""Turn a report into a verdict.

PASS only if every criterion is shown to be within its limit (all of them must be, so no correction is needed);
FAIL if one is shown to be beyond it (Holm's procedure over all of them) or a condition does not hold; else
undecided. Figures are taken from the report's arrays, never from its summary.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy

from llmcompress.errors import InputError
from llmcompress.eval.report import EvalReport, TaskDocuments
from llmcompress.gate.conditions import conditions
from llmcompress.gate.limits import Limits
from llmcompress.gate.pairs import better_larger, check_baseline, check_units, same_model, shares
from llmcompress.gate.rules import Finding, Floats, Levels, holm, kl_rule, mcnemar, mean_rule, paired_rule, ratio_rule
from llmcompress.gate.verdict import Condition, Criterion, Verdict, Word

FEWEST = 8  # sequences or documents; below, no interval keeps its promise


@dataclass(frozen=True)
class Question:
    """One criterion before it is answered. `shown` turns a bound of the rule into the unit of `limit`."""

    name: str
    unit: Literal["nats/token", "share"]
    counted: Literal["sequences", "documents"]
    limit: float
    count: int
    rule: Callable[[Levels], Finding]
    shown: Callable[[float], float] = float
    note: str = ""


def judge(report: EvalReport, limits: Limits, baseline: EvalReport | None = None) -> Verdict:
    """The verdict on `report`, and on its regressions from `baseline`.

    Raises InputError when nothing is judged, when sequences or documents are counted twice, and when the two reports
    cannot be paired.
    """
    check_units(report)
    if baseline is not None:
        check_units(baseline)
        check_baseline(report, baseline)
    held = conditions(report, limits, baseline)
    level = limits.alpha / limits.looks
    questions = tuple(_questions(report, limits, baseline)) if report.finite else ()
    if report.finite and not questions:
        raise InputError("there is nothing to judge", "set limits, for example --max-kld 0.05, or choose a profile")
    criteria = _answers(questions, level)
    return Verdict(
        verdict=_together(held, criteria),
        model=report.model.name,
        ref=report.ref.name,
        baseline=baseline.model.name if baseline else None,
        limits=limits,
        level=1 - level,
        conditions=held,
        criteria=criteria,
    )


def _together(held: tuple[Condition, ...], criteria: tuple[Criterion, ...]) -> Word:
    words = {criterion.verdict for criterion in criteria}
    if "fail" in words or not all(condition.holds for condition in held):
        return "fail"
    return "undecided" if "undecided" in words else "pass"


def _answers(questions: tuple[Question, ...], alpha: float) -> tuple[Criterion, ...]:
    asked = [q for q in questions if q.count >= FEWEST]
    levels = Levels(passing=alpha, failing=alpha / max(len(asked), 1))
    findings = [question.rule(levels) for question in asked]
    failed = holm([finding.p_above for finding in findings], alpha)
    found = iter(zip(findings, failed, strict=True))
    return tuple(_answer(q, *next(found)) if q.count >= FEWEST else _too_few(q) for q in questions)


def _answer(question: Question, finding: Finding, beyond: bool) -> Criterion:
    within = question.shown(finding.high) <= question.limit
    word: Word = "fail" if beyond else "pass" if within else "undecided"
    return Criterion(
        name=question.name,
        unit=question.unit,
        verdict=word,
        estimate=_finite(question.shown(finding.estimate)),
        low=_finite(question.shown(finding.low)),
        high=_finite(question.shown(finding.high)),
        limit=question.limit,
        count=finding.count,
        counted=question.counted,
        needed=max(finding.needed, FEWEST) if word == "undecided" and finding.needed is not None else None,
        note=question.note,
    )


def _too_few(question: Question) -> Criterion:
    return Criterion(
        name=question.name,
        unit=question.unit,
        verdict="undecided",
        estimate=None,
        low=None,
        high=None,
        limit=question.limit,
        count=question.count,
        counted=question.counted,
        needed=FEWEST,
        note=f"fewer than {FEWEST} decide nothing",
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _rise(difference: float) -> float:
    """Relative rise of perplexity from a difference in nats."""
    return math.expm1(difference) if difference < 700 else math.inf


def _questions(report: EvalReport, limits: Limits, baseline: EvalReport | None) -> Iterator[Question]:
    yield from _fidelity(report, limits)
    if limits.max_drop is not None:
        for name, documents in _judged_tasks(report):
            yield _task(f"task {name}", documents, limits.max_drop)
    if baseline is not None and not same_model(report, baseline):
        yield from _regressions(report, limits, baseline)


def _fidelity(report: EvalReport, limits: Limits) -> Iterator[Question]:
    arrays = report.per_sequence
    count = len(arrays.seq_ids)
    if limits.max_kld is not None:
        kld, most = _array(arrays.kld), limits.max_kld
        effect = report.summary.design_effect
        yield Question(
            "KL divergence",
            "nats/token",
            "sequences",
            most,
            count,
            lambda levels: kl_rule(kld, most, levels),
            note=f"design effect {effect:.3g}: tokens of one sequence are not independent" if effect else "",
        )
    if limits.max_ppl_increase is not None:
        dnll, rise = _array(arrays.dnll), math.log1p(limits.max_ppl_increase)
        yield Question(
            "perplexity",
            "share",
            "sequences",
            limits.max_ppl_increase,
            count,
            lambda levels: mean_rule(dnll, rise, levels),
            shown=_rise,
        )
    if limits.max_top1_loss is not None:
        changed, loss = 1 - _array(arrays.top1), limits.max_top1_loss
        yield Question(
            "top-1 disagreement", "share", "sequences", loss, count, lambda levels: mean_rule(changed, loss, levels)
        )


def _judged_tasks(report: EvalReport) -> Iterator[tuple[str, TaskDocuments]]:
    """Tasks whose scores are shares, so turned that larger is better."""
    for name, documents in report.documents.items():
        if shares(documents):
            yield name, better_larger(report, name, documents)


def _task(name: str, documents: TaskDocuments, limit: float) -> Question:
    """Right or wrong answers by Tango's test; other scores, larger being better, by Student's t on differences."""
    before, after = _array(documents.reference), _array(documents.candidate)
    count = len(before)
    if not set(documents.reference) | set(documents.candidate) <= {0.0, 1.0}:
        return Question(
            name, "share", "documents", limit, count, lambda levels: mean_rule(before - after, limit, levels)
        )
    gained, lost = int((after > before).sum()), int((after < before).sum())
    note = f"right only after {gained}, right only before {lost}; McNemar's exact p {mcnemar(gained, lost):.2g}"
    return Question(
        name,
        "share",
        "documents",
        limit,
        count,
        lambda levels: paired_rule(gained, lost, count, limit, levels),
        note=note,
    )


def _regressions(report: EvalReport, limits: Limits, baseline: EvalReport) -> Iterator[Question]:
    """The KL divergence of the same sequences, and the answers to the same documents, beside the baseline's."""
    now, before, most = _array(report.per_sequence.kld), _array(baseline.per_sequence.kld), limits.max_regression
    if most is not None:
        yield Question(
            "KL divergence against baseline",
            "share",
            "sequences",
            most,
            len(now),
            lambda levels: ratio_rule(now, before, most, levels),
        )
    if limits.max_drop is not None:
        for name, documents in _judged_tasks(baseline):
            after = better_larger(report, name, report.documents[name])
            pair = documents.model_copy(update={"reference": documents.candidate, "candidate": after.candidate})
            yield _task(f"task {name} against baseline", pair, limits.max_drop)


def _array(values: tuple[float | None, ...] | tuple[float, ...]) -> Floats:
    return numpy.asarray(values, dtype=numpy.float64)
