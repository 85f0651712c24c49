"""`export`: write a checkpoint in another format, open it again, compare, publish by one rename."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import ModuleType

from llmcompress import __version__
from llmcompress.compress.export.card import model_card
from llmcompress.compress.export.check import Comparison, compare
from llmcompress.compress.export.checkpoint import Checkpoint, Options, Written
from llmcompress.compress.export.records import RECORD_NAME, ExportedWeight, ExportRecord
from llmcompress.compress.export.sizes import sizes_of
from llmcompress.compress.journal import Journal, check_output
from llmcompress.compress.output import RECORD_NAME as OUTPUT_RECORD
from llmcompress.compress.output import Origin, copy_side_files, file_records
from llmcompress.compress.run import environment
from llmcompress.compress.verify import read_record
from llmcompress.errors import InputError
from llmcompress.files import commit_bytes, commit_json
from llmcompress.hub.card import CARD_NAME, PICTURE_NAME
from llmcompress.hub.source import Source
from llmcompress.model.checkpoint import folder_bytes
from llmcompress.model.integrity import digest_source, scan
from llmcompress.model.skeleton import Skeleton
from llmcompress.plugins import find

FORMATS = "llmcompress.compress.export.formats"


@dataclass(frozen=True)
class ExportRequest:
    """Everything `export` was told."""

    source: Source
    output: Path
    format: str
    command: str
    options: Options = field(default_factory=Options)
    force: bool = False


@dataclass(frozen=True)
class Exported:
    """The output is published."""

    record: ExportRecord
    directory_bytes: int


def export(request: ExportRequest) -> Iterator[str | Exported]:
    """Run it, yielding stages, and what came of it.

    Raises InputError where the format cannot hold the checkpoint, VerifyError where the files do not read back as they
    were meant to; nothing is published then.
    """
    module = find(FORMATS, request.format)
    for option in fields(Options):
        if getattr(request.options, option.name) is not None and option.name not in module.OPTIONS:
            word = option.name.replace("_", "-")
            raise InputError(f"--{word} says nothing about {request.format}", "leave it out")
    check_output(request.output, request.source.path, request.force)
    yield "opening"
    checkpoint = Checkpoint.open(request.source)
    files = checkpoint.skeleton.files
    origin = Origin.of(request.source, digest_source(scan(files), files.config))
    made = (request.source.path / OUTPUT_RECORD).is_file()
    base = read_record(request.source.path).origin if made else origin
    journal = Journal(request.output)
    with journal.in_one_go():
        check_output(request.output, request.source.path, request.force)
        journal.prepare()
        folder = journal.partial
        yield f"writing {request.format}"
        written: Written = module.write(checkpoint, folder, request.options)
        copy_side_files(request.source.path, folder)
        yield "opening again and comparing"
        comparison = compare(checkpoint.skeleton, _reopened(module, checkpoint, folder), written)
        record = _record(request, (origin, base), checkpoint, written=written, comparison=comparison)
        if hasattr(module, "decode"):
            record = record.model_copy(update={"probe": comparison.probe})
        record = record.model_copy(update=vars(sizes_of(checkpoint, folder)))
        if record.lossless and (drawn := request.source.path / PICTURE_NAME).is_file():
            commit_bytes(folder / PICTURE_NAME, drawn.read_bytes())
        commit_bytes(folder / CARD_NAME, model_card(record, module, folder).encode())
        record = record.model_copy(update={"files": file_records(folder)})
        commit_json(folder / RECORD_NAME, record.model_dump(mode="json"))
        size = folder_bytes(folder)
        journal.publish(request.force)
    yield Exported(record, size)


def _reopened(module: ModuleType, checkpoint: Checkpoint, folder: Path) -> Skeleton:
    """The model as a reader of the files sees it."""
    if hasattr(module, "decode"):
        return Skeleton.open(folder, decode=module.decode(folder))
    found: Skeleton = module.reopen(checkpoint, folder)
    return found


def _record(
    request: ExportRequest,
    origins: tuple[Origin, Origin],
    checkpoint: Checkpoint,
    *,
    written: Written,
    comparison: Comparison,
) -> ExportRecord:
    weights = tuple(
        ExportedWeight(tensor=name, was=_was(checkpoint, name), type=kind, error=comparison.errors[name])
        for name, kind in written.types.items()
    )
    return ExportRecord(
        llmcompress=__version__,
        origin=origins[0],
        base=origins[1],
        format=request.format,
        command=request.command,
        weights=weights,
        notes=written.notes,
        largest_error=max(comparison.errors.values(), default=0.0),
        logit_difference=comparison.logit_difference,
        kld=comparison.kld,
        probe_tokens=comparison.tokens,
        environment=environment(),
        files=(),
    )


def _was(checkpoint: Checkpoint, name: str) -> str:
    spec = checkpoint.spec_of(name)
    if spec is None:
        return "not packed"
    return f"{spec.label}, groups of {spec.group_size}" if spec.group_size else spec.label
