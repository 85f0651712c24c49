"""README.md of a quantized model, and the front matter of every card of ours."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmcompress import __version__
from llmcompress.compress.exporters import compressed_tensors
from llmcompress.compress.output import Origin, Story
from llmcompress.files import commit_bytes
from llmcompress.hub.card import CARD_NAME, PICTURE_NAME, UNMEASURED, plain, with_front
from llmcompress.pictures.heatmap import bits_heat_map
from llmcompress.types import Plan

STOPS = "But its experts have several formats, or the source's: plain transformers stops, llmcompress.load opens it."
ROUNDS = "Plain transformers keeps weights of experts in the dtype of their scales, whatever dtype is asked for."
PROGRAM_WORDS = {
    "integer": "exact integer program",
    "quadratic": "quadratic program with measured interactions",
    "order": "order of blocks",
    "ratio": "program of the shares of columns with two bits more",
}


def card(origin: Origin, relation: str, tags: tuple[str, ...], body: str, *, library: str = "transformers") -> str:
    """A whole card: what the Hub reads at its top, then `body`.

    relation  to the base model in the Hub's words: `quantized`, `finetune`
    tags      after one of ours

    Licence, language and base model are those of the source, where they are known.
    """
    front: dict[str, Any] = {"library_name": library, "pipeline_tag": "text-generation"}
    if origin.license:
        front["license"] = origin.license
        named = {"license_name": origin.license_name, "license_link": origin.license_link}
        front |= {key: value for key, value in named.items() if value}
    if origin.language:
        front["language"] = list(origin.language)
    if base := origin.repository or origin.base_model:
        front |= {"base_model": base, "base_model_relation": relation}
    front["tags"] = ["llmcompress", *tags]
    return with_front(front, body)


def made_with(command: str, environment: Mapping[str, str], version: str = __version__) -> str:
    """The section on how it was made: the command, and the versions its result depends on."""
    names = {"torch": "PyTorch", "transformers": "transformers", "python": "Python"}
    versions = [f"llmcompress {version}", *(f"{names[key]} {environment[key]}" for key in names if key in environment)]
    return f"## How it was made\n\n    {command}\n\nWith {', '.join(versions)}.\n"


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
    told = str(story.exporter.opens_with(transposed))
    experts = {story.plan.spec_of(x.name) for x in story.trace.linears if x.expert is not None}
    if story.exporter is compressed_tensors and experts:
        told += "\n" + (STOPS if None in experts or len(experts) > 1 else ROUNDS)
    return told


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
    if options.online_hadamard:
        said.append(
            "What ends the MLP of a block reads its inputs mixed by a Hadamard matrix, as its weight is stored."
        )
    if story.plan.output_feedback is not None:
        said.append(f"Tried: {story.plan.output_feedback.words}.")
    said += [f"{len(kept)} linear(s) are left at the source precision."] if kept else []
    return [*said, f"{story.trace.untraced[0].upper()}{story.trace.untraced[1:]}."] if story.trace.untraced else said


def _methods(story: Story) -> str:
    return ", ".join(f"`{name}`" for name in (story.rewriting.methods if story.rewriting else ()))


def _choice(plan: Plan) -> str:
    """How formats were chosen, in words."""
    if plan.scorer == "none":
        return "every linear in the one format allowed"
    return f"`{plan.scorer}` scores, {PROGRAM_WORDS[plan.program]}"


def write_card(folder: Path, story: Story) -> None:
    """The README.md of a quantized model, and the picture in it."""
    picture = bits_heat_map(story.trace, story.plan.allocation, name=story.origin.name)
    commit_bytes(folder / PICTURE_NAME, picture.encode())
    commit_bytes(folder / CARD_NAME, model_card(story).encode())


def model_card(story: Story) -> str:
    """The README.md of a quantized model."""
    plan, origin, allocation = story.plan, story.origin, story.plan.allocation
    revision = f" at revision `{origin.revision}`" if origin.revision else ""
    text = "without calibration text" if plan.calibration == "none" else f"calibrated on {plain(plan.calibration)}"
    remarks = "".join(f"\n{remark}" for remark in ["", *_remarks(story)]).rstrip()
    body = f"""# {plain(origin.name)}, {allocation.bits_per_weight:.3f} bits per weight

Quantized from `{plain(origin.name)}`{revision} by llmcompress: {_choice(plan)},
`{plan.quantizer}` rounding, {text}.

{UNMEASURED}
## Size

| figure | value |
|---|---|
| budget | {plain(allocation.budget)} |
| bits per weight, quantized linears (codes, scales, shapes) | {allocation.bits_per_weight:.4f} |
| bits per weight, whole checkpoint | {allocation.file_bits_per_weight:.4f} |
| weight shards | {allocation.file_bytes:,} bytes |

## Where the bits are

![The width of every linear, block by block]({PICTURE_NAME})

| code width | weights | share |
|---|---|---|
{_format_rows(story)}{remarks}

## What loads it

Format: {story.exporter.TITLE}. {_opens_with(story)}

{made_with(story.command, story.environment)}
`llmcompress.json` holds the recipe, the plan and a sha256 of every file; `llmcompress verify` checks them.
"""
    return card(origin, "quantized", (story.exporter.TAG, "quantized"), body, library=story.exporter.LIBRARY)
