"""`llmcompress score`: what each width of each linear is expected to cost."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from llmcompress.cli.crew import crewed, rank
from llmcompress.cli.drawing import say_lines, say_table, terminal_bars, write_pictures
from llmcompress.cli.options import (
    MEMORY,
    batches_of,
    check_place,
    find_model,
    memory_of,
    pick_device,
    read_recipe,
    recipe_options,
    speaking,
    trusting,
    with_half,
)
from llmcompress.cli.say import Speaker

PICTURES = click.option(
    "--pictures",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Write SVG pictures, and a page with all of them, into this folder.",
)


@click.command("score")
@click.argument("model")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Where to write scores.json.")
@click.option("--scorer", "scorers", multiple=True, help="Repeatable. Default: the recipe's.")
@PICTURES
@recipe_options
@MEMORY
@trusting
@crewed
@speaking
def score_command(model: str, output: Path | None, scorers: tuple[str, ...], speaker: Speaker, **flags: Any) -> None:
    """Score the linears of MODEL: what each candidate width is expected to cost.

    Prints the damage at one width in the middle, block by block; every width of every linear with -v.
    """
    check_place(output)
    recipe = read_recipe(flags["recipe"], flags["changes"], flags["calibration"], flags["seed"])
    found = _score(model, recipe, flags, speaker, scorers)
    if rank():
        return
    if output is not None:
        write_json(output, found, speaker)
    if flags["pictures"] is not None:
        from llmcompress.pictures.figures import score_figures

        write_pictures(flags["pictures"], f"Scores of {found.model}", score_figures(found), speaker)
    for scores in found.scores:
        _tell_scores(found.trace, scores, speaker)
    if speaker.json:
        speaker.result(found.model_dump(mode="json"))


def _score(model: str, recipe: Any, flags: dict[str, Any], speaker: Speaker, scorers: tuple[str, ...]) -> Any:
    limit, source = memory_of(flags["max_memory"]), find_model(model)
    from llmcompress.compress.scoring import SCORERS
    from llmcompress.plugins import find

    names = tuple(dict.fromkeys(scorers)) or (recipe.scorer,)
    for name in names:
        find(SCORERS, name)
    from llmcompress.compress.memory import kept_to, score_stages
    from llmcompress.compress.pipeline import Opened, score_file
    from llmcompress.model.crew import ALONE

    def fit(opened: Opened, recipe: Any, reads: bool) -> Any:
        recipe, said = kept_to(opened, recipe, limit, lambda r: score_stages(opened, r, names, reads=reads))
        if said:
            speaker.talk(said)
        return recipe

    speaker.talk(f"scoring {source.name} with {', '.join(names)} ...")
    where, size, crew = pick_device(flags["device"]), recipe.calibration.batch_size, flags["crew"] or ALONE
    return with_half(
        lambda n: score_file(source, batches_of(recipe, n), where, names, fit=fit, crew=crew), size, speaker, crew=crew
    )


def write_json(output: Path, value: Any, speaker: Speaker) -> None:
    """Write a noun as a stage file, and say so."""
    from llmcompress.files import commit_json

    commit_json(output, value.model_dump(mode="json"))
    speaker.talk(f"written to {output}")


def _tell_scores(trace: Any, scores: Any, speaker: Speaker) -> None:
    if speaker.json:
        return
    if speaker.verbose:
        _tell_every_width(scores, speaker)
    else:
        _tell_middle_width(trace, scores, speaker)
    _tell_series(trace, scores, speaker)


def _tell_every_width(scores: Any, speaker: Speaker) -> None:
    widths = sorted({c.spec.bits for layer in scores.layers for c in layer.candidates})
    has = any(layer.importance is not None for layer in scores.layers)
    rows = []
    for layer in scores.layers:
        damages = {c.spec.bits: c.damage for c in layer.candidates}
        first = [] if not has else ["-" if layer.importance is None else f"{layer.importance:.4g}"]
        rows.append([layer.linear, *first, *(f"{damages[b]:.3g}" if b in damages else "-" for b in widths)])
    columns = ["linear", *(["importance"] if has else []), *(f"{bits} bits" for bits in widths)]
    say_table(speaker, f"{scores.scorer}: expected damage, {scores.unit}", columns, rows)


def middle_width(scores: Any) -> int:
    """The candidate width nearest to the middle of all candidate widths, the smaller of two; 0 without candidates."""
    from statistics import median

    widths = sorted({c.spec.bits for layer in scores.layers for c in layer.candidates})
    return min(widths, key=lambda bits: (abs(bits - median(widths)), bits)) if widths else 0


def _tell_middle_width(trace: Any, scores: Any, speaker: Speaker) -> None:
    """A line for each block, a column for each kind of linear; one column where a block's linears are all alike."""
    from llmcompress.pictures.columns import columns_of

    bits, columns = middle_width(scores), columns_of(trace)
    known = {layer.linear: layer for layer in scores.layers}
    rows = []
    for block in trace.blocks:
        found: dict[str, list[Any]] = {kind: [] for kind in columns.kinds}
        for linear in block.linears:
            found[columns.kind_of[linear.name]] += [known[linear.name]] if linear.name in known else []
        rows.append([str(block.index), *(_damage(found[kind], bits) for kind in columns.kinds)])
    kinds = list(columns.kinds)
    if kinds and all(len(set(row[1:])) == 1 for row in rows):
        kinds, rows = ["each linear"], [row[:2] for row in rows]
    title = f"{scores.scorer}: expected damage at {bits} bits, {scores.unit} (every width with -v)"
    say_table(speaker, title, ["block", *kinds], rows)
    if trace.head is not None and trace.head.name in known:
        say_lines(speaker, [f"head {trace.head.name}: {_damage([known[trace.head.name]], bits)}", ""])


