"""The README.md of an export."""

from collections import Counter
from pathlib import Path
from types import ModuleType

from llmcompress.compress.card import card, made_with
from llmcompress.compress.export.records import ExportRecord
from llmcompress.hub.card import PICTURE_NAME, UNMEASURED, plain


def model_card(record: ExportRecord, module: ModuleType, folder: Path) -> str:
    """What was exported, what it became, and how far that is from the checkpoint."""
    body = f"""# {plain(record.base.name)}, {module.TITLE}

Exported by llmcompress from its checkpoint `{plain(record.origin.name)}`.

| was | is | weights | largest relative error |
|---|---|---|---|
{_rows(record)}

Read back from these files and run on {record.probe_tokens} random tokens, its logits are at most
{record.logit_difference:.2g} from those of the checkpoint, KL {record.kld:.2g} nats per token.
{"".join(f"{chr(10)}{note}{chr(10)}" for note in record.notes)}
{UNMEASURED}
## Size

| figure | value |
|---|---|
{_sizes(record)}
{_picture(folder)}
## What loads it

{module.opens_with(folder)}

{made_with(record.command, record.environment, record.llmcompress)}
`export.json` has the figures of every weight and a sha256 of every file; `llmcompress verify` checks them.
"""
    return card(record.base, "quantized", (module.TAG,), body, library=module.LIBRARY)


def _sizes(record: ExportRecord) -> str:
    bits = {"quantized linears": record.bits_per_weight, "whole checkpoint": record.file_bits_per_weight}
    rows = [f"| bits per weight, {what} | {value:.4f} |" for what, value in bits.items() if value is not None]
    return "\n".join([*rows, f"| weight files | {record.weight_bytes:,} bytes |"])


def _picture(folder: Path) -> str:
    if not (folder / PICTURE_NAME).is_file():
        return ""
    return f"\n## Where the bits are\n\n![The width of every linear, block by block]({PICTURE_NAME})\n"


def _rows(record: ExportRecord) -> str:
    counts = Counter((weight.was, weight.type) for weight in record.weights)
    worst = {pair: max(w.error for w in record.weights if (w.was, w.type) == pair) for pair in counts}
    return "\n".join(
        f"| {was} | {kind} | {counts[was, kind]} | {worst[was, kind]:.2g} |" for was, kind in sorted(counts)
    )
