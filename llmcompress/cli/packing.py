"""What goes to the Hub: the files on record, the model card with what was measured, the page about it, a new record."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAGE_NAME, REPORT_NAME = "report.html", "report.json"


@dataclass(frozen=True)
class Packed:
    """The files of a push, what its commit is called, and what the user should know of them."""

    items: tuple[Any, ...]
    message: str
    evaluated: bool
    remarks: tuple[str, ...]


def pack(output: Path, repository: str, *, report_path: Path | None, public: bool) -> Packed:
    """Gather an output that was verified. Nothing on this machine is changed.

    Only files on record go. Where there is an evaluation, its figures are put on the card and the page beside it, and
    the record that goes along lists the files as they go, so that what is fetched again verifies. Raises InputError
    where `report_path` holds no evaluation, or one of another model.
    """
    from llmcompress.compress.sealed import record_of
    from llmcompress.files import to_json
    from llmcompress.hub.push import Item

    name, record = record_of(output)
    known = {file.name: file for file in record.files}
    report, of = _evaluation(output, record, report_path)
    attached = report is None or not public or report.data.source == "builtin"
    made = _rendered(output, repository, report, of=of, attached=attached)
    if report is None and PAGE_NAME in known:
        made = {}
    listed = {file.name: file for file in record.files} | {n: _record(n, data) for n, data in made.items()}
    record = record.model_copy(update={"files": tuple(listed[n] for n in sorted(listed))})
    items = [Item(n, made.get(n, output / n)) for n in sorted(listed)]
    if made:
        items.append(Item(name, to_json(record.model_dump(mode="json")).encode()))
    else:
        items.append(Item(name, output / name))
    remarks = [] if report is not None else [of] * bool(of)
    if not attached:
        remarks.append(f"{PAGE_NAME} and {REPORT_NAME} quote the text it was evaluated on, and stay here")
    present = {path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()}
    if strays := sorted(present - known.keys() - {name}):
        remarks.append(f"{len(strays)} file(s) that are not on record stay here: {', '.join(strays[:5])}")
    return Packed(tuple(items), _message(record), report is not None or REPORT_NAME in known, tuple(remarks))


def _record(name: str, data: bytes) -> Any:
    from llmcompress.compress.output import FileRecord

    return FileRecord(name=name, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _message(record: Any) -> str:
    if hasattr(record, "plan"):
        what = f"{record.plan.allocation.bits_per_weight:.3f} bits per weight"
    else:
        what = f"exported as {record.format}" if hasattr(record, "format") else "compressed"
    return f"{record.origin.name}: {what}, by llmcompress {record.llmcompress}"


def _evaluation(output: Path, record: Any, report_path: Path | None) -> tuple[Any, str]:
    """The report of these weights and a word on it: the one given, that of `OUTPUT-eval`, or none and why."""
    from llmcompress.errors import InputError
    from llmcompress.eval.report import EvalReport
    from llmcompress.files import read_small

    whole = output.resolve()
    place = report_path or whole.with_name(f"{whole.name}-eval")
    path = place / REPORT_NAME if place.is_dir() else place
    if not path.is_file():
        if report_path is None:
            return None, ""
        raise InputError(f"--report {report_path}: no {REPORT_NAME} there", "give what `llmcompress eval` wrote")
    report = EvalReport.parse(read_small(path), path.name)
    if report.model.model_digest == _digest(output, record):
        return report, ""
    if getattr(record, "lossless", False) and report.model.model_digest == record.origin.model_digest:
        return report, "Measured on the checkpoint that these weights equal, bit for bit. "
    what = f"{place.name}: the evaluation of other weights than those in {output.name}"
    if report_path is None:
        return None, f"{what}; not put on the card"
    raise InputError(what, f"evaluate these: llmcompress eval {output} --ref MODEL")


def _digest(output: Path, record: Any) -> str | None:
    """The digest that `eval` gives these weights, None for files that it does not open."""
    from llmcompress.model.integrity import digest_source, scan
    from llmcompress.preflight import check_source

    if not any(file.name.endswith(".safetensors") for file in record.files):
        return None
    files = check_source(output, packed=True)
    return digest_source(scan(files), files.config)


def _rendered(output: Path, repository: str, report: Any, *, of: str, attached: bool) -> dict[str, bytes]:
    """Files made for the push, by name: the page and, where there is an evaluation, card and figures."""
    from llmcompress.cli.report import page_of
    from llmcompress.files import to_json
    from llmcompress.hub.card import CARD_NAME
    from llmcompress.pages.card import evaluated_card
    from llmcompress.pages.reading import run_of

    run = run_of(report, output, output)
    if report is None:
        return {PAGE_NAME: page_of([run])} if run.record else {}
    card = (output / CARD_NAME).read_text(encoding="utf-8")
    made = {CARD_NAME: evaluated_card(card, report, name=repository, of=of, attached=attached).encode()}
    if attached:
        made |= {PAGE_NAME: page_of([run]), REPORT_NAME: to_json(report.model_dump(mode="json")).encode()}
    return made
