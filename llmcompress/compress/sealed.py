"""Outputs of ours, whichever command wrote them: their record, and whether their files are the ones on record."""

from collections.abc import Iterator
from pathlib import Path

from llmcompress.compress.export.records import RECORD_NAME as EXPORT_NAME
from llmcompress.compress.export.records import ExportRecord
from llmcompress.compress.export.verify import export_checks
from llmcompress.compress.output import RECORD_NAME, OutputRecord
from llmcompress.compress.prune.records import RECORD_NAME as PRUNE_NAME
from llmcompress.compress.prune.records import PruneRecord
from llmcompress.compress.verify import Check, check_finite, check_hashes, read_record, verify
from llmcompress.errors import InputError
from llmcompress.files import read_small
from llmcompress.preflight import check_source

AnyRecord = OutputRecord | PruneRecord | ExportRecord
LARGEST_RECORD_BYTES = 128 << 20


def record_of(folder: Path) -> tuple[str, AnyRecord]:
    """The name and content of what an output says of itself.

    Raises InputError where there is no record, where it is damaged, or where it does not tell its files.
    """
    found: AnyRecord | None = None
    for name, kind in ((EXPORT_NAME, ExportRecord), (RECORD_NAME, OutputRecord), (PRUNE_NAME, PruneRecord)):
        if (folder / name).is_file():
            data = read_small(folder / name, LARGEST_RECORD_BYTES)
            found = read_record(folder) if kind is OutputRecord else kind.parse(data, name)
            break
    if found is None or not found.files:
        hint = "give what `llmcompress quantize`, `prune -o`, `heal` or `export` wrote"
        raise InputError(f"{folder.name}: no record of ours that says which files it has", hint)
    return name, found


def verify_output(folder: Path, device: str = "cpu") -> Iterator[Check]:
    """Yield each check as it is made: all there are of what has a plan or was healed, else of files and weights.

    Pruned models and exports were compared with what they were made of when they were written; here their bytes, and
    the logits of exports, are held against the record of that. Raises InputError where the directory cannot even be
    opened.
    """
    name, record = record_of(folder)
    if name == RECORD_NAME:
        yield from verify(folder, device)
        return
    yield check_hashes(folder, record.files)
    if any(file.name.endswith(".safetensors") for file in record.files):
        files = check_source(folder, packed=True)
        yield Check("shards and index", True, f"{len(files.shards)} shards, {len(files.tensors)} tensors agree")
        yield check_finite(folder)
    if isinstance(record, ExportRecord):
        yield from export_checks(folder, record, device)