def _damage(layers: Sequence[Any], bits: int) -> str:
    """The damage of a linear, or of all experts together, at a width or at its own nearest, which is then named."""
    near = [min(x.candidates, key=lambda c: (abs(c.spec.bits - bits), c.spec.bits)) for x in layers if x.candidates]
    if not near:
        return "-"
    return f"{sum(c.damage for c in near):.3g}" + ("" if near[0].spec.bits == bits else f" at {near[0].spec.bits}")


def _tell_series(trace: Any, scores: Any, speaker: Speaker) -> None:
    """Figures per block or per point, those of one length in one table; usage and breakpoints also in words."""
    from llmcompress.pictures.terminal import void_map_lines
    from llmcompress.pictures.trajectory import breakpoint_words, path_of
    from llmcompress.pictures.voidmap import PREFIX, usage_of, void_words

    usage, path = usage_of(scores.series), path_of(scores.series)
    drawn = {PREFIX + phase for phase in usage}
    tables: dict[int, list[Any]] = {}
    for series in scores.series:
        variant = series.name.startswith("selected ") and not speaker.verbose
        if series.name not in drawn and not variant:
            tables.setdefault(len(series.values), []).append(series)
    blocks = len(trace.blocks)
    for length, group in tables.items():
        place = {blocks: "block", blocks + 1: "point"}.get(length, "number")
        rows = [[str(at), *(_figure(series.name, series.values[at]) for series in group)] for at in range(length)]
        say_table(speaker, f"{scores.scorer}, by {place}", [place, *(series.name for series in group)], rows)
    if usage:
        title = f"{scores.scorer}: share of tokens for which a block is active"
        say_lines(speaker, [title, *void_map_lines(usage, bars=terminal_bars(speaker)), *void_words(usage), ""])
    if path:
        say_lines(speaker, [breakpoint_words(path), ""])


def _figure(name: str, value: float) -> str:
    if name.partition(" ")[0] == "selected":
        return "yes" if value > 0 else "-"
    return f"{value:.4g}"
