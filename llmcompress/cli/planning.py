"""`llmcompress plan`: decide the width of every linear, from a model or from its scores alone."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from llmcompress.cli.drawing import (
    measured_word,
    plan_figures,
    say_lines,
    say_table,
    terminal_bars,
    write_pictures,
)
from llmcompress.cli.options import (
    RUNTIME,
    check_place,
    find_model,
    given,
    keep_apart,
    pick_device,
    read_recipe,
    recipe_options,
    speaking,
    trusting,
)
from llmcompress.cli.runtimes import document_of, openings, tell_runtimes
from llmcompress.cli.say import Speaker, dropping_lines, megabytes
from llmcompress.cli.scoring import PICTURES, write_json

SCORES = click.option(
    "--scores",
    "scores_path",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Take the scores from this scores.json instead of scoring, if they fit model, text and settings.",
)


@dataclass(frozen=True)
class _Case:
    """The desk to decide at, how its scores were found, the decision, and a way to measure where there is a model.

    `options` are what the quantizer was told, as far as it is known.
    """

    desk: Any
    chosen: str
    decide: Callable[[Any], Any]
    options: Any
    measure: Callable[[list[Any]], list[float]] | None = None


@click.command("plan")
@click.argument("model")
@click.option("--budget", required=True, help="3.5bits, 3.5bits/file, 4.2GB, 300MiB, 'kld<=0.05' or 'ppl<=+2%'.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Where to write plan.json.")
@click.option("--scorer", help="Whose scores to plan by. Default: the first in nats/token, or the recipe's.")
@SCORES
@click.option("--frontier", is_flag=True, help="Also print bits against damage over the whole range of sizes.")
@RUNTIME
@PICTURES
@recipe_options
@trusting
@speaking
def plan_command(model: str, budget: str, output: Path | None, frontier: bool, speaker: Speaker, **flags: Any) -> None:
    """Spend a budget: decide the width of every linear of MODEL, or of a scores.json.

    With a MODEL the plan is the one quantize would carry out, trials and all. From a scores.json it is the program's
    own answer, in a second; measured damage, that of --frontier and limits such as 'kld<=0.05', needs the model.
    """
    from llmcompress.compress.allocate.budget import parse_budget
    from llmcompress.compress.decide import plan_file

    check_place(output)
    keep_apart(output, Path(model), flags["scores_path"])
    spent = parse_budget(budget)
    case = _from_file(model, flags) if _is_file(model) else _from_model(model, spent, flags, frontier, speaker=speaker)
    allocation = case.decide(spent)
    points = _frontier(case, speaker) if frontier else []
    _tell(case, allocation, speaker)
    opened_by = openings(case.desk.trace, allocation, case.options)
    tell_runtimes(opened_by, speaker)
    if frontier:
        _tell_frontier(case, points, speaker)
    document = plan_file(case.desk, allocation, points)
    if output is not None:
        write_json(output, document, speaker)
    if flags["pictures"] is not None:
        figures = plan_figures(case.desk, allocation, points)
        write_pictures(flags["pictures"], f"Plan for {case.desk.model}, {budget}", figures, speaker)
    if speaker.json:
        speaker.result({**_answer(allocation, document, frontier), "runtimes": document_of(opened_by)})


def _answer(allocation: Any, document: Any, frontier: bool) -> dict[str, Any]:
    found = document.model_dump(mode="json")
    answer = {"allocation": allocation.model_dump(mode="json")}
    return answer | {key: found[key] for key in ("model", "scorer", "unit", *(["frontier"] if frontier else []))}


def _is_file(model: str) -> bool:
    """Whether MODEL means a score file. Raises InputError for one that is not there."""
    from llmcompress.errors import InputError

    path = Path(model)
    if path.suffix != ".json" or path.is_dir():
        return False
    if not path.is_file():
        raise InputError(f"{model}: no such file", "make it with `llmcompress score MODEL -o scores.json`")
    return True


def read_scores(path: Path) -> Any:
    """A score file. Raises InputError naming the place where it is damaged."""
    from llmcompress.compress.decide import check_scores
    from llmcompress.files import read_small
    from llmcompress.types import ScoreFile

    file = ScoreFile.parse(read_small(path), path.name)
    check_scores(file)
    return file


def _from_file(model: str, flags: dict[str, Any]) -> _Case:
    from llmcompress.compress.decide import pick
    from llmcompress.errors import InputError
    from llmcompress.types import QuantizerOptions

    if flags["scores_path"] is not None:
        raise InputError("--scores goes with a model, not with a score file", "give one of the two")
    if (word := given("calibration", "seed")) is not None:
        raise InputError(f"{word}: nothing is scored where scores are given", "leave it out, or give the model")
    file = read_scores(Path(model))
    scores = pick(file, flags["scorer"])
    desk = _desk(file, scores, flags["runtime"] or "any")
    others = [x.scorer for x in file.scores if x is not scores]
    if flags["scorer"] or not others:
        return _Case(desk, "", _by_scores(desk, flags), QuantizerOptions())
    why = f"the first in {scores.unit}" if scores.unit == "nats/token" else "the first"
    chosen = f"{why}; --scorer takes {', '.join(dict.fromkeys(others))} instead"
    return _Case(desk, chosen, _by_scores(desk, flags), QuantizerOptions())


def _desk(file: Any, scores: Any, runtime: str) -> Any:
    """The desk of a score file, with the formats that a runtime takes. Raises InputError where it takes none."""
    from llmcompress.compress.decide import desk_of
    from llmcompress.runtimes.aim import ANY, fitting

    desk = desk_of(file, scores)
    if runtime == ANY:
        return desk
    scored = {x.linear: tuple(c.spec for c in x.candidates) for x in scores.layers if x.candidates}
    return replace(desk, candidates=fitting(runtime, file.trace, scored))


def _by_scores(desk: Any, flags: dict[str, Any]) -> Callable[[Any], Any]:
    """The decision without a model: an exact program on the scores. Raises InputError for settings it cannot keep."""
    from llmcompress.compress.decide import decide
    from llmcompress.errors import InputError

    others = [c for c in flags["changes"] if not c.strip().startswith("plan.program")]
    if others:
        raise InputError(
            f"--set {others[0]}: a score file was made with its own settings", "score again, or plan the model itself"
        )
    program = read_recipe(flags["recipe"], flags["changes"], None, None).plan.program
    if program in ("quadratic", "ratio"):
        raise InputError(f"the {program} program measures interactions, which needs the model", "give the model")
    from llmcompress.compress.allocate.spend import integer_program
    from llmcompress.runtimes.aim import advising, promised
    from llmcompress.runtimes.answers import planned
    from llmcompress.types import QuantizerOptions

    def spend(budget: Any) -> Any:
        runtime = flags["runtime"] or "any"
        with advising(runtime):
            allocation = decide(desk, budget, _ordered(desk) if program == "order" else integer_program)
        specs = {assigned.linear: assigned.spec for assigned in allocation.assigned}
        promised(runtime, planned(desk.trace, specs, QuantizerOptions()))
        return allocation

    return spend


def _ordered(desk: Any) -> Any:
    from llmcompress.compress.programs import block_order

    return block_order(desk.trace, desk.scores)


def _from_model(model: str, budget: Any, flags: dict[str, Any], frontier: bool, *, speaker: Speaker) -> _Case:
    words = (flags["recipe"], flags["changes"], flags["calibration"], flags["seed"])
    recipe = read_recipe(*words, runtime=flags["runtime"])
    if flags["scorer"] is not None:
        recipe = recipe.model_copy(update={"scorer": flags["scorer"]})
    given = None if flags["scores_path"] is None else read_scores(flags["scores_path"])
    source = find_model(model)
    from llmcompress.compress import pipeline, planning
    from llmcompress.compress.decide import Desk
    from llmcompress.compress.forecast import unread
    from llmcompress.compress.joint import dropped
    from llmcompress.compress.reuse import expected, reuse
    from llmcompress.errors import InputError

    reads = pipeline.needs_data(recipe)
    whole_file = budget.whole_file
    opened = pipeline.open_model(source, recipe, pick_device(flags["device"]), whole_file=whole_file)
    batches = pipeline.calibration(opened, recipe) if reads or frontier else pipeline.NO_DATA
    if given is not None and recipe.plan.voids:
        raise InputError("plan.voids scores the model it leaves, too", "leave --scores out")
    context = click.get_current_context()
    opened, left, dropping = context.with_resource(dropped(opened, recipe, batches, budget))
    said = [] if dropping is None else dropping_lines(dropping)
    for line in (*said, *([] if frontier else unread(recipe))):
        speaker.talk(line)
    opened = context.with_resource(pipeline.rewritten(opened, recipe, batches, whole_file=whole_file))
    if given is None:
        speaker.talk(f"scoring {source.name} with {recipe.scorer} ...")
        scores = pipeline.score(opened, recipe, batches, opened.digest())
    else:
        scores = reuse(given, recipe.scorer, expected(recipe, batches, opened.digest()))
    size, file_bytes = recipe.plan.group_size, opened.shards.file_bytes
    desk = Desk(source.name, opened.trace, scores, size, file_bytes, opened.candidates, opened.kept)

    def decide(spent: Any) -> Any:
        return planning.make_plan(opened, recipe, batches, scores, left if spent == budget else spent).allocation

    def measure(found: list[Any]) -> list[float]:
        return planning.measured_frontier(opened, recipe, batches, found)

    return _Case(desk, "", decide, recipe.quantize, measure)


def _frontier(case: _Case, speaker: Speaker) -> list[Any]:
    from llmcompress.compress.decide import frontier, point_of

    found = frontier(case.desk)
    if case.measure is None:
        return [point_of(allocation) for allocation in found]
    speaker.talk(f"measuring {len(found)} allocations ...")
    return [point_of(a, kld) for a, kld in zip(found, case.measure(found), strict=True)]


def _tell(case: _Case, allocation: Any, speaker: Speaker) -> None:
    from llmcompress.pictures.terminal import heat_map_lines

    scores = case.desk.scores
    proof = "least possible" if allocation.status == "optimal" else f"within {allocation.gap:.2%} of the least possible"
    lines = [
        *heat_map_lines(case.desk.trace, allocation, bars=terminal_bars(speaker)),
        "",
        f"scorer      {scores.scorer}, {scores.unit}" + (f" ({case.chosen})" if case.chosen else ""),
        f"linears     {allocation.bits_per_weight:.4f} bits per weight, codes, scales and shapes counted",
        f"checkpoint  {allocation.file_bits_per_weight:.4f} bits per weight, {megabytes(allocation.file_bytes)}",
        f"damage      {allocation.expected_damage:.4g} {scores.unit} expected, {proof}",
    ]
    if allocation.under_budget_reason:
        lines.append(f"under the budget: {allocation.under_budget_reason}")
    for facts, what in ((allocation.kept, "left at the source precision"), (allocation.fallbacks, "adjusted")):
        reasons: dict[str, list[str]] = {}
        for fact in facts:
            reasons.setdefault(fact.reason, []).append(fact.linear if hasattr(fact, "linear") else fact.where)
        for reason, names in reasons.items():
            more = ", ..." if len(names) > 1 else ""
            lines.append(f"{len(names)} linear(s) {what}: {reason} ({names[0]}{more})")
    lines += [case.desk.trace.untraced] if case.desk.trace.untraced else []
    say_lines(speaker, lines)


def _tell_frontier(case: _Case, points: list[Any], speaker: Speaker) -> None:
    rows = [
        [f"{p.bits_per_weight:.4f}", f"{p.file_bits_per_weight:.4f}", megabytes(p.file_bytes),
         f"{p.expected_damage:.4g}", measured_word(p)]
        for p in points
    ]  # fmt: skip
    unit = case.desk.scores.unit
    columns = ["bits per weight", "checkpoint", "size", f"expected, {unit}", "measured KL, nats/token"]
    say_lines(speaker, [""])
    say_table(speaker, "frontier", columns, rows)
    if case.measure is None:
        say_lines(speaker, ["measured damage needs the model: llmcompress plan MODEL --scores FILE --frontier"])
