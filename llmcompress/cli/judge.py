"""`llmcompress verify` and `llmcompress eval`."""

from pathlib import Path
from typing import Any

import click

from llmcompress.cli.options import pick_device, speaking
from llmcompress.cli.say import Speaker, command_line, megabytes


@click.command("verify")
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--device", default=None, help="cpu or cuda. Default: cpu.")
@speaking
def verify_command(output: Path, device: str | None, speaker: Speaker) -> None:
    """Reopen OUTPUT: hashes, index, true bits against the plan, NaN, logits against the stored codes."""
    from llmcompress.compress.verify import require, verify

    checks = require(verify(output, pick_device(device)))
    document = [{"name": c.name, "passed": c.passed, "found": c.found} for c in checks]
    speaker.result(document, [f"{check.name:<18} ok  {check.found}" for check in checks])


@click.command("eval")
@click.argument("model")
@click.option("--ref", required=True, help="The original: a directory, org/name[@revision], a short name or demo.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for report.json. Default: MODEL-eval.")
@click.option("--data", default="builtin", show_default=True, help="builtin (held-out files), or a text file.")
@click.option("--samples", type=click.IntRange(2), default=64, show_default=True, help="Sequences.")
@click.option("--sequence-length", type=click.IntRange(8), default=512, show_default=True, help="Tokens in each.")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option("--device", default=None, help="cpu or cuda. Default: cpu.")
@speaking
def eval_command(model: str, ref: str, output: Path | None, speaker: Speaker, **flags: Any) -> None:
    """Compare MODEL with its original on held-out text: KL divergence, perplexity, top-1 agreement."""
    request = _request(model, ref, flags)
    from llmcompress.eval.run import run_eval, write_report

    speaker.talk(f"comparing {request.model.name} with {request.reference.name} ...")
    report = run_eval(request)
    path = write_report(report, output or Path(f"{request.model.name}-eval"))
    speaker.result(report.model_dump(mode="json"), [*_lines(report), f"written to  {path}"])


def _request(model: str, ref: str, flags: dict[str, Any]) -> Any:
    from llmcompress.model.hub import resolve

    sources = resolve(model), resolve(ref)
    from llmcompress.eval.run import EvalRequest
    from llmcompress.model.text import TextRequest

    text = TextRequest(flags["data"], flags["samples"], flags["sequence_length"], flags["seed"], "evaluation")
    return EvalRequest(*sources, text, flags["batch_size"], pick_device(flags["device"]), command_line())


def _with_interval(estimate: Any, digits: int = 5) -> str:
    if estimate.mean is None:
        return "not finite"
    if estimate.low is None:
        return f"{estimate.mean:.{digits}f}"
    return f"{estimate.mean:.{digits}f}  [{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]"


def _lines(report: Any) -> list[str]:
    found, size = report.summary, report.footprint
    bits = f"{size.bits_per_weight:.4f} over the quantized linears, " if size.bits_per_weight is not None else ""
    perplexities = (found.perplexity_reference, found.perplexity_candidate)
    before, after = ("not finite" if p is None else f"{p:.4f}" for p in perplexities)
    return [
        f"text        {report.data.sequences} x {report.data.sequence_length} tokens, {report.data.source}",
        f"KL          {_with_interval(found.kld)} nats/token, 95 % over sequences",
        f"perplexity  {before} -> {after}, ratio {_with_interval(found.perplexity_ratio, 4)}",
        f"top-1       {_with_interval(found.top1, 4)} agreement",
        f"bits        {bits}{size.file_bits_per_weight:.4f} over the whole checkpoint",
        f"size        {size.reference_shard_bytes:,} -> {size.shard_bytes:,} bytes of weights "
        f"({megabytes(size.directory_bytes)} in all)",
    ]
