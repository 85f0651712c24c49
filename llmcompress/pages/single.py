"""The page about one run: verdict, size and divergence on the first screen, then whatever else is known."""

from collections.abc import Sequence

from llmcompress.eval.report import EvalReport
from llmcompress.gate.limits import DEFAULT_PROFILE
from llmcompress.gate.verdict import Verdict
from llmcompress.pages import sections, tokens
from llmcompress.pages.figures import between, fixed, kl_digits, percent
from llmcompress.pages.reading import Run
from llmcompress.pages.sections import Section
from llmcompress.pages.verdict import gate, judged, verdict_line
from llmcompress.pictures.html import Html, el, join, whole_page
from llmcompress.pictures.page import Figure, shown
from llmcompress.pictures.words import megabytes

SOURCES = (
    tokens.distribution,
    sections.bits,
    sections.sensitivity,
    sections.trials,
    sections.structure,
    sections.losses,
    tokens.hidden_states,
    tokens.costs,
    tokens.positions,
    tokens.worst,
    tokens.sampling,
    sections.tasks,
    sections.speed,
    sections.summary,
    sections.provenance,
)


def run_page(run: Run, *, profile: str = DEFAULT_PROFILE, frontier: Figure | None = None) -> str:
    """The HTML of one run, judged by the limits of a profile (`none`: not judged).

    `frontier` is the picture of bits against damage, where somebody computed it. Raises InputError for an unknown
    profile.
    """
    verdict = judged(run, profile)
    parts = [gate(verdict), *(source(run) for source in SOURCES)]
    found = [section for section in parts if section is not None]
    if frontier is not None:
        place = next((k + 1 for k, section in enumerate(found) if section.word == "sensitivity"), 0)
        lead = el("p", "The least damage that each size allows, against every linear at one width.")
        found.insert(place, Section("frontier", "What other sizes would cost", join([lead, shown(frontier)])))
    return whole_page(
        f"{run.name}: llmcompress report",
        first_screen(run, verdict),
        contents(found),
        el("main", *map(whole, found)),
        FOOTER,
    )


FOOTER = el("footer", "Written by llmcompress. This page holds everything it shows and asks the network for nothing.")


def contents(found: Sequence[Section]) -> Html:
    """Links to the parts."""
    items = [el("li", el("a", section.title, href=f"#{section.word}")) for section in found]
    return el("nav", el("ul", *items), aria_label="Contents")


def whole(section: Section) -> Html:
    """One part with its heading."""
    heading = f"{section.word}-heading"
    return el("section", el("h2", section.title, id=heading), section.body, id=section.word, aria_labelledby=heading)


def first_screen(run: Run, verdict: Verdict | None) -> Html:
    """What a reader in a hurry needs."""
    parts = [el("p", _about(run), class_="soft small"), el("h1", run.name)]
    if verdict is not None:
        parts.append(verdict_line(verdict))
    if run.report is not None:
        parts.append(_bounds(run.report))
    parts.append(el("dl", *_tiles(run), class_="tiles"))
    if run.report is not None:
        parts += [el("p", "Evaluated by", class_="soft small"), el("pre", run.report.command)]
    return el("header", *parts)


def _about(run: Run) -> str:
    if run.report is None:
        return "compressed, not evaluated yet"
    report = run.report
    size = f"{report.data.sequences} × {report.data.sequence_length} tokens"
    return f"compared with {report.ref.name} on {size}, {report.date[:10]}"


def _bounds(report: EvalReport) -> Html:
    if not report.finite:
        words = " The model gives NaN or infinity on this text."
        return el("p", el("b", "Not finite.", class_="bad"), words)
    kld, ratio = report.summary.kld, report.summary.perplexity_ratio
    if kld.high is None:
        return el("p", f"KL divergence {fixed(kld.mean)} nats per token.")
    more = "" if ratio.high is None else f", perplexity at most {100 * (ratio.high - 1):+.2f} %"
    return el("p", f"KL divergence at most {kld.high:.4f} nats per token{more}: the upper ends of 95 % intervals.")


def _tile(name: str, figure: str, below: str, *, unit: str = "") -> Html:
    beside = (el("span", f" {unit}", class_="unit"),) if unit else ()
    value = el("dd", figure, *beside, class_="figure")
    return el("div", el("dt", name), value, el("dd", below, class_="soft small"), class_="tile")


def _size_tile(size: int, below: str) -> Html:
    figure, unit = megabytes(size).split(" ")
    return _tile("Size of the weights", figure, below, unit=unit)


def _tiles(run: Run) -> list[Html]:
    if run.report is not None:
        return _evaluated(run.report)
    if run.plan is None:
        return []
    found = run.plan.allocation
    whole = f"{found.file_bits_per_weight:.3f} over the whole checkpoint"
    return [_tile("Bits per weight", f"{found.bits_per_weight:.3f}", whole), _size_tile(found.file_bytes, "shards")]


def _evaluated(report: EvalReport) -> list[Html]:
    found, size = report.summary, report.footprint
    ratio, digits = found.perplexity_ratio, kl_digits(report)
    perplexities = f"{fixed(found.perplexity_reference, 3)}\u00a0→\u00a0{fixed(found.perplexity_candidate, 3)}"
    share = percent(size.shard_bytes / max(size.reference_shard_bytes, 1))
    whole = f"{size.file_bits_per_weight:.3f} over the whole checkpoint"
    bits = f"{size.bits_per_weight or size.file_bits_per_weight:.3f}"
    return [
        _tile("KL, nats/token", fixed(found.kld.mean, digits), between(found.kld, digits)),
        _size_tile(size.shard_bytes, f"{share} of {megabytes(size.reference_shard_bytes)}"),
        _tile("Bits per weight", bits, whole),
        _tile("Perplexity ratio", fixed(ratio.mean), f"{perplexities}, {between(ratio)}"),
        _tile("Same top-1 token", percent(found.top1.mean), between(found.top1, 3)),
    ]
