"""The README.md of an export."""

from collections import Counter
from pathlib import Path
from types import ModuleType

from llmcompress.compress.export.records import ExportRecord
from llmcompress.compress.output import front_matter, plain


def model_card(record: ExportRecord, module: ModuleType, folder: Path) -> str:
    """What was exported, what it became, and how far that is from the checkpoint."""
    base = record.base
    return f"""{front_matter(base, "quantized", module.TAG, library=module.LIBRARY)}
# {plain(base.name)}, {module.TITLE}

Exported by llmcompress from its checkpoint `{plain(record.origin.name)}`.

| was | is | weights | largest relative error |
|---|---|---|---|
{_rows(record)}

Read back from these files and run on {record.probe_tokens} random tokens, its logits are at most
{record.logit_difference:.2g} from those of the checkpoint, KL {record.kld:.2g} nats per token.
{"".join(f"{chr(10)}{note}{chr(10)}" for note in record.notes)}
    {record.command}

{module.opens_with(folder)} `export.json` has the figures of every weight and a sha256 of every file.
"""


def _rows(record: ExportRecord) -> str:
    counts = Counter((weight.was, weight.type) for weight in record.weights)
    worst = {pair: max(w.error for w in record.weights if (w.was, w.type) == pair) for pair in counts}
    return "\n".join(
        f"| {was} | {kind} | {counts[was, kind]} | {worst[was, kind]:.2g} |" for was, kind in sorted(counts)
    )
