"""Sentences about a verdict. Names come from files of strangers, so none leaves here untamed."""

from llmcompress.gate.verdict import Criterion, Verdict, Word

LONGEST_NAME = 120
MARKS: dict[Word, str] = {"pass": "pass", "fail": "FAIL", "undecided": "undecided"}


def tame(text: str) -> str:
    """Text of unknown origin in one printable line: no control or format characters, no way to begin a CI command."""
    plain = "".join(letter if letter.isprintable() else "?" for letter in text).replace("##[", "# #[")
    plain = plain.replace("::", ": :")
    return plain if len(plain) <= LONGEST_NAME else plain[: LONGEST_NAME - 1] + "…"


def amount(criterion: Criterion, value: float | None) -> str:
    """A value with its unit: nats per token, or percent."""
    if value is None:
        return "not finite"
    return f"{value:.4g} nats/token" if criterion.unit == "nats/token" else f"{100 * value:.3g} %"


def bounds(criterion: Criterion) -> str:
    """`[low, high]` in the unit of the limit, or nothing where there is no interval."""
    if criterion.estimate is None or (criterion.low is None and criterion.high is None):
        return ""
    low = "-inf" if criterion.low is None else amount(criterion, criterion.low).split(" ")[0]
    high = "inf" if criterion.high is None else amount(criterion, criterion.high).split(" ")[0]
    return f"[{low}, {high}]"


def more(criterion: Criterion) -> str:
    """What would decide an undecided criterion."""
    if criterion.needed is None:
        return "the truth lies about at the limit: no number of them would tell"
    return f"about {criterion.needed:,} {criterion.counted} are needed, there are {criterion.count:,}"


def reason(criterion: Criterion) -> str:
    """Why a criterion got its answer, in one line."""
    limit = f"limit {amount(criterion, criterion.limit)}"
    shown = criterion.estimate is not None or not criterion.note
    found = f"{amount(criterion, criterion.estimate)} {bounds(criterion)}".strip() if shown else "not measured"
    line = f"{found}, {limit}, {criterion.count:,} {criterion.counted}"
    return f"{line}: {more(criterion)}" if criterion.verdict == "undecided" else line


def headline(verdict: Verdict) -> str:
    """The verdict in one line."""
    asked = [*verdict.conditions, *verdict.criteria]
    failed = sum(c.verdict == "fail" for c in verdict.criteria) + sum(not c.holds for c in verdict.conditions)
    if verdict.verdict == "fail":
        return f"FAIL: {failed} of {len(asked)} checks"
    if verdict.verdict == "pass":
        return f"PASS: all {len(asked)} checks"
    return f"UNDECIDED: {_needed(verdict) or 'the truth lies about at a limit'}"


def _needed(verdict: Verdict) -> str:
    found = []
    for counted in ("sequences", "documents"):
        number = verdict.needed(counted)
        if number is not None:
            found.append(f"about {number:,} {counted}")
    return f"{' and '.join(found)} are needed" if found else ""


def small_print(verdict: Verdict) -> str:
    """How sure the answer is, and what it rests on."""
    limits = verdict.limits
    looks = f", one of {limits.looks} looks" if limits.looks > 1 else ""
    return (
        f"profile {limits.profile}, one-sided bounds at {100 * verdict.level:.4g} %{looks}; "
        f"{tame(verdict.model)} beside {tame(verdict.ref)}"
        + (f", baseline {tame(verdict.baseline)}" if verdict.baseline is not None else "")
    )
