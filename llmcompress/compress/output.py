"""The small files of an output: config, index, side files, model card, and the record of the run."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Self

from llmcompress.compress.formats import exporter_for
from llmcompress.compress.heal.records import HealRecord
from llmcompress.compress.shards import INDEX_NAME, ShardMap, index_document
from llmcompress.files import commit_bytes, commit_json, file_digest, read_json, to_json
from llmcompress.hub.source import Source
from llmcompress.types import BlockOutcome, ModelTrace, Noun, Plan, RewriteRecord

RECORD_NAME = "llmcompress.json"
SIDE_FILES = (
    "tokenizer*.json",
    "tokenizer*.model",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "generation_config.json",
    "*processor_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


class FileRecord(Noun):
    """One file of the output."""

    name: str
    size_bytes: int
    sha256: str


class Probe(Noun):
    """A short input and some of the logits the quantized model gave for its last position."""

    tokens: tuple[int, ...]
    places: tuple[int, ...]
    logits: tuple[float, ...]


class Origin(Noun):
    """Where the source came from, without any path of the machine."""

    name: str
    repository: str | None
    revision: str | None
    license: str | None
    model_digest: str
    license_name: str | None = None
    license_link: str | None = None
    language: tuple[str, ...] = ()
    base_model: str | None = None  # what the source's own card names as the model it was made of

    @classmethod
    def of(cls, source: Source, model_digest: str) -> Self:
        """The origin of a model; `model_digest` is that of its weights and config."""
        return cls(
            name=source.name,
            repository=source.repository,
            revision=source.revision,
            license=source.license,
            model_digest=model_digest,
            license_name=source.card.license_name,
            license_link=source.card.license_link,
            language=source.card.language,
            base_model=source.card.base_model,
        )


class OutputRecord(Noun):
    """`llmcompress.json` of any output: what was asked and done, and a digest of every file beside it.

    `healing` holds what was done after the rest, in order; its `request` is what the files were made from then.
    """

    version: int = 1
    llmcompress: str
    origin: Origin
    request: dict[str, str]
    calibration_text_digest: str
    probe: Probe
    environment: dict[str, str]
    files: tuple[FileRecord, ...]
    healing: tuple[HealRecord, ...] = ()


class RunRecord(OutputRecord):
    """`llmcompress.json` of a quantized model: what was decided besides."""

    recipe: dict[str, Any]
    rewriting: RewriteRecord | None = None
    plan: Plan
    blocks: tuple[BlockOutcome, ...]


@dataclass(frozen=True)
class Story:
    """What the small files tell. `plan` is as it was carried out, `planned` where that is not all that was planned."""

    origin: Origin
    recipe: Mapping[str, Any]
    plan: Plan
    trace: ModelTrace
    request: Mapping[str, str]
    command: str
    environment: Mapping[str, str]
    calibration_text_digest: str
    rewriting: RewriteRecord | None = None
    skipped: tuple[str, ...] = ()
    planned: Plan | None = None

    @property
    def exporter(self) -> ModuleType:
        """The layout the plan's formats are written in."""
        return exporter_for(self.planned or self.plan, self.trace)


def side_files(source: Path) -> list[Path]:
    """Files copied byte for byte, relative to the source; code, pickles and the source's index are not."""
    found = {path for pattern in SIDE_FILES for path in source.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(source) for path in found)


def copy_side_files(source: Path, folder: Path) -> None:
    """Copy them, durably."""
    for relative in side_files(source):
        (folder / relative).parent.mkdir(exist_ok=True)
        commit_bytes(folder / relative, (source / relative).read_bytes())


def write_small_files(folder: Path, source: Path, shards: ShardMap, story: Story, heads: tuple[str, ...]) -> None:
    """Everything but shards, card and record; the index, without which the shards are nothing, comes last."""
    copy_side_files(source, folder)
    original = read_json(source / "config.json")
    document = story.exporter.config_document(original, story.plan, story.trace, heads)
    commit_json(folder / "config.json", document)
    specs = (story.planned or story.plan).specs
    left = specs.keys() - story.plan.specs.keys()
    layouts = [(shards.name(place), shards.layout(place, specs, left)) for place in range(len(shards.shards))]
    commit_json(folder / INDEX_NAME, index_document(layouts, story.trace.parameters))


def file_records(folder: Path) -> tuple[FileRecord, ...]:
    """Every file of an output but its record, by name."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return tuple(
        FileRecord(name=name, size_bytes=(folder / name).stat().st_size, sha256=file_digest(folder / name))
        for name in names
        if name != RECORD_NAME
    )


def write_record(folder: Path, story: Story, version: str, blocks: tuple[BlockOutcome, ...], probe: Probe) -> RunRecord:
    """Write `llmcompress.json` over the files as they stand. Times are left out: two equal runs give equal bytes."""
    record = RunRecord(
        llmcompress=version,
        origin=story.origin,
        request=dict(story.request),
        rewriting=story.rewriting,
        recipe=dict(story.recipe),
        plan=story.plan,
        calibration_text_digest=story.calibration_text_digest,
        blocks=tuple(b.model_copy(update={"seconds": 0.0, "resumed": False}) for b in blocks),
        probe=probe,
        environment=dict(story.environment),
        files=file_records(folder),
    )
    commit_bytes(folder / RECORD_NAME, to_json(record.model_dump(mode="json")).encode())
    return record


def drop_strays(folder: Path, shards: ShardMap) -> None:
    """Remove anything in a data folder that is not one of its shards."""
    known = {shards.name(place) for place in range(len(shards.shards))}
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in known:
            path.unlink()
