"""What there is to show of a run: its report.json, its llmcompress.json and scores, wherever the argument points."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from llmcompress.errors import InputError
from llmcompress.eval.report import EvalReport
from llmcompress.files import read_json
from llmcompress.types import BlockOutcome, Plan, ScoreFile, Series

T = TypeVar("T")
REPORT_NAME, RECORD_NAME, SCORES_NAME = "report.json", "llmcompress.json", "scores.json"
PRUNED_NAME = "pruning.json"
EVALUATED = "-eval"  # `eval OUT` writes to OUT-eval, beside OUT
BLOCKS: TypeAdapter[tuple[BlockOutcome, ...]] = TypeAdapter(tuple[BlockOutcome, ...])
SERIES: TypeAdapter[tuple[Series, ...]] = TypeAdapter(tuple[Series, ...])


@dataclass(frozen=True)
class Run:
    """One compressed model as far as it is known. `folder` is where a page about it belongs.

    `record` is llmcompress.json, or the pruning.json of a pruned model, whose `series` say how much blocks are used.
    """

    name: str
    folder: Path
    report: EvalReport | None = None
    plan: Plan | None = None
    blocks: tuple[BlockOutcome, ...] = ()
    scores: ScoreFile | None = None
    series: tuple[Series, ...] = ()
    record: Mapping[str, Any] = field(default_factory=dict)


def read_run(path: Path) -> Run:
    """The run of a folder, or of a report.json.

    `eval` writes beside the checkpoint, to `NAME-eval`: what one of the two folders lacks is taken from the other
    if both speak of the same plan. Raises InputError where there is nothing, or something damaged.
    """
    folder = path if path.is_dir() else path.parent
    whole = folder.resolve()
    report = _report(path if path.is_file() else folder / REPORT_NAME)
    checkpoint = folder if _has_record(folder) else None
    if checkpoint is None and report is not None and whole.name.endswith(EVALUATED):
        other = whole.with_name(whole.name.removesuffix(EVALUATED))
        checkpoint = other if _has_record(other) and _belong(report, _record(other)) else None
    if checkpoint is not None and report is None:
        found = _report(whole.with_name(whole.name + EVALUATED) / REPORT_NAME)
        report = found if found is not None and _belong(found, _record(checkpoint)) else None
    if report is None and checkpoint is None:
        raise InputError(
            f"{path.name or path}: no {REPORT_NAME} and no {RECORD_NAME}",
            "give a folder that quantize or eval wrote, or a report.json",
        )
    return run_of(report, checkpoint, folder)


def run_of(report: EvalReport | None, checkpoint: Path | None, folder: Path) -> Run:
    """A run of a report, or of what `checkpoint` holds, the folder of the compressed model, or of both."""
    record = {} if checkpoint is None or not _has_record(checkpoint) else _record(checkpoint)
    plan = record.get("plan") or (report.plan if report is not None else None)
    scores = None if checkpoint is None else checkpoint / SCORES_NAME
    return Run(
        name=report.model.name if report is not None else folder.resolve().name,
        folder=folder,
        report=report,
        plan=None if plan is None else Plan.parse(json.dumps(plan), RECORD_NAME),
        blocks=_parsed(BLOCKS, record, "blocks") if "plan" in record else (),  # elsewhere it is how many there are
        scores=ScoreFile.parse(scores.read_bytes(), SCORES_NAME) if scores is not None and scores.is_file() else None,
        series=_parsed(SERIES, record, "series"),
        record=record,
    )


def _report(path: Path) -> EvalReport | None:
    if not path.is_file():
        if path.suffix == ".json" and path.name != REPORT_NAME:
            raise InputError(f"{path.name}: no such file", f"give a folder or a {REPORT_NAME}")
        return None
    try:
        return EvalReport.parse(path.read_bytes(), path.name)
    except OSError as error:
        raise InputError(f"{path.name}: {error.strerror}", "check the path and its permissions") from None


def _has_record(folder: Path) -> bool:
    return (folder / RECORD_NAME).is_file() or (folder / PRUNED_NAME).is_file()


def _record(folder: Path) -> Mapping[str, Any]:
    name = RECORD_NAME if (folder / RECORD_NAME).is_file() else PRUNED_NAME
    found = read_json(folder / name)
    if not isinstance(found, dict):
        raise InputError(f"{name}: not an object", "the file is damaged or was edited by hand")
    return found


def _belong(report: EvalReport, record: Mapping[str, Any]) -> bool:
    """Whether a report is about the model that a record is of: the same plan, or without one the same original."""
    if "plan" in record:
        return bool(report.plan == record["plan"])
    origin = record.get("origin")
    return isinstance(origin, dict) and origin.get("model_digest") == report.ref.model_digest


def _parsed(kind: TypeAdapter[T], record: Mapping[str, Any], key: str) -> T:
    """A list of nouns under a key of a record; empty where the key is missing."""
    try:
        return kind.validate_json(json.dumps(record.get(key, [])))
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        raise InputError(f"{key}.{place} of the record is wrong", "the file is damaged or was edited by hand") from None
