"""The README.md of a pruned model."""

from llmcompress.compress.card import card, made_with
from llmcompress.compress.prune.records import PruneRecord
from llmcompress.hub.card import UNMEASURED, plain


def model_card(record: PruneRecord) -> str:
    """What was removed and what it cost, with front matter the model hub understands."""
    origin = record.origin
    rows = "\n".join(
        f"| {', '.join(map(str, step.removed))} | {step.kld:.5f} ± {step.standard_error:.5f} |" for step in record.steps
    )
    body = f"""# {plain(origin.name)}, {_what_is_left(record)}

{_removed(record)}
Ranked by `{record.by}`, chosen by the KL divergence measured with them left out, on {plain(record.calibration)}.

KL {record.kld:.5f} ± {record.standard_error:.5f} nats per token on {record.sequences} sequences the choice did not see.

| left out | KL on the text they were chosen by |
|---|---|
{rows}

{UNMEASURED}
## What loads it

Everything that opens the original: `AutoModelForCausalLM.from_pretrained`.

{made_with(record.command, record.environment, record.llmcompress)}
`pruning.json` holds the search and a sha256 of every file; `llmcompress verify` checks them.
"""
    return card(origin, "finetune", ("pruned",), body)


def _what_is_left(record: PruneRecord) -> str:
    left = f"{record.blocks - len(record.removed)} of {record.blocks} blocks"
    return f"{left}, {len(record.halves)} of them halved" if record.halves else left


def _removed(record: PruneRecord) -> str:
    """What was left out, and what that saves where."""
    name, said = plain(record.origin.name), []
    if record.removed:
        said.append(f"Blocks {', '.join(map(str, record.removed))} (counted from 0) of `{name}` are left out.")
    if record.halves:
        halves = ", ".join(f"`{half}`" for half in record.halves)
        said.append(
            f"Halves of blocks of `{name}` that are not computed: {halves} (numbers of the original's blocks).\n"
            "Their weights are stored as zeros, so that every program computes the same; only\n"
            "`llmcompress.load` saves their computation and their memory."
        )
    return "\n".join([*said, "All other weights are what they were, byte for byte."])
