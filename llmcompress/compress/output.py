"""The small files of an output: config, index, side files, model card, and the record of the run."""

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import yaml

from llmcompress.compress.formats import exporter_of
from llmcompress.compress.heal.records import HealRecord
from llmcompress.compress.shards import INDEX_NAME, ShardMap, index_document
from llmcompress.files import commit_bytes, commit_json, file_digest, read_json, to_json
from llmcompress.model.hub import Source
from llmcompress.types import BlockOutcome, LinearSpec, ModelTrace, Noun, Plan, RewriteRecord

RECORD_NAME = "llmcompress.json"
PROGRAM_WORDS = {
    "integer": "exact integer program",
    "quadratic": "quadratic program with measured interactions",
    "order": "order of blocks",
}
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

    @classmethod
    def of(cls, source: Source, model_digest: str) -> Self:
        """The origin of a model; `model_digest` is that of its weights and config."""
        return cls(
            name=source.name,
            repository=source.repository,
            revision=source.revision,
            license=source.license,
            model_digest=model_digest,
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
    """What the small files tell."""

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

    @property
    def exporter(self) -> ModuleType:
        """The layout the plan's formats are written in."""
        return exporter_of(specs_of(self.plan).values(), self.plan.options)


def side_files(source: Path) -> list[Path]:
    """Files copied byte for byte, relative to the source; code, pickles and the source's index are not."""
    found = {path for pattern in SIDE_FILES for path in source.glob(pattern) if path.is_file()}
    return sorted(path.relative_to(source) for path in found)


def copy_side_files(source: Path, folder: Path) -> None:
    """Copy them, durably."""
    for relative in side_files(source):
        (folder / relative).parent.mkdir(exist_ok=True)
        commit_bytes(folder / relative, (source / relative).read_bytes())


def specs_of(plan: Plan) -> dict[str, LinearSpec]:
    """The format of every quantized linear, by name."""
    return {a.linear: a.spec for a in plan.allocation.assigned}


def write_small_files(folder: Path, source: Path, shards: ShardMap, story: Story, heads: tuple[str, ...]) -> None:
    """Everything but the shards and the record; the index, without which the shards are nothing, comes last."""
    copy_side_files(source, folder)
    original = read_json(source / "config.json")
    document = story.exporter.config_document(original, story.plan, story.trace, heads)
    commit_json(folder / "config.json", document)
    commit_bytes(folder / "README.md", model_card(story).encode())
    specs = specs_of(story.plan)
    layouts = [(shards.name(place), shards.layout(place, specs)) for place in range(len(shards.shards))]
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


def plain(text: str) -> str:
    """Text of unknown origin, safe in markdown: no control characters, no markup."""
    return re.sub(r"[^\w .,:/@+-]", "_", text)


def front_matter(origin: Origin, relation: str, *tags: str, library: str = "transformers") -> str:
    """What the model hub reads at the top of a card: licence and base model where they are known, tags of ours first.

    `relation` is that to the base model in the hub's words: `quantized`, `finetune`.
    """
    front: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation"}
    if origin.license:
        front["license"] = origin.license
    if origin.repository:
        front |= {"base_model": origin.repository, "base_model_relation": relation}
    front["tags"] = ["llmcompress", *tags]
    return f"---\n{yaml.safe_dump(front, sort_keys=True)}---\n"


def _format_rows(story: Story) -> str:
    """Weights by format, as table rows, narrowest first."""
    found: dict[tuple[int, str], int] = {}
    for linear in story.trace.every:
        spec = story.plan.spec_of(linear.name)
        if spec is not None:
            key = (spec.bits, str(spec.bits) if spec.label == f"int{spec.bits}" else spec.label)
            found[key] = found.get(key, 0) + linear.weights
    total = sum(found.values())
    return "\n".join(f"| {name} | {count:,} | {count / total:.1%} |" for (_, name), count in sorted(found.items()))


def _opens_with(story: Story) -> str:
    transposed = any(linear.transposed for linear in story.trace.linears)
    return str(story.exporter.opens_with(transposed))


def _remarks(story: Story) -> list[str]:
    """What a reader of the figures should know besides."""
    head, kept = story.trace.head, story.plan.allocation.kept
    spec = None if head is None else story.plan.spec_of(head.name)
    said = [] if spec is None else [f"The output head is quantized as well, to {spec.bits} bits."]
    if story.rewriting is not None:
        said.append(f"Before that its weights were rewritten, without changing what it computes: {_methods(story)}.")
    if story.skipped:
        halves = ", ".join(story.skipped)
        said.append(f"Halves of blocks that are zeros, and not computed by `llmcompress.load`: {halves}.")
    if (dropping := story.plan.dropping) is not None and dropping.dropped:
        blocks = ", ".join(map(str, dropping.dropped))
        said.append(f"Of {dropping.blocks} blocks, {blocks} (counted from 0) were dropped for bits elsewhere.")
    options = story.plan.options
    rounded = {"inputs of linears": options.inputs, "keys and values": options.kv_cache, "softmax": options.softmax}
    said += [f"Rounded while it runs: {what}, `{word}`." for what, word in rounded.items() if word != "none"]
    return [*said, f"{len(kept)} linear(s) are left at the source precision."] if kept else said


def _methods(story: Story) -> str:
    return ", ".join(f"`{name}`" for name in (story.rewriting.methods if story.rewriting else ()))


def _choice(plan: Plan) -> str:
    """How formats were chosen, in words."""
    if plan.scorer == "none":
        return "every linear in the one format allowed"
    return f"`{plan.scorer}` scores, {PROGRAM_WORDS[plan.program]}"


def model_card(story: Story) -> str:
    """The README.md of the output, with front matter the model hub understands."""
    plan, origin, allocation = story.plan, story.origin, story.plan.allocation
    revision = f" at revision `{origin.revision}`" if origin.revision else ""
    kept = " ".join(_remarks(story))
    front = front_matter(origin, "quantized", story.exporter.TAG, "quantized", library=story.exporter.LIBRARY)
    return f"""{front}
# {plain(origin.name)}, {allocation.bits_per_weight:.3f} bits per weight

Quantized from `{plain(origin.name)}`{revision} by llmcompress: {_choice(plan)},
`{plan.quantizer}` rounding, calibrated on {plain(plan.calibration)}.

| figure | value |
|---|---|
| budget | {plain(allocation.budget)} |
| bits per weight, quantized linears (codes, scales, shapes) | {allocation.bits_per_weight:.4f} |
| bits per weight, whole checkpoint | {allocation.file_bits_per_weight:.4f} |
| weight shards | {allocation.file_bytes:,} bytes |

| code width | weights | share |
|---|---|---|
{_format_rows(story)}

{kept}

    {story.command}

Format: {story.exporter.TITLE}. {_opens_with(story)}
What the compression cost is measured with `llmcompress eval`; `llmcompress.json` holds the plan and a sha256 of
every file.
"""
