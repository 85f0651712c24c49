"""The README.md of a tied model."""

from collections.abc import Mapping

from llmcompress.compress.card import card, made_with
from llmcompress.compress.exporters import native
from llmcompress.compress.tie.records import TyingRecord
from llmcompress.hub.card import UNMEASURED, plain


def model_card(record: TyingRecord, environment: Mapping[str, str]) -> str:
    """What is shared and what it cost, with front matter the model hub understands."""
    origin, instead = record.origin, record.instead
    groups = ", ".join(f"{g} ({b})" for g, b in zip(record.groups, record.bases, strict=True))
    removed = ", ".join(map(str, instead.removed))
    kld_instead = f"{instead.kld:.5f} ± {instead.standard_error:.5f}"
    corrected = f"low-rank corrections of rank {record.rank}" if record.rank else "no corrections"
    body = f"""# {plain(origin.name)}, {len(record.groups)} group(s) of {record.size} blocks tied

Blocks of `{plain(origin.name)}` that share one stored weight: {groups} (counted from 0; in brackets whose weight
it is). Norms and biases are each block's own, with {corrected}. All blocks are computed: tying saves bytes, no time.
Chosen by the KL divergence measured with them tied, on {plain(record.calibration)}.

| figure | value |
|---|---|
| weight shards before | {record.bytes_before:,} bytes |
| weight shards now | {record.bytes_after:,} bytes |
| KL, nats per token | {record.kld:.5f} ± {record.standard_error:.5f} |
| KL of removing blocks {removed}, which saves {instead.saved_bytes:,} bytes | {kld_instead} |

Measured on {record.sequences} sequences the choice did not see, and paired by them: {record.verdict}.

{UNMEASURED}
## What loads it

{native.opens_with(False)}

{made_with(record.command, environment, record.llmcompress)}
`tying.json` holds the search.
"""
    return card(origin, "finetune", (native.TAG, "tied"), body, library=native.LIBRARY)
