"""The parts of a page that single tokens, blocks of the running model and sampling fill."""

from llmcompress.eval.facts import Choice, TokenFacts, WorstToken
from llmcompress.eval.report import EvalReport
from llmcompress.pages.figures import fixed, percent, plain, with_interval
from llmcompress.pages.reading import Run
from llmcompress.pages.sections import Section
from llmcompress.pictures.curves import Axes, Point, curve
from llmcompress.pictures.histogram import histogram
from llmcompress.pictures.html import Html, el, join, table
from llmcompress.pictures.page import Figure, shown
from llmcompress.pictures.trajectory import breakpoints, path_of
from llmcompress.pictures.words import megabytes, number, shorten

NATS = "nats/token"


def distribution(run: Run) -> Section | None:
    """How the divergence is spread over tokens, and what it does to the likeliest ones."""
    if run.report is None or run.report.tokens is None:
        return None
    facts = run.report.tokens
    return Section("tokens", "Token by token", join([*_histogram(facts, run.name), _flips(facts), _top(facts)]))


def _histogram(facts: TokenFacts, name: str) -> list[Html]:
    found = facts.kld_histogram
    if not any(found.counts):
        return []
    beside = f", {found.below:,} below and {found.above:,} above" if found.below or found.above else ""
    known = [(q.share, q.value) for q in facts.kld_quantiles if q.value is not None]
    svg = histogram(
        found.edges,
        found.counts,
        title=f"KL divergence of single tokens, {shorten(name, 44)}",
        facts=f"{sum(found.counts):,} tokens{beside}; upright lines: quantiles",
        unit="KL, nats",
        marks=[("median" if share == 0.5 else f"{100 * share:g} %", value) for share, value in known],
    )
    rows = [
        [f"{found.edges[k]:.3g} to {found.edges[k + 1]:.3g}", f"{count:,}"]
        for k, count in enumerate(found.counts)
        if count
    ]
    rows += [["below", f"{found.below:,}"], ["above", f"{found.above:,}"], ["not finite", f"{found.not_finite:,}"]]
    rows += [[f"{100 * share:g} % at or below", plain(value)] for share, value in known]
    return [shown(Figure("tokens", svg, ["KL, nats", "tokens"], rows))]


def _flips(facts: TokenFacts) -> Html:
    flips = facts.flips
    rows = [
        ["changed", percent(flips.changed, 2)],
        ["from right to wrong", percent(flips.right_to_wrong, 2)],
        ["from wrong to right", percent(flips.wrong_to_right, 2)],
        ["from wrong to another wrong", percent(flips.wrong_to_wrong, 2)],
        ["right, reference", percent(flips.accuracy_reference, 2)],
        ["right, this model", percent(flips.accuracy_candidate, 2)],
    ]
    words = f"Held against the token that really follows, {flips.tokens:,} tokens."
    head = el("h3", "What becomes of the likeliest token")
    return join([head, el("p", words, class_="soft small"), table(["likeliest token", "share"], rows)])


def _top(facts: TokenFacts) -> Html:
    if not facts.top:
        return Html("")
    rows = [[f"top {top.k}", percent(top.overlap), with_interval(top.kld, 5)] for top in facts.top]
    columns = ["reference's likeliest", "shared by both", "KL among them, nats"]
    return join([el("h3", "The head of the distribution"), table(columns, rows)])


def positions(run: Run) -> Section | None:
    """KL along the text."""
    if run.report is None or run.report.tokens is None:
        return None
    bins = [b for b in run.report.tokens.kld_by_position if b.kld is not None]
    if len(bins) < 2:
        return None
    points = [Point((b.first + b.last) / 2, b.kld or 0.0) for b in bins]
    axes = Axes(
        title=f"KL by position in the text, {shorten(run.name, 44)}",
        facts=f"means over bins of positions, {run.report.data.sequences} sequences",
        across="position of the token",
        up=f"KL, {NATS}",
    )
    rows = [[f"{b.first} to {b.last}", f"{b.tokens:,}", plain(b.kld)] for b in bins]
    figure = Figure("positions", curve(points, axes), ["positions", "tokens", "KL, nats/token"], rows)
    return Section("positions", "Along the text", shown(figure))


