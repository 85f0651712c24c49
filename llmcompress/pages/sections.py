"""The parts of a page about one run. A part is there when its data are, and None otherwise."""

from collections.abc import Mapping
from dataclasses import dataclass

from llmcompress.eval.report import EvalReport
from llmcompress.pages.figures import fixed, plain, with_interval
from llmcompress.pages.reading import Run
from llmcompress.pictures.columns import named_trace
from llmcompress.pictures.figures import (
    bits_figure,
    loss_figure,
    sensitivity_figure,
    trajectory_figures,
    void_figures,
)
from llmcompress.pictures.forest import Interval, forest
from llmcompress.pictures.html import Html, el, folded, join, table
from llmcompress.pictures.page import Figure, shown
from llmcompress.pictures.words import megabytes, number, shorten
from llmcompress.types import ModelTrace, Plan


@dataclass(frozen=True)
class Section:
    """One part: the word its address ends with, its heading, what is below it."""

    word: str
    title: str
    body: Html


def bits(run: Run) -> Section | None:
    """Which linear got how many bits."""
    if run.plan is None:
        return None
    trace = _trace(run, run.plan)
    if not trace.blocks:
        return None
    allocation = run.plan.allocation
    lead = (
        f"{allocation.bits_per_weight:.4f} bits per weight over the quantized linears, codes, scales and shapes "
        f"counted; asked for {shorten(allocation.budget, 60)}."
    )
    reasons: dict[str, int] = {}
    for reason in [*(x.reason for x in allocation.kept), *(x.reason for x in allocation.fallbacks)]:
        reasons[reason] = reasons.get(reason, 0) + 1
    if allocation.under_budget_reason:
        lead += f" Not closer to it: {allocation.under_budget_reason}."
    notes = [el("p", f"{count} linear(s): {reason}.", class_="soft small") for reason, count in reasons.items()]
    notes += [el("p", f"{trace.untraced}.", class_="soft small")] if trace.untraced else []
    body = join([el("p", lead), *notes, shown(bits_figure(trace, allocation, name=run.name))])
    return Section("bits", "Where the bits went", body)


def _trace(run: Run, plan: Plan) -> ModelTrace:
    """The trace that belongs to the plan, or what the names in it tell."""
    names = [a.linear for a in plan.allocation.assigned] + [x.linear for x in plan.allocation.kept]
    if run.scores is not None and {x.name for x in run.scores.trace.every} >= set(names):
        return run.scores.trace
    return named_trace(dict.fromkeys(names))


def sensitivity(run: Run) -> Section | None:
    """What each width of each kind of linear was expected to cost."""
    if run.scores is None or not any(layer.candidates for x in run.scores.scores for layer in x.layers):
        return None
    allocation = None if run.plan is None else run.plan.allocation
    figures = [
        sensitivity_figure(f"s{k}", run.scores.trace, scores, name=run.name, allocation=allocation)
        for k, scores in enumerate(run.scores.scores)
        if any(layer.candidates for layer in scores.layers)
    ]
    lead = "Damage expected of each width, before anything was quantized; the plan was made from these scores."
    return Section("sensitivity", "What each width would cost", join([el("p", lead), *map(shown, figures)]))


def trials(run: Run) -> Section | None:
    """The allocations that were measured before one was chosen."""
    if run.plan is None or not run.plan.trials:
        told = _feedback(run)
        return Section("trials", "What was tried", join(told)) if told else None
    found, taken = sorted(run.plan.trials, key=lambda trial: trial.measured_kld), run.plan.allocation
    same = [
        t.label
        for t in found
        if (t.bits_per_weight, t.expected_damage) == (taken.bits_per_weight, taken.expected_damage)
    ]
    chosen = f"; chosen: {shorten(same[0], 40)}" if same else ""
    rows = []
    for trial in found:
        reach = 1.96 * (trial.standard_error or 0.0)
        beside = f"{number(trial.measured_kld)} at {trial.bits_per_weight:.3f} bits"
        low, high = trial.measured_kld - reach, trial.measured_kld + reach
        rows.append(Interval(trial.label, trial.measured_kld, low, high, beside))
    svg = forest(
        rows,
        title=f"Allocations tried, {shorten(run.name, 44)}",
        facts=f"measured on calibration text, with 1.96 standard errors{chosen}",
        across="KL, nats/token",
    )
    cells = [
        [t.label, f"{t.bits_per_weight:.4f}", plain(t.expected_damage), plain(t.measured_kld),
         "-" if t.standard_error is None else plain(t.standard_error, 3)]
        for t in found
    ]  # fmt: skip
    columns = ["allocation", "bits per weight", "expected damage", "measured KL", "standard error"]
    lead = "Allocations within the budget, each carried out on calibration text."
    parts = [el("p", lead), shown(Figure("trials", svg, columns, cells))]
    return Section("trials", "What was tried", join([*parts, *_feedback(run)]))


