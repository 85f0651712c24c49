"""Reports made of numbers instead of models: what `eval` would have written."""

from typing import Any

import numpy

from llmcompress.eval.report import EvalReport
from llmcompress.files import to_json

HOSTILE = (
    "\x1b[31mred\x1b[0m",
    "x\n::error::forged",
    "##[error]forged",
    "<img src=x onerror=alert(1)>",
    "[link=https://evil.example]click[/link]",
    "[/bold]",
    "a | b | c",
    "]]>",
    "**bold** `code` _it_ ~~no~~ # head",
    "@everyone #1 www.evil.example https://evil.example",
    "\u202egnp.exe\u2066",
    "&lt;b&gt; &#124; %0A::error::forged",
    "trailing \\",
    "﻿￾ \x00",
)


def normal(count: int, mean: float, spread: float, seed: int) -> list[float]:
    """Values with exactly that mean and standard deviation."""
    draw = numpy.random.default_rng(seed).standard_normal(count)
    return [float(x) for x in mean + spread * (draw - draw.mean()) / draw.std(ddof=1)]


def documents(count: int, gained: int, lost: int, both: int) -> dict[str, Any]:
    """A task of right and wrong answers: right only after, only before, both times."""
    candidate = [1.0] * gained + [0.0] * lost + [1.0] * both + [0.0] * (count - gained - lost - both)
    reference = [0.0] * gained + [1.0] * lost + [1.0] * both + [0.0] * (count - gained - lost - both)
    return {"metric": "acc", "doc_ids": list(range(count)), "reference": reference, "candidate": candidate}


def document(kld: float = 0.02, *, count: int = 32, name: str = "small", **changes: Any) -> dict[str, Any]:
    """report.json of a model `kld` nats per token away, each sequence varying by a quarter of that."""
    klds = [max(value, kld / 100) for value in normal(count, kld, kld / 4, 1)]
    change = normal(count, kld / 2, kld / 4, 2)
    nothing = {"mean": None, "low": None, "high": None}
    made = {
        "schema_version": "1",
        "model": {"name": name, "model_digest": f"digest of {name}", "revision": None},
        "ref": {"name": "original", "model_digest": "r" * 64, "revision": None},
        "data": {
            "source": "builtin", "text_digest": "t", "tokens_digest": f"k{count}", "tokenizer_digest": "z",
            "sequences": count, "sequence_length": 64, "seed": 0,
        },
        "finite": True,
        "summary": {
            "level": 0.95, "kld": {"mean": kld, "low": kld * 0.9, "high": kld * 1.1}, "kld_quantiles": [],
            "kld_largest_position": None, "dnll": nothing, "perplexity_reference": 8.0, "perplexity_candidate": 8.1,
            "perplexity_ratio": {"mean": 1.01, "low": 1.0, "high": 1.02}, "top1": nothing, "design_effect": None,
        },
        "per_sequence": {
            "seq_ids": list(range(count)), "kld": klds, "dnll": change, "nll_reference": [2.0] * count,
            "top1": [1 - kld] * count,
        },
        "footprint": {
            "shard_bytes": 100, "directory_bytes": 120, "reference_shard_bytes": 400, "parameters": 200,
            "quantized_weights": 100, "bits_per_weight": 3.5, "file_bits_per_weight": 4.0,
        },
        "tasks": {}, "documents": {}, "plan": None, "environment": {}, "command": "eval", "date": "2026-01-01",
    }  # fmt: skip
    return made | changes


def report(kld: float = 0.02, **changes: Any) -> EvalReport:
    """The same as a noun."""
    return EvalReport.parse(to_json(document(kld, **changes)), "report.json")
