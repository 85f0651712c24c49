"""The README.md of a pruned model."""

import yaml

from llmcompress.compress.output import plain
from llmcompress.compress.prune.records import PruneRecord


def model_card(record: PruneRecord) -> str:
    """What was removed and what it cost, with front matter the model hub understands."""
    origin = record.origin
    front: dict[str, object] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if origin.license:
        front["license"] = origin.license
    if origin.repository:
        front |= {"base_model": origin.repository, "base_model_relation": "finetune"}
    front["tags"] = ["llmcompress", "pruned"]
    removed = ", ".join(map(str, record.removed))
    left = record.blocks - len(record.removed)
    rows = "\n".join(
        f"| {', '.join(map(str, step.removed))} | {step.kld:.5f} ± {step.standard_error:.5f} |" for step in record.steps
    )
    return f"""---
{yaml.safe_dump(front, sort_keys=True)}---

# {plain(origin.name)}, {left} of {record.blocks} blocks

Blocks {removed} (counted from 0) of `{plain(origin.name)}` are left out; the others are what they were, byte for byte.
Ranked by `{record.by}`, chosen by the KL divergence measured with them left out, on {plain(record.calibration)}.

KL {record.kld:.5f} ± {record.standard_error:.5f} nats per token on {record.sequences} sequences the choice did not see.

| blocks left out | KL on the text they were chosen by |
|---|---|
{rows}

    {record.command}

Opens with `AutoModelForCausalLM.from_pretrained`. `pruning.json` holds the search.
"""
