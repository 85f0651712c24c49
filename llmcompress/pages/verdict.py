"""The verdict of a page: what the gate says of the report, as a line, a forest plot and a table."""

from llmcompress.gate.judge import judge
from llmcompress.gate.limits import read_limits
from llmcompress.gate.verdict import Criterion, Verdict, Word
from llmcompress.gate.words import amount, bounds, headline, reason, small_print
from llmcompress.pages.reading import Run
from llmcompress.pages.sections import Section
from llmcompress.pictures.forest import Interval, forest
from llmcompress.pictures.html import Html, el, join, table
from llmcompress.pictures.page import Figure, shown
from llmcompress.pictures.words import number, shorten

LOOKS: dict[Word, str] = {"pass": "good", "fail": "bad", "undecided": "unsure"}


def judged(run: Run, profile: str) -> Verdict | None:
    """What the gate says under a profile; None for `none` and for a run that was not evaluated. Raises InputError."""
    if run.report is None or profile == "none":
        return None
    return judge(run.report, read_limits(None, {"profile": profile})[0])


def verdict_line(verdict: Verdict) -> Html:
    """The verdict in a sentence."""
    word, _, rest = headline(verdict).partition(":")
    tail = f":{rest}, profile {verdict.limits.profile}"
    return el("p", el("b", word, class_=LOOKS[verdict.verdict]), tail, class_="verdict")


def gate(verdict: Verdict | None) -> Section | None:
    """Every interval against its limit."""
    if verdict is None:
        return None
    rows = [[c.name, "pass" if c.holds else "FAIL", c.found] for c in verdict.conditions]
    rows += [[c.name, c.verdict if c.verdict != "fail" else "FAIL", reason(c)] for c in verdict.criteria]
    answers = el("div", table(["check", "answer", "found"], rows), class_="words")
    notes = el("p", small_print(verdict), class_="soft small")
    return Section("gate", "Kept within limits?", join([*_forest(verdict), answers, notes]))


def _forest(verdict: Verdict) -> list[Html]:
    known = [c for c in verdict.criteria if None not in (c.estimate, c.low, c.high)]
    if not known:
        return []
    svg = forest(
        [_interval(c) for c in known],
        title=f"Damage against its limits, {shorten(verdict.model, 40)}",
        facts=f"one-sided bounds at {100 * verdict.level:.4g} %; whatever lies left of the line keeps its limit",
        across="share of the limit",
        rule=(1.0, "limit"),
        zero=True,
    )
    rows = [
        [c.name, number((c.estimate or 0.0) / c.limit), amount(c, c.estimate), bounds(c), amount(c, c.limit)]
        for c in known
    ]
    return [shown(Figure("gate", svg, ["check", "share of the limit", "measured", "bounds", "limit"], rows))]


def _interval(found: Criterion) -> Interval:
    value, low, high = ((end or 0.0) / found.limit for end in (found.estimate, found.low, found.high))
    beside = f"{found.verdict}: {amount(found, found.estimate)}, limit {amount(found, found.limit)}"
    return Interval(found.name, value, low, high, beside)
