"""A model card with what an evaluation found: a section of its own, and results as the Hub reads them."""

import re
from typing import Any

from llmcompress.errors import one_line
from llmcompress.eval.report import Estimate, EvalReport
from llmcompress.hub.card import UNMEASURED, parts, plain, with_front
from llmcompress.pages.figures import fixed, kl_digits, percent
from llmcompress.pages.sections import TASK_COLUMNS, task_rows

HEADING = UNMEASURED.partition("\n")[0]
SECTION = re.compile(rf"^{re.escape(HEADING)}\n.*?(?=^## |\Z)", re.DOTALL | re.MULTILINE)
TASK = {"type": "text-generation", "name": "Text Generation"}


def evaluated_card(card: str, report: EvalReport, *, name: str, of: str = "", attached: bool = True) -> str:
    """The card with figures in place of its word that there are none, or of figures it had before.

    name      what the results are listed under: the repository
    of        what was measured, where that is not the very files the card lies beside
    attached  whether report.html and report.json lie there, too

    Raises InputError where the card's front matter cannot be read.
    """
    front, body = parts(card)
    front["model-index"] = [{"name": name, "results": results(report)}]
    section = _section(report, of, attached)
    if SECTION.search(body):
        body = SECTION.sub(lambda _: section + "\n", body, count=1)
    else:
        body = f"{body.rstrip()}\n\n{section}"
    return with_front(front, body)


def _section(report: EvalReport, of: str, attached: bool) -> str:
    data = report.data
    text = f"{data.sequences} × {data.sequence_length} tokens of held-out text ({plain(data.source)})"
    made = ", ".join(f"{plain(key)} {plain(value)}" for key, value in report.environment.items())
    more = (
        "[report.html](report.html) shows everything that was measured, `report.json` holds it.\n" if attached else ""
    )
    parts = [
        HEADING,
        f"{of}Against `{plain(report.ref.name)}`, on {text}; 95 % intervals over sequences:",
        "" if report.finite else "**It gives NaN or infinity on this text.**",
        _figures(report),
        _tasks(report),
        f"    {one_line(report.command)}",
        f"{more}Evaluated on {plain(report.date[:10])} with {made}.",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _figures(report: EvalReport) -> str:
    found, digits = report.summary, kl_digits(report)
    perplexities = f"{fixed(found.perplexity_reference)} → {fixed(found.perplexity_candidate)}"
    top1 = found.top1
    agreed = "no interval" if top1.low is None else f"{percent(top1.low)} to {percent(top1.high)}"
    rows = [
        ["KL divergence, nats per token", fixed(found.kld.mean, digits), _between(found.kld, digits)],
        ["perplexity, original → this", perplexities, ""],
        ["perplexity ratio", fixed(found.perplexity_ratio.mean), _between(found.perplexity_ratio, 4)],
        ["same likeliest next token", percent(top1.mean), agreed],
    ]
    return _table(["figure", "value", "95 %"], rows)


def _between(estimate: Estimate, digits: int) -> str:
    if estimate.low is None or estimate.high is None:
        return "no interval"
    return f"{estimate.low:.{digits}f} to {estimate.high:.{digits}f}"


def _tasks(report: EvalReport) -> str:
    rows = [[plain(cell) if place < 2 else cell for place, cell in enumerate(row)] for row in task_rows(report)]
    words = "Tasks by lm-evaluation-harness; ± is one standard error:"
    return f"{words}\n\n{_table(TASK_COLUMNS, rows)}" if rows else ""


def _table(columns: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [columns, ["---"] * len(columns), *rows])


def results(report: EvalReport) -> list[dict[str, Any]]:
    """The `results` of a `model-index`: figures that are numbers, each with its dataset."""
    data, found = report.data, report.summary
    metrics = [
        _metric("kl_divergence", f"KL divergence to {plain(report.ref.name)}, nats per token", found.kld),
        _metric("perplexity", "Perplexity", Estimate(mean=found.perplexity_candidate)),
        _metric("perplexity_ratio", "Perplexity over that of the original", found.perplexity_ratio),
        _metric("top1_agreement", "Share of tokens with the original's likeliest next token", found.top1),
    ]
    dataset = {
        "name": f"Held-out text: {plain(data.source)}",
        "type": re.sub(r"[^\w.-]+", "-", data.source, flags=re.ASCII).strip("-") or "text",
        "args": {
            "sequences": data.sequences,
            "sequence_length": data.sequence_length,
            "seed": data.seed,
            "tokens_sha256": data.tokens_digest,
        },
    }
    first = {"task": dict(TASK), "dataset": dataset, "metrics": [metric for metric in metrics if metric is not None]}
    return [*([first] if first["metrics"] else []), *_task_results(report)]


def _metric(kind: str, name: str, estimate: Estimate) -> dict[str, Any] | None:
    if estimate.mean is None:
        return None
    metric: dict[str, Any] = {"type": kind, "name": name, "value": round(estimate.mean, 6)}
    if estimate.low is not None and estimate.high is not None:
        metric["args"] = {"level": 0.95, "low": round(estimate.low, 6), "high": round(estimate.high, 6)}
    return metric


def _task_results(report: EvalReport) -> list[dict[str, Any]]:
    found = []
    for task, values in report.tasks.items():
        metrics = []
        for key, value in values.items():
            metric, _, form = key.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            spread = values.get(f"{metric}_stderr,{form}")
            entry: dict[str, Any] = {"type": plain(metric), "name": plain(key), "value": round(float(value), 6)}
            if isinstance(spread, int | float):
                entry["args"] = {"standard_error": round(float(spread), 6)}
            metrics.append(entry)
        if metrics:
            found.append(
                {"task": dict(TASK), "dataset": {"name": plain(task), "type": plain(task)}, "metrics": metrics}
            )
    return found
