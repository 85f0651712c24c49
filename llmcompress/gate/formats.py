"""A verdict as text, GitHub annotations, JUnit XML or Markdown, with every name made harmless for where it goes."""

from collections.abc import Iterator
from typing import Literal
from xml.etree import ElementTree

from llmcompress.eval.report import Estimate, EvalReport
from llmcompress.gate.verdict import Verdict, Word
from llmcompress.gate.words import MARKS, amount, bounds, headline, more, reason, small_print, tame

MOST_ANNOTATIONS = 10  # GitHub shows no more of a kind from one step
SUMMARY_BYTES = 1_000_000  # GitHub drops a step summary above 1 MiB whole
SIGNS: dict[Word, str] = {"pass": "✅ pass", "fail": "❌ fail", "undecided": "❓ undecided"}


def rows(verdict: Verdict) -> Iterator[tuple[str, Word, str, str]]:
    """Every check in turn: its tamed name, answer, reason and note."""
    for condition in verdict.conditions:
        yield tame(condition.name), "pass" if condition.holds else "fail", tame(condition.found), ""
    for criterion in verdict.criteria:
        yield tame(criterion.name), criterion.verdict, reason(criterion), tame(criterion.note)


def text(verdict: Verdict) -> list[str]:
    """Lines for a terminal; each begins with a word of ours."""
    found = list(rows(verdict))
    width = max(len(name) for name, *_ in found)
    lines = [f"{MARKS[word]:<9}  {name:<{width}}  {why}" for name, word, why, _ in found]
    lines += [f"note       {name:<{width}}  {note}" for name, _, _, note in found if note]
    return [*lines, headline(verdict), small_print(verdict)]


def github(verdict: Verdict, *, undecided: Literal["error", "warning"] = "error") -> list[str]:
    """Workflow commands, one for each check that did not pass, or one notice where all did."""
    kinds: dict[Word, str] = {"fail": "error", "undecided": undecided}
    bad = [(kinds[word], name, why) for name, word, why, _ in rows(verdict) if word in kinds]
    if not bad:
        return [f"::notice title=llmcompress gate::{_message(headline(verdict))}"]
    bad.sort(key=lambda entry: entry[0])  # errors before warnings
    if len(bad) > MOST_ANNOTATIONS:
        left = len(bad) - MOST_ANNOTATIONS + 1
        bad = [*bad[: MOST_ANNOTATIONS - 1], (bad[0][0], "and more", f"{left} other checks did not pass")]
    return [f"::{kind} title={_property(f'llmcompress gate, {name}')}::{_message(why)}" for kind, name, why in bad]


def _message(words: str) -> str:
    """The data of a workflow command."""
    return words.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(words: str) -> str:
    """A property of a workflow command."""
    return _message(words).replace(":", "%3A").replace(",", "%2C")


def step_summary(report: EvalReport, verdict: Verdict) -> str:
    """Markdown for `$GITHUB_STEP_SUMMARY`, cut at a line where it would be too large."""
    kept, size = [], 0
    for line in markdown(report, verdict).splitlines(keepends=True):
        size += len(line.encode())
        if size > SUMMARY_BYTES:
            kept.append("\nThe rest is too long to be shown here.\n")
            break
        kept.append(line)
    return "".join(kept)


