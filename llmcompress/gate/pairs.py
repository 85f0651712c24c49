"""Whether the units of reports can be counted, and those of two reports paired."""

from collections.abc import Sequence

from llmcompress.errors import InputError
from llmcompress.eval.report import EvalReport, TaskDocuments

LEAST_KLD = -1e-6  # nats per token; rounding in float64 is far smaller


def check_units(report: EvalReport) -> None:
    """Raises InputError where a report has no sequences, one twice, a negative KL, or arrays that do not pair."""
    where = f"report of {report.model.name}"
    hint = "make the report again with `llmcompress eval`"
    arrays = report.per_sequence
    if not arrays.seq_ids:
        raise InputError(f"{where}: it has no sequences", hint)
    _once(f"{where}: per_sequence.seq_ids", arrays.seq_ids)
    if any(value is not None and value < LEAST_KLD for value in arrays.kld):
        raise InputError(f"{where}: per_sequence.kld: a KL divergence is never negative", hint)
    for name, documents in report.documents.items():
        place = f"{where}: documents.{name}"
        lengths = {len(documents.doc_ids), len(documents.reference), len(documents.candidate)}
        if len(lengths) != 1 or lengths == {0}:
            raise InputError(f"{place}: arrays of {sorted(lengths)} entries do not pair", hint)
        _once(f"{place}.doc_ids", documents.doc_ids)


def _once(place: str, units: Sequence[int | str]) -> None:
    if len(set(units)) != len(units):
        raise InputError(f"{place}: something is counted twice", "every sequence and document counts once")


def shares(documents: TaskDocuments) -> bool:
    """Whether a task's scores are shares of something, so that a drop in points means something."""
    return all(0 <= score <= 1 for score in (*documents.reference, *documents.candidate))


def better_larger(report: EvalReport, task: str, documents: TaskDocuments) -> TaskDocuments:
    """A task's scores so that larger is better: turned around where the harness says that smaller is."""
    told = (report.harness or {}).get("higher_is_better")
    row = told.get(task) if isinstance(told, dict) else None
    if not isinstance(row, dict) or row.get(documents.metric) is not False:
        return documents
    turned = {side: tuple(1 - score for score in getattr(documents, side)) for side in ("reference", "candidate")}
    return documents.model_copy(update=turned)


def same_model(report: EvalReport, baseline: EvalReport) -> bool:
    """Whether both reports are of the same weights, bit for bit."""
    return report.model.model_digest == baseline.model.model_digest


def check_baseline(report: EvalReport, baseline: EvalReport) -> None:
    """Raises InputError, with the reason, where two reports do not pair sequence for sequence, document for document.

    The baseline's own weights need no pairing: they are no regression, whatever the text.
    """
    if same_model(report, baseline):
        return
    again = "evaluate both models on the same text, with the same reference"
    for name, now, before in (
        ("tokenizers", report.data.tokenizer_digest, baseline.data.tokenizer_digest),
        ("token ids", report.data.tokens_digest, baseline.data.tokens_digest),
        ("references", report.ref.model_digest, baseline.ref.model_digest),
        ("sequences", report.per_sequence.seq_ids, baseline.per_sequence.seq_ids),
    ):
        if now != before:
            raise InputError(f"report and baseline have different {name}", again)
    if not baseline.finite:
        raise InputError("the baseline has figures that are not finite", "choose a release that works as the baseline")
    if sum(value or 0.0 for value in baseline.per_sequence.kld) <= 0:
        raise InputError("the baseline lost nothing, so no rise over it can be told", "leave out --baseline")
    for name, documents in baseline.documents.items():
        found = report.documents.get(name)
        if found is None:
            raise InputError(f"task {name} is in the baseline and not in the report", "evaluate the same tasks")
        if (found.metric, found.doc_ids) != (documents.metric, documents.doc_ids):
            raise InputError(f"task {name} has other documents or another metric than in the baseline", again)
