"""What formats do to a model beyond perplexity: the table of "Understanding the Impact of Post-Training Quantization on
Large Language Models" (arXiv 2309.05210), from reports of `llmcompress eval --sweep --speed`.

    python bench/impact.py demo --json bench/results/impact-demo.json

bf16 is the model itself. int8 has weights and inputs in 8 bits; fp4 and nf4 round to the nearest, with and without
doubly quantized scales; the rest are our integers of 4 bits. Where a figure was graded in the paper, here it is the
distance to the original: KL at temperatures, and where greedy continuations part.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from common import arguments, write

from llmcompress.compress.allocate.budget import parse_budget
from llmcompress.compress.run import QuantizeRequest, quantize
from llmcompress.eval.report import EvalReport
from llmcompress.eval.run import EvalRequest, run_eval
from llmcompress.hub.source import Source, resolve
from llmcompress.model.text import TextRequest
from llmcompress.recipes import load_recipe

ONE_WIDTH = ("scorer=zd", "plan.bits=[4]", "plan.group_size=64", "plan.trials=false")
FORMATS: dict[str, tuple[str, tuple[str, ...]] | None] = {
    "bf16": None,
    "int8": ("int8", ()),
    "fp4": ("nf4", ("quantizer=fp4", "quantize.double=false")),
    "fp4-dq": ("nf4", ("quantizer=fp4",)),
    "nf4": ("nf4", ("quantize.double=false",)),
    "nf4-dq": ("nf4", ()),
    "int4, rounded": ("balanced", ("quantizer=rtn", *ONE_WIDTH)),
    "int4, balanced": ("balanced", ONE_WIDTH),
}


def report_of(source: Source, made: tuple[str, tuple[str, ...]] | None, options: Any) -> EvalReport:
    """Quantize in a scratch folder and evaluate."""
    text = TextRequest(options.data, options.samples, 512, 0, "evaluation")
    with tempfile.TemporaryDirectory() as scratch:
        model = source
        if made is not None:
            recipe = load_recipe(made[0], made[1])
            if recipe.calibration.source is not None:
                part = recipe.calibration.model_copy(update={"source": options.calibration})
                recipe = recipe.model_copy(update={"calibration": part})
            output = Path(scratch) / "out"
            for _ in quantize(QuantizeRequest(source, output, recipe, parse_budget("9bits"), "cpu", "bench")):
                pass
            model = replace(source, path=output)
        return run_eval(EvalRequest(model, source, text, 8, "cpu", "bench", sweep=True, speed=True))


def row_of(label: str, report: EvalReport) -> dict[str, Any]:
    """The figures of one format."""
    if report.sampling is None or report.tokens is None:
        raise SystemExit("no sweep in the report")
    longest = report.sampling.continuations[-1]
    speeds = {speed.batch: speed for speed in report.speed if speed.side == "candidate"}
    return {
        "label": label,
        "bits_per_weight": report.footprint.bits_per_weight or 16.0,
        "resident_bytes": report.footprint.resident_bytes,
        "kld": report.summary.kld.mean,
        "perplexity": report.summary.perplexity_candidate,
        "top1": report.summary.top1.mean,
        "tempered": {f"{entry.temperature:g}": entry.kld.mean for entry in report.sampling.temperatures},
        "restricted": {str(entry.k): entry.kld.mean for entry in report.tokens.top},
        "new_tokens": longest.new_tokens,
        "first_divergence": longest.first_divergence.mean,
        "identical": longest.identical,
        "repetition": longest.repetition_candidate.mean,
        "decode_tokens_per_second": {str(batch): speed.decode_tokens_per_second for batch, speed in speeds.items()},
    }


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    heat = "  ".join(f"{row['tempered'][key]:.4f}" for key in ("0.1", "0.5", "0.8", "1"))
    speed = " / ".join(f"{value:.0f}" for value in row["decode_tokens_per_second"].values())
    print(
        f"{row['label']:<15} {row['bits_per_weight']:7.3f} bpw {row['resident_bytes'] / 1e6:6.2f} MB  perplexity "
        f"{row['perplexity']:.3f}  KL at 0.1, 0.5, 0.8, 1: {heat}  parts after {row['first_divergence']:5.1f} of "
        f"{row['new_tokens']}, repeats {row['repetition']:.3f}  {speed} tokens/s",
        flush=True,
    )


if __name__ == "__main__":
    options = arguments(__doc__ or "")
    source, rows = resolve(options.model), []
    for label, made in FORMATS.items():
        rows.append(row_of(label, report_of(source, made, options)))
        show(rows[-1])
    write(options, rows, samples=options.samples)
