"""`llmcompress score` and `llmcompress plan`."""

from pathlib import Path
from typing import Any

import click

from llmcompress.cli.options import pick_device, read_recipe, recipe_options, speaking
from llmcompress.cli.say import Speaker, megabytes


@click.command("score")
@click.argument("model")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Where to write scores.json.")
@click.option("--scorer", "scorers", multiple=True, help="Repeatable. Default: the recipe's.")
@recipe_options
@speaking
def score_command(model: str, output: Path | None, scorers: tuple[str, ...], speaker: Speaker, **flags: Any) -> None:
    """Score the linears of MODEL: what each candidate width is expected to cost."""
    recipe = read_recipe(flags["recipe"], flags["changes"], flags["calibration"], flags["seed"])
    found = _score(model, recipe, flags["device"], speaker, scorers)
    for scores in found.scores:
        _tell_scores(scores, speaker)
    if output is not None:
        _write(output, found, speaker)
    speaker.result(found.model_dump(mode="json"))


def _score(model: str, recipe: Any, device: str | None, speaker: Speaker, scorers: tuple[str, ...] = ()) -> Any:
    from llmcompress.compress.scoring import SCORERS
    from llmcompress.model.hub import resolve
    from llmcompress.plugins import find

    source = resolve(model)
    names = scorers or (recipe.scorer,)
    for name in names:
        find(SCORERS, name)
    from llmcompress.compress.pipeline import score_file

    speaker.talk(f"scoring {source.name} with {', '.join(names)} ...")
    return score_file(source, recipe, pick_device(device), names)


def _write(output: Path, value: Any, speaker: Speaker) -> None:
    from llmcompress.files import commit_json

    commit_json(output, value.model_dump(mode="json"))
    speaker.talk(f"written to {output}")


def _tell_scores(scores: Any, speaker: Speaker) -> None:
    widths = sorted({c.spec.bits for layer in scores.layers for c in layer.candidates})
    rows = []
    for layer in scores.layers:
        damages = {c.spec.bits: c.damage for c in layer.candidates}
        first = [] if layer.importance is None else [f"{layer.importance:.4g}"]
        rows.append([layer.linear, *first, *(f"{damages[b]:.3g}" if b in damages else "-" for b in widths)])
    has = any(layer.importance is not None for layer in scores.layers)
    columns = ["linear", *(["importance"] if has else []), *(f"{bits} bits" for bits in widths)]
    speaker.table(f"{scores.scorer}: expected damage, {scores.unit}", columns, rows)


@click.command("plan")
@click.argument("model")
@click.option("--budget", required=True, help="As for quantize.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Where to write the allocation.")
@click.option("--frontier", is_flag=True, help="Also print bits against expected damage over the whole range.")
@recipe_options
@speaking
def plan_command(model: str, budget: str, output: Path | None, frontier: bool, speaker: Speaker, **flags: Any) -> None:
    """Spend a budget: decide the width of every linear of MODEL, or of a scores.json."""
    from llmcompress.compress.allocate.budget import parse_budget

    spent = parse_budget(budget)
    found = _scores_of(model, flags, speaker)
    allocation = _spend(found, spent)
    _tell_allocation(found, allocation, speaker)
    document = {"allocation": allocation.model_dump(mode="json")}
    if frontier:
        document["frontier"] = _frontier(found, speaker)
    if output is not None:
        _write(output, allocation, speaker)
    speaker.result(document)


def _scores_of(model: str, flags: dict[str, Any], speaker: Speaker) -> Any:
    from llmcompress.types import ScoreFile

    path = Path(model)
    if path.suffix == ".json" and path.is_file():
        return ScoreFile.parse(path.read_bytes(), path.name)
    recipe = read_recipe(flags["recipe"], flags["changes"], flags["calibration"], flags["seed"])
    return _score(model, recipe, flags["device"], speaker)


def _spend(found: Any, budget: Any) -> Any:
    from llmcompress.compress.allocate.spend import spend

    widths = {x.name: (x.rows, x.columns) for x in found.trace.linears}

    def file_bytes(specs: Any) -> int:
        return int(found.other_bytes + sum(spec.storage_bits(*widths[name]) for name, spec in specs.items()) // 8)

    return spend(found.trace, found.scores[0], budget, group_size=found.group_size, file_bytes=file_bytes)


def _tell_allocation(found: Any, allocation: Any, speaker: Speaker) -> None:
    specs = {a.linear: a.spec for a in allocation.assigned}
    for block in found.trace.blocks:
        units: dict[str, list[Any]] = {}
        for linear in block.linears:
            units.setdefault(linear.unit, []).append(linear)
        parts = []
        for members in units.values():
            spec = specs.get(members[0].name)
            names = "+".join(linear.name.rsplit(".", 1)[-1] for linear in members)
            parts.append(f"{names} {spec.bits if spec else 'kept'}")
        if not speaker.json:
            speaker.result(None, [f"{block.name}  " + "  ".join(parts)])
    proof = "optimal" if allocation.status == "optimal" else f"within {allocation.gap:.2%} of optimal"
    if not speaker.json:
        speaker.result(
            None,
            [
                f"linears {allocation.bits_per_weight:.4f} bits per weight, checkpoint "
                f"{allocation.file_bits_per_weight:.4f}, {megabytes(allocation.file_bytes)}; "
                f"expected damage {allocation.expected_damage:.4g} {found.scores[0].unit}; {proof}",
                *([f"under the budget: {allocation.under_budget_reason}"] if allocation.under_budget_reason else []),
            ],
        )


def _frontier(found: Any, speaker: Speaker) -> list[dict[str, float]]:
    from llmcompress.compress.allocate.budget import parse_budget
    from llmcompress.errors import InputError

    points: list[dict[str, float]] = []
    for tenths in range(20, 86, 5):
        try:
            allocation = _spend(found, parse_budget(f"{tenths / 10}bits"))
        except InputError:
            continue  # below the smallest formats
        point = {"bits_per_weight": allocation.bits_per_weight, "expected_damage": allocation.expected_damage}
        if not points or point != points[-1]:
            points.append(point)
    rows = [[f"{p['bits_per_weight']:.4f}", f"{p['expected_damage']:.4g}"] for p in points]
    speaker.table("frontier", ["bits per weight", f"expected damage, {found.scores[0].unit}"], rows)
    return points