def _feedback(run: Run) -> list[Html]:
    """The verdict on output-side feedback, where it was tried."""
    tried = None if run.plan is None else run.plan.output_feedback
    return [] if tried is None else [el("p", f"Tried besides: {tried.words}.")]


def structure(run: Run) -> Section | None:
    """The way of the hidden states, and the use of each block, where a scorer looked."""
    every = [series for scores in (run.scores.scores if run.scores else ()) for series in scores.series] + [*run.series]
    ways, uses = trajectory_figures("trajectory", every, run.name), void_figures("voids", every, run.name)
    if not ways and not uses:
        return None
    parts = [
        join([el("h3", title), *map(shown, figures)])
        for title, figures in (("The way of the hidden states", ways), ("The use of each block", uses))
        if figures
    ]
    return Section("structure", "Blocks that turn the states, blocks that do nothing", join(parts))


def losses(run: Run) -> Section | None:
    """The error of each linear where it was rounded."""
    shown_blocks = [block for block in run.blocks if block.linears]
    if not shown_blocks:
        return None
    lead = (
        "Squared error of the output over the squared output, for the inputs of calibration text; "
        "of the weights themselves where the quantizer looks at no text (rtn, hqq, nf4, fp4, fp8)."
    )
    fallbacks = [
        el("li", f"{shorten(x.where, 80)}: {shorten(x.reason, 200)}") for block in run.blocks for x in block.fallbacks
    ]
    reached = [x.tokens for block in run.blocks for x in block.linears if x.tokens is not None]
    if reached:
        none = sum(1 for tokens in reached if not tokens)
        lead += (
            f" Of {len(reached):,} linears of experts, {none:,} got no calibration token; the others got "
            f"{min((t for t in reached if t), default=0):,} to {max(reached):,}, those routed to their expert."
        )
    body = [el("p", lead), shown(loss_figure(shown_blocks, name=run.name))]
    if fallbacks:
        words = f"{len(fallbacks)} thing(s) could not be done as asked"
        body.append(folded(words, el("ul", *fallbacks, class_="small")))
    return Section("losses", "What rounding cost, linear by linear", join(body))


TASK_COLUMNS = ["task", "metric", "reference", "this model", "difference"]


def tasks(run: Run) -> Section | None:
    """Public tasks, both models side by side."""
    rows = [] if run.report is None else task_rows(run.report)
    if not rows:
        return None
    return Section("tasks", "Public tasks", table(TASK_COLUMNS, rows, caption="± is one standard error"))


def task_rows(report: EvalReport) -> list[list[str]]:
    """Every metric of every task as cells of `TASK_COLUMNS`."""
    rows = []
    for task, found in report.tasks.items():
        before = report.reference_tasks.get(task, {})
        for key, value in found.items():
            metric, _, form = key.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = f"{metric}_stderr,{form}"
            cells = [_score(before, key, error), _score(found, key, error), _change(before.get(key), value)]
            rows.append([task, metric, *cells])
    return rows


def _score(found: Mapping[str, float | str], key: str, error: str) -> str:
    value, spread = found.get(key), found.get(error)
    if not isinstance(value, int | float):
        return "-"
    return f"{value:.4f}" + (f" ± {spread:.4f}" if isinstance(spread, int | float) else "")


def _change(before: float | str | None, after: float) -> str:
    return f"{after - before:+.4f}" if isinstance(before, int | float) else "-"