def junit(verdict: Verdict, *, undecided: Literal["error", "skipped"] = "error") -> str:
    """JUnit XML: one test case for each check."""
    found = list(rows(verdict))
    counts = {word: sum(each[1] == word for each in found) for word in MARKS}
    suite = ElementTree.Element(
        "testsuite",
        name=f"llmcompress gate: {tame(verdict.model)}",
        tests=str(len(found)),
        failures=str(counts["fail"]),
        errors=str(counts["undecided"] if undecided == "error" else 0),
        skipped=str(counts["undecided"] if undecided == "skipped" else 0),
    )
    for name, word, why, note in found:
        case = ElementTree.SubElement(suite, "testcase", classname="llmcompress.gate", name=name)
        if word != "pass":
            kind = "failure" if word == "fail" else undecided
            ElementTree.SubElement(case, kind, message=why, type=word).text = note or why
        else:
            ElementTree.SubElement(case, "system-out").text = f"{why} {note}".strip()
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def code(name: str) -> str:
    """A name for Markdown: letters and digits as they are, all else as entities, which cannot form structure.

    It stands in `<code>`, within which no @name is notified and no address becomes a link.
    """
    letters = (c if c.isalnum() or c in " -/" else f"&#{ord(c)};" for c in tame(name).strip() or "?")
    return f"<code>{''.join(letters)}</code>"


def markdown(report: EvalReport, verdict: Verdict | None) -> str:
    """A comment for a pull request: the verdict and its criteria, then what was measured. Ends with a newline."""
    lines = [f"### llmcompress: {code(report.model.name)} beside {code(report.ref.name)}", ""]
    if verdict is not None:
        lines += [f"**{headline(verdict)}**", "", *_criteria(verdict), ""]
    lines += [*_figures(report), ""]
    if verdict is not None:
        profile = f"Profile {verdict.limits.profile}, one-sided bounds at {100 * verdict.level:.4g} %"
        lines += [f"{profile}, sequences and documents being the units."]
    else:
        lines += ["Intervals at 95 %, sequences being the units."]
    return "\n".join(lines) + "\n"


def _criteria(verdict: Verdict) -> Iterator[str]:
    yield "| check | answer | measured | bounds | limit | counted |"
    yield "|---|---|---:|---:|---:|---:|"
    for condition in verdict.conditions:
        word: Word = "pass" if condition.holds else "fail"
        yield f"| {code(condition.name)} | {SIGNS[word]} | {_cell(condition.found)} | | | |"
    for criterion in verdict.criteria:
        word = criterion.verdict
        answer = f"{SIGNS[word]}: {more(criterion)}" if word == "undecided" else SIGNS[word]
        measured, limit = amount(criterion, criterion.estimate), amount(criterion, criterion.limit)
        units = f"{criterion.count:,} {criterion.counted}"
        yield f"| {code(criterion.name)} | {answer} | {measured} | {bounds(criterion)} | {limit} | {units} |"


def _cell(words: str) -> str:
    """A sentence of ours that may hold a digest of a stranger's: plain where it is plain, else as a name."""
    plain = all(c.isalnum() or c in " .,%-'" for c in words)
    return words if plain else code(words)


def _figures(report: EvalReport) -> Iterator[str]:
    found, size = report.summary, report.footprint
    before, after = (_plain(p) for p in (found.perplexity_reference, found.perplexity_candidate))
    yield "| figure | value |"
    yield "|---|---|"
    yield f"| KL divergence, nats/token | {_interval(found.kld)} |"
    yield f"| perplexity | {before} → {after}, ratio {_interval(found.perplexity_ratio)} |"
    yield f"| top-1 agreement | {_interval(found.top1)} |"
    for name, documents in report.documents.items():
        scores = (sum(values) / max(len(values), 1) for values in (documents.reference, documents.candidate))
        yield f"| task {code(name)}, {code(documents.metric)} | {' → '.join(f'{score:.4f}' for score in scores)} |"
    yield f"| weights, bytes | {size.reference_shard_bytes:,} → {size.shard_bytes:,} |"
    if size.bits_per_weight is not None:
        yield f"| bits per weight of the quantized linears | {size.bits_per_weight:.4f} |"
    yield f"| bits per weight of the whole checkpoint | {size.file_bits_per_weight:.4f} |"


def _plain(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.5g}"


def _interval(estimate: Estimate) -> str:
    if estimate.mean is None or estimate.low is None or estimate.high is None:
        return _plain(estimate.mean)
    return f"{estimate.mean:.4g} [{estimate.low:.4g}, {estimate.high:.4g}]"
