"""A report in lines for the terminal: what matters, a line for each kind of figure."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmcompress.cli.say import megabytes

if TYPE_CHECKING:
    from llmcompress.eval.facts import Estimate, Sampling, TokenFacts
    from llmcompress.eval.report import EvalReport


SMALLEST = 1e-3  # a figure below is printed with an exponent: it is as telling as a large one


def _plain(value: float | None, digits: int = 4) -> str:
    if value is None:
        return "not finite"
    return f"{value:.2e}" if 0 < abs(value) < SMALLEST else f"{value:.{digits}f}"


def with_interval(estimate: "Estimate", digits: int = 5) -> str:
    """A mean with its interval where there is one."""
    mean, low, high = (_plain(value, digits) for value in (estimate.mean, estimate.low, estimate.high))
    return mean if estimate.mean is None or estimate.low is None else f"{mean}  [{low}, {high}]"


def lines_of(report: "EvalReport") -> list[str]:
    """What `eval` prints."""
    found, size = report.summary, report.footprint
    bits = f"{size.bits_per_weight:.4f} over the quantized linears, " if size.bits_per_weight is not None else ""
    before, after = _plain(found.perplexity_reference), _plain(found.perplexity_candidate)
    return [
        f"text        {report.data.sequences} x {report.data.sequence_length} tokens, {report.data.source}",
        f"KL          {with_interval(found.kld)} nats/token, 95 % over sequences",
        f"perplexity  {before} -> {after}, ratio {with_interval(found.perplexity_ratio, 4)}",
        f"top-1       {with_interval(found.top1, 4)} agreement",
        *(_tokens(report.tokens, found.kld_largest_position) if report.tokens else ()),
        *_blocks(report),
        *_voids(report),
        f"bits        {bits}{size.file_bits_per_weight:.4f} over the whole checkpoint",
        f"size        {size.reference_shard_bytes:,} -> {size.shard_bytes:,} bytes of weights "
        f"({megabytes(size.directory_bytes)} in all)",
        *(_sampling(report.sampling) if report.sampling else ()),
        *_speed(report),
        *_tasks(report),
    ]


def _tokens(found: "TokenFacts", worst: float | None) -> Iterator[str]:
    quantiles = {quantile.share: quantile.value for quantile in found.kld_quantiles}
    flips = found.flips
    yield f"tokens      KL median {_plain(quantiles[0.5])}, 99 % below {_plain(quantiles[0.99])}, worst {_plain(worst)}"
    yield (
        f"next token  right {flips.accuracy_reference:.2%} -> {flips.accuracy_candidate:.2%}: "
        f"{flips.right_to_wrong:.2%} right to wrong, {flips.wrong_to_right:.2%} wrong to right"
    )


def _blocks(report: "EvalReport") -> Iterator[str]:
    errors = [entry.relative_error for entry in report.trajectory if entry.block >= 0]
    if errors and None not in errors:
        yield f"blocks      hidden states off by {errors[0]:.2%} after the first block, {errors[-1]:.2%} after the last"


def _voids(report: "EvalReport") -> Iterator[str]:
    if report.voids is None:
        return
    yield f"voids       alpha {report.voids.alpha:g}; blocks used and KL on the prompts, then on what follows"
    for run in report.voids.runs:
        parts = ((run.usage_prompt, run.kld_prompt), (run.usage_response, run.kld_response))
        said = "   ".join(f"{sum(usage) / len(usage):4.0%} {with_interval(kld)}" for usage, kld in parts)
        yield f"  {run.protocol:<25} {said}"


def _sampling(found: "Sampling") -> Iterator[str]:
    cells = [f"{_plain(entry.kld.mean)} at {entry.temperature:g}" for entry in found.temperatures]
    yield f"tempered    KL {', '.join(cells)}"
    for entry in found.continuations:
        yield (
            f"greedy      {entry.new_tokens} tokens: part after {_plain(entry.first_divergence.mean, 1)}, "
            f"{entry.identical:.0%} identical; repeated 4-grams {_plain(entry.repetition_reference.mean)} -> "
            f"{_plain(entry.repetition_candidate.mean)}"
        )


def _speed(report: "EvalReport") -> Iterator[str]:
    sides = {(entry.side, entry.batch): entry for entry in report.speed}
    for batch in sorted({entry.batch for entry in report.speed}):
        old, new = sides["reference", batch], sides["candidate", batch]
        yield (
            f"speed       batch {batch}: decode {old.decode_tokens_per_second:,.0f} -> "
            f"{new.decode_tokens_per_second:,.0f}, prefill {old.prefill_tokens_per_second:,.0f} -> "
            f"{new.prefill_tokens_per_second:,.0f} tokens/s, {new.dtype}"
        )
    size = report.footprint
    if size.resident_bytes is not None and size.reference_resident_bytes is not None:
        yield (
            f"memory      {megabytes(size.reference_resident_bytes)} -> {megabytes(size.resident_bytes)} "
            "of weights when loaded"
        )


def _tasks(report: "EvalReport") -> Iterator[str]:
    inside = {name for members in (report.harness or {}).get("group_subtasks", {}).values() for name in members}
    for name, row in ((name, row) for name, row in report.tasks.items() if name not in inside):
        for key, value in row.items():
            metric, _, filtered = key.partition(",")
            before = report.reference_tasks.get(name, {}).get(key)
            if not filtered or metric.endswith("_stderr") or isinstance(value, str) or not isinstance(before, float):
                continue
            stderr = row.get(f"{metric}_stderr,{filtered}")
            error = f" ± {stderr:.4g}" if isinstance(stderr, float) else ""
            yield f"{name:<11} {metric} {before:.4g} -> {value:.4g}{error}"