def speed(run: Run) -> Section | None:
    """Tokens per second and memory, where they were measured."""
    if run.report is None or not run.report.speed:
        return None
    rows = [
        [s.side, str(s.batch), f"{s.prefill_tokens_per_second:,.0f}", f"{s.decode_tokens_per_second:,.1f}",
         megabytes(s.resident_bytes), "-" if s.peak_bytes is None else megabytes(s.peak_bytes), s.dtype, s.device]
        for s in run.report.speed
    ]  # fmt: skip
    columns = ["model", "batch", "prefill, tokens/s", "decode, tokens/s", "resident", "peak", "dtype", "device"]
    return Section("speed", "Speed and memory", table(columns, rows, caption="as users load it, on one machine"))


def provenance(run: Run) -> Section:
    """Environment, settings and digests: what somebody needs to make this again."""
    report, record = run.report, run.record
    rows: list[list[str]] = []
    if report is not None:
        rows += _evaluated(report)
    if run.plan is not None:
        plan = run.plan
        rows += [
            ["scores", plan.scorer],
            ["rounding", plan.quantizer],
            ["calibration", plan.calibration],
            ["calibration digest", plan.calibration_digest],
            ["seed", str(plan.seed)],
        ]
    if record:
        rows += [[f"quantized with {key}", str(value)] for key, value in _flat(record.get("environment")).items()]
        rows.append(["llmcompress", str(record.get("llmcompress", ""))])
    parts = [el("div", table(["fact", "value"], rows), class_="words")]
    for key, title in (("recipe", "Recipe"), ("request", "Request")):
        if found := _flat(record.get(key)):
            lines = [[name, str(value)] for name, value in found.items()]
            parts.append(folded(title, el("div", table(["key", "value"], lines), class_="words")))
    files = [[str(f.get(key)) for key in ("name", "size_bytes", "sha256")] for f in _files(record)]
    if files:
        parts.append(folded(f"Files, {len(files)}", table(["file", "bytes", "sha256"], files)))
    return Section("provenance", "How to make it again", join(parts))


def _evaluated(report: EvalReport) -> list[list[str]]:
    data = report.data
    words = [
        ["model", report.model.name, report.model.revision, report.model.model_digest],
        ["reference", report.ref.name, report.ref.revision, report.ref.model_digest],
    ]
    rows = [[str(side), ", ".join(w for w in rest if w)] for side, *rest in words]
    rows += [
        ["text", f"{data.source}, {data.sequences} sequences of {data.sequence_length} tokens, seed {data.seed}"],
        ["text digest", data.text_digest],
        ["tokens digest", data.tokens_digest],
        ["tokenizer digest", data.tokenizer_digest],
        ["evaluated", report.date],
    ]
    return rows + [[f"evaluated with {key}", value] for key, value in report.environment.items()]


def _flat(value: object, prefix: str = "") -> dict[str, object]:
    """Nested settings as dotted keys."""
    if not isinstance(value, dict):
        return {prefix: value} if prefix else {}
    found: dict[str, object] = {}
    for key, inner in value.items():
        found |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return found


def _files(record: Mapping[str, object]) -> list[dict[str, object]]:
    files = record.get("files")
    return [f for f in files if isinstance(f, dict)] if isinstance(files, list) else []


def summary(run: Run) -> Section | None:
    """Every headline figure with its interval."""
    if run.report is None:
        return None
    found = run.report.summary
    rows = [
        ["KL divergence, nats/token", with_interval(found.kld, 5)],
        *([f"KL, {100 * q.share:g} % of sequences at or below", fixed(q.value, 5)] for q in found.kld_quantiles),
        ["KL, the worst token", fixed(found.kld_largest_position, 3)],
        ["rise of the negative log-likelihood, nats/token", with_interval(found.dnll, 5)],
        ["perplexity, reference", fixed(found.perplexity_reference)],
        ["perplexity, this model", fixed(found.perplexity_candidate)],
        ["perplexity ratio", with_interval(found.perplexity_ratio)],
        ["same top-1 token", with_interval(found.top1)],
        ["design effect", "-" if found.design_effect is None else fixed(found.design_effect, 2)],
    ]
    caption = f"means over {run.report.data.sequences} sequences, {found.level:.0%} intervals".replace("%", " %")
    note = (
        "Intervals have the sequence as their unit, because the tokens of one sequence are not independent. The design "
        "effect is the variance of the mean KL over what independent tokens would give."
    )
    body = join([table(["figure", "value"], rows, caption=caption), el("p", note, class_="soft small")])
    return Section("figures", "All figures", body)