def hidden_states(run: Run) -> Section | None:
    """How far the hidden states have drifted where they leave each block."""
    found = () if run.report is None else run.report.trajectory
    known = [e for e in found if e.relative_error is not None]
    if len(known) < 2:
        return None
    series = [s for scores in (run.scores.scores if run.scores else ()) for s in scores.series]
    path = path_of(series)
    turns = [(float(k - 1), str(k - 1)) for k in breakpoints(path)] if path else []
    axes = Axes(
        title=f"Drift of the hidden states, {shorten(run.name, 44)}",
        facts="|difference| / |reference| where states leave a block; -1 is the embedding"
        + ("; upright lines: breakpoints of the trajectory" if turns else ""),
        across="block",
        up="relative error",
    )
    drift = curve([Point(float(e.block), e.relative_error or 0.0) for e in known], axes, rules=turns)
    rows = [[str(e.block), plain(e.relative_error), fixed(e.cosine, 6)] for e in found]
    figure = Figure("drift", drift, ["block", "relative error", "cosine"], rows)
    return Section("drift", "Drift of the hidden states", shown(figure))


def costs(run: Run) -> Section | None:
    """What a block of either model took while they were compared."""
    found = () if run.report is None else run.report.costs
    known = [cost for cost in found if cost.candidate_seconds is not None]
    if len(known) < 2:
        return None
    axes = Axes(
        title=f"Time of each block, {shorten(run.name, 44)}",
        facts="reading a block of this model and passing the whole text through it; the reference's is in the table",
        across="block",
        up="seconds",
    )
    points = [Point(float(cost.block), cost.candidate_seconds or 0.0) for cost in known]
    rows = [
        [str(c.block), _seconds(c.reference_seconds), _seconds(c.candidate_seconds), _size(c.resident_bytes)]
        for c in found
    ]
    heads = ["block", "reference, seconds", "this model, seconds", "memory of the process"]
    return Section("costs", "Time and memory of the blocks", shown(Figure("costs", curve(points, axes), heads, rows)))


def _seconds(value: float | None) -> str:
    return "" if value is None else fixed(value, 3)


def _size(value: int | None) -> str:
    return "" if value is None else megabytes(value)


def worst(run: Run) -> Section | None:
    """The tokens at which the two models differ most, in their context."""
    if run.report is None or run.report.tokens is None or not run.report.tokens.worst:
        return None
    items = [el("li", _place(one)) for one in run.report.tokens.worst]
    lead = "Where the two models differ most. Underlined: the token that really follows. Line ends and tabs are drawn."
    return Section("worst", "The worst tokens", join([el("p", lead, class_="soft"), el("ol", *items, class_="worst")]))


def _place(one: WorstToken) -> Html:
    following = Html("") if one.following is None else el("mark", one.following)
    where = f"KL {plain(one.kld, 3)} nats, sequence {one.sequence}, position {one.position}"
    beliefs = [
        el("div", el("dt", side), el("dd", *_choices(choices)))
        for side, choices in (("reference", one.reference), ("this model", one.candidate))
    ]
    return join([
        el("p", where, class_="soft small"),
        el("pre", one.before, following),
        el("dl", *beliefs, class_="beliefs small"),
    ])  # fmt: skip


def _choices(choices: tuple[Choice, ...]) -> list[Html]:
    return [el("span", el("code", c.text), f" {percent(c.probability, 0)}", class_="choice") for c in choices]


def sampling(run: Run) -> Section | None:
    """What the difference comes to when text is sampled."""
    found = None if run.report is None else run.report.sampling
    if run.report is None or found is None:
        return None
    return Section("sampling", "Sampling", join([*_temperatures(run.report, run.name), *_continuations(run.report)]))


def _temperatures(report: EvalReport, name: str) -> list[Html]:
    tempered = [] if report.sampling is None else [t for t in report.sampling.temperatures if t.kld.mean is not None]
    if len(tempered) < 2:
        return []
    points = [Point(t.temperature, t.kld.mean or 0.0, t.kld.low, t.kld.high) for t in tempered]
    axes = Axes(
        title=f"KL by temperature, {shorten(name, 44)}",
        facts="of the distributions that tokens are drawn from; band: 95 % interval",
        across="temperature",
        up=f"KL, {NATS}",
    )
    rows = [[number(t.temperature), with_interval(t.kld, 5)] for t in tempered]
    return [shown(Figure("temperatures", curve(points, axes), ["temperature", "KL, nats/token"], rows))]


def _continuations(report: EvalReport) -> list[Html]:
    found = () if report.sampling is None else report.sampling.continuations
    if not found:
        return []
    rows = [
        [str(c.new_tokens), f"{c.prompts} of {c.prompt_tokens} tokens", percent(c.identical),
         with_interval(c.first_divergence, 1), with_interval(c.repetition_reference, 3),
         with_interval(c.repetition_candidate, 3)]
        for c in found
    ]  # fmt: skip
    columns = ["new tokens", "prompts", "equal", "first difference at", "repetition, reference", "this model"]
    return [el("h3", "Greedy continuations of the same prompts"), table(columns, rows)]
