"""Several runs side by side: what each is worth for its size, and which differences are more than noise."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy

from llmcompress.eval.report import Estimate, EvalReport
from llmcompress.eval.statistics import cluster_t
from llmcompress.pages.figures import fixed, kl_digits, percent, with_interval
from llmcompress.pages.reading import Run
from llmcompress.pages.sections import Section
from llmcompress.pages.single import FOOTER, contents, whole
from llmcompress.pictures.forest import Interval, forest
from llmcompress.pictures.html import el, join, table, whole_page
from llmcompress.pictures.page import Figure, shown
from llmcompress.pictures.runs import Sized, size_against_kl
from llmcompress.pictures.words import listed, megabytes, shorten


@dataclass(frozen=True)
class Named:
    """A report and the name it goes by among the others."""

    name: str
    report: EvalReport


@dataclass(frozen=True)
class Difference:
    """How much more KL divergence `name` has than the first run, mean over the same sequences, nats per token."""

    name: str
    kld: Estimate

    @property
    def verdict(self) -> str:
        """In words; a difference counts where the whole interval lies on one side."""
        if self.kld.low is None or self.kld.high is None:
            return "cannot be told"
        return "worse" if self.kld.low > 0 else "better" if self.kld.high < 0 else "no difference shown"


def named(runs: Sequence[Run]) -> list[Named]:
    """Every run by its own name, those of one name numbered. Only runs that were evaluated."""
    names = [run.name for run in runs]
    return [
        Named(run.name if names.count(run.name) == 1 else f"{run.name} ({names[: k + 1].count(run.name)})", run.report)
        for k, run in enumerate(runs)
        if run.report is not None
    ]


def comparable(one: EvalReport, other: EvalReport) -> bool:
    """Whether two reports are about the same original on the same tokens."""
    same = one.data.tokens_digest == other.data.tokens_digest and one.ref.model_digest == other.ref.model_digest
    return same and one.per_sequence.seq_ids == other.per_sequence.seq_ids


def differences(rows: Sequence[Named]) -> list[Difference]:
    """Of every run that can be compared with the first, sequence by sequence."""
    first = rows[0].report
    found = []
    for row in rows[1:]:
        pairs = list(zip(row.report.per_sequence.kld, first.per_sequence.kld, strict=False))
        if comparable(first, row.report) and all(a is not None and b is not None for a, b in pairs):
            values = numpy.asarray([a - b for a, b in pairs if a is not None and b is not None], dtype=numpy.float64)
            low, high = cluster_t(values) or (None, None)
            found.append(Difference(row.name, Estimate(mean=float(values.mean()), low=low, high=high)))
    return found


def warnings(rows: Sequence[Named]) -> list[str]:
    """What must not be compared, and why."""
    first = rows[0]
    other = [row.name for row in rows if row.report.data.tokens_digest != first.report.data.tokens_digest]
    apart = [row.name for row in rows if row.report.ref.model_digest != first.report.ref.model_digest]
    found = []
    if other:
        found.append(f"{listed(other)}: evaluated on other tokens than {first.name}, so their KL cannot be compared.")
    if apart:
        found.append(f"{listed(apart)}: compared with another original than {first.name}.")
    bad = [row.name for row in rows if not row.report.finite]
    return [*found, *([f"{listed(bad)}: not finite."] if bad else [])]


def speed_of(report: EvalReport, side: str) -> str:
    """Decoding at the smallest batch, tokens per second; `-` where nobody measured."""
    found = sorted((s for s in report.speed if s.side == side), key=lambda s: s.batch)
    return f"{found[0].decode_tokens_per_second:,.1f}" if found else "-"


def overview(rows: Sequence[Named]) -> tuple[list[str], list[list[str]]]:
    """The table of runs, the originals first: columns and rows."""
    timed = any(row.report.speed for row in rows)
    columns = ["model", "bits per weight", "whole checkpoint", "size", "KL, nats/token", "perplexity ratio", "top-1"]
    columns += ["decode, tokens/s"] if timed else []
    lines, seen = [], set()
    for row in rows:
        report, size = row.report, row.report.footprint
        if report.ref.model_digest not in seen:
            seen.add(report.ref.model_digest)
            bits = 8 * size.reference_shard_bytes / size.original_parameters
            known = [f"{report.ref.name} (original)", "-", f"{bits:.3f}", megabytes(size.reference_shard_bytes)]
            lines.append([*known, "0", "1", percent(1.0), *([speed_of(report, "reference")] if timed else [])])
    for row in rows:
        found, size = row.report.summary, row.report.footprint
        bits_word = "-" if size.bits_per_weight is None else f"{size.bits_per_weight:.3f}"
        lines.append([
            row.name, bits_word, f"{size.bits_per_original_weight:.3f}", megabytes(size.shard_bytes),
            with_interval(found.kld, kl_digits(row.report)), with_interval(found.perplexity_ratio),
            percent(found.top1.mean), *([speed_of(row.report, "candidate")] if timed else []),
        ])  # fmt: skip
    return columns, lines


def comparison_page(runs: Sequence[Run]) -> str:
    """The HTML of several evaluated runs, two or more."""
    rows = named(runs)
    found = [_overview(rows), *_pareto(rows), *_paired(rows), _provenance(rows)]
    title = f"{len(rows)} compressed models"
    data = rows[0].report.data
    about = f"on {data.source}, {data.sequences} × {data.sequence_length} tokens"
    head = el(
        "header",
        el("p", f"compared with {rows[0].report.ref.name} {about}", class_="soft small"),
        el("h1", title),
        el("p", _best(rows), class_="verdict"),
        *(el("p", words, class_="warning") for words in warnings(rows)),
    )
    return whole_page(f"{title}: llmcompress report", head, contents(found), el("main", *map(whole, found)), FOOTER)


def _best(rows: Sequence[Named]) -> str:
    known = [row for row in rows if row.report.summary.kld.mean is not None]
    if not known:
        return "None of them is finite."
    best = min(known, key=lambda row: row.report.summary.kld.mean or 0.0)
    small = min(rows, key=lambda row: row.report.footprint.shard_bytes)
    return (
        f"Nearest to its original: {shorten(best.name, 80)}, KL {fixed(best.report.summary.kld.mean)}. "
        f"Smallest: {shorten(small.name, 80)}, {megabytes(small.report.footprint.shard_bytes)}."
    )


def _overview(rows: Sequence[Named]) -> Section:
    columns, lines = overview(rows)
    note = (
        "Intervals: 95 %, over sequences. Bits per weight count codes, scales and shapes over the quantized linears; "
        "of the whole checkpoint, all its bytes over the weights of the original."
    )
    return Section("runs", "All of them", join([table(columns, lines), el("p", note, class_="soft small")]))


def _pareto(rows: Sequence[Named]) -> list[Section]:
    known = [row for row in rows if row.report.summary.kld.mean is not None]
    if len(known) < 2:
        return []
    sized = [
        Sized(
            row.name,
            row.report.footprint.bits_per_original_weight,
            row.report.summary.kld.mean or 0.0,
            row.report.summary.kld.low,
            row.report.summary.kld.high,
        )
        for row in known
    ]
    svg = size_against_kl(
        sized, title="Size against divergence", size="whole checkpoint, bits per weight of the original"
    )
    cells = [[s.name, f"{s.bits_per_weight:.4f}", with_interval(row.report.summary.kld, 5)]
             for s, row in zip(sized, known, strict=True)]  # fmt: skip
    figure = Figure("pareto", svg, ["model", "bits per weight of the original", "KL, nats/token"], cells)
    return [Section("pareto", "Size against divergence", shown(figure))]


def _paired(rows: Sequence[Named]) -> list[Section]:
    found = [d for d in differences(rows) if d.kld.low is not None and d.kld.high is not None]
    if not found:
        return []
    first = shorten(rows[0].name, 60)
    svg = forest(
        [_interval(d) for d in found],
        title=f"Difference from {first}",
        facts=f"KL of each model less that of {first}, sequence by sequence; left is better",
        across="difference of KL, nats/token",
        rule=(0.0, "equal"),
    )
    cells = [[d.name, with_interval(d.kld, 5), d.verdict] for d in found]
    lead = f"The same sequences through each model: what differs from {first} is not the text."
    figure = Figure("paired", svg, ["model", "difference of KL, nats/token", "verdict"], cells)
    return [Section("paired", f"Against {first}", join([el("p", lead), shown(figure)]))]


def _interval(one: Difference) -> Interval:
    mean, low, high = (value or 0.0 for value in (one.kld.mean, one.kld.low, one.kld.high))
    return Interval(one.name, mean, low, high, f"{mean:+.4f}, {one.verdict}")


def _provenance(rows: Sequence[Named]) -> Section:
    cells = [
        [row.name, row.report.date[:10], row.report.data.tokens_digest[:16], row.report.model.model_digest[:16],
         shorten(row.report.command, 120)]
        for row in rows
    ]  # fmt: skip
    columns = ["model", "date", "tokens digest", "model digest", "command"]
    return Section("provenance", "How to make it again", table(columns, cells))
