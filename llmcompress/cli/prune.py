"""`llmcompress prune`: find blocks, or halves of blocks, that do little, and write the model without them, or tied."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from llmcompress.cli.drawing import say_lines, say_table, terminal_bars, write_pictures
from llmcompress.cli.options import (
    MEMORY,
    Finite,
    Whole,
    batches_of,
    find_model,
    memory_of,
    pick_device,
    read_recipe,
    recipe_options,
    speaking,
    trusting,
    with_half,
)
from llmcompress.cli.say import Speaker, as_set, command_line, megabytes, path_word, step_line
from llmcompress.cli.scoring import PICTURES


@click.command("prune")
@click.argument("model")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where the result goes. Without it: only look.")
@click.option("--voids", is_flag=True, help="Rank blocks by the share of tokens they are a void for. The default.")
@click.option("--by", metavar="SCORER", help="Rank by another score (`llmcompress list scorers`), or kl: measured.")
@click.option("--sublayers", is_flag=True, help="Skip halves of blocks (attention or MLP) in place of blocks; --by kl.")
@click.option("--pairs", is_flag=True, help="With --sublayers: also try both halves of a block at once.")
@click.option("--blocks", type=Whole(1), help="How many blocks to remove.")
@click.option("--halves", type=Whole(1), help="How many halves to skip, with --sublayers.")
@click.option("--tie", type=Whole(2), metavar="N", help="Let groups of N neighbouring blocks share one weight.")
@click.option("--rank", type=Whole(0), default=0, help="With --tie: rank of each block's own corrections.")
@click.option("--groups", type=Whole(1), help="How many groups to tie, with --tie.")
@click.option("--keep", type=Finite(0, 1, min_open=True), help="Share of blocks or halves to keep, e.g. 0.8.")
@click.option("--max-kld", type=Finite(0), help="Remove what keeps the KL's upper 95 % bound within this.")
@click.option("--exclude", type=int, multiple=True, help="A block that stays. Repeatable.")
@click.option("--beam", type=Whole(1), default=3, show_default=True, help="Sets of each size that are grown.")
@click.option("--shortlist", type=Whole(1), default=12, show_default=True, help="Blocks tried for each set, by rank.")
@PICTURES
@recipe_options
@MEMORY
@click.option("--force", is_flag=True, help="Replace an existing output, atomically, once the new one is complete.")
@trusting
@speaking
def prune_command(model: str, speaker: Speaker, **flags: Any) -> None:
    """Remove blocks of MODEL, or halves of them, chosen by the KL divergence that removing them together measures.

    Without --blocks, --halves, --keep or --max-kld only what costs next to nothing goes (KL of at most 0.001). What is
    written opens in plain transformers, and is compared logit for logit with the model that passes those blocks over.
    Skipped halves are zeros there; llmcompress.load saves their computation and their memory.

    --tie 2 lets pairs of neighbouring blocks share one stored weight, with norms and low-rank corrections of their own.
    Only llmcompress.load opens that. What removing blocks for the same bytes would cost is measured beside it.
    """
    if flags["tie"] is not None:
        from llmcompress.cli.tying import tie_blocks

        tie_blocks(model, flags, speaker)
        return
    request = _request(model, flags)
    recipe = request.recipe
    ranked, finished = with_half(
        lambda size: _run(replace(request, recipe=batches_of(recipe, size)), speaker),
        recipe.calibration.batch_size,
        speaker,
    )
    if ranked is not None and not speaker.json:
        _tell_ranking(ranked, finished, speaker)
    if flags["pictures"] is not None and ranked is not None:
        _draw(request.source.name, ranked, flags["pictures"], speaker)
    _tell_result(request, finished, speaker)


def _run(request: Any, speaker: Speaker) -> tuple[Any, Any]:
    """Run it: the ranking, and what came of it."""
    from llmcompress.compress.prune.records import RemovalStep
    from llmcompress.compress.prune.run import Pruned, Ranked, prune

    ranked = finished = None
    for event in prune(request):
        match event:
            case str():
                speaker.talk(f"{event} ...")
            case Ranked():
                ranked = event
            case RemovalStep():
                speaker.talk(step_line(f"without {as_set(event.removed)}", event))
            case Pruned():
                finished = event
    return ranked, finished


def _request(model: str, flags: dict[str, Any]) -> Any:
    from llmcompress.errors import InputError

    if flags["groups"] is not None or flags["rank"]:
        raise InputError(f"--{'rank' if flags['rank'] else 'groups'} is about tied blocks", "give --tie 2 with it")
    sublayers = flags["sublayers"]
    count, other = ("halves", "blocks") if sublayers else ("blocks", "halves")
    if flags[other] is not None or (flags["pairs"] and not sublayers):
        hint = (
            "--blocks removes blocks; --sublayers --halves, halves of them, and --pairs tries both of a block at once"
        )
        raise InputError(f"--{other if flags[other] is not None else 'pairs'}: not what is searched", hint)
    if flags[count] is not None and flags["keep"] is not None:
        raise InputError(f"--{count} and --keep say the same thing twice", "give one of them")
    if flags["voids"] and flags["by"] not in (None, "voids"):
        raise InputError(f"--voids and --by {flags['by']} are two rankings", "give one of them")
    by = flags["by"] or ("kl" if sublayers and not flags["voids"] else "voids")
    if flags["pictures"] is not None and by != "voids":
        raise InputError("--pictures: only voids can be drawn", "rank by voids")
    recipe = read_recipe(flags["recipe"], flags["changes"], flags["calibration"], flags["seed"])
    source = find_model(model)
    from llmcompress.compress.prune.choose import Search
    from llmcompress.compress.prune.run import PruneRequest

    return PruneRequest(
        source=source,
        output=flags["output"],
        recipe=recipe,
        device=pick_device(flags["device"]),
        command=command_line(),
        by=by,
        count=flags[count],
        keep=flags["keep"],
        max_kld=flags["max_kld"],
        exclude=flags["exclude"],
        search=Search(flags["beam"], flags["shortlist"]),
        force=flags["force"],
        sublayers=sublayers,
        pairs=flags["pairs"],
        max_memory=memory_of(flags["max_memory"]),
    )


def _tell_ranking(ranked: Any, finished: Any, speaker: Speaker) -> None:
    from llmcompress.pictures.terminal import void_map_lines
    from llmcompress.pictures.voidmap import usage_of, void_words

    record = finished.record
    usage = usage_of(ranked.measured.series)
    if usage:
        title = "share of tokens for which a block is active"
        say_lines(speaker, [title, *void_map_lines(usage, bars=terminal_bars(speaker)), *void_words(usage), ""])
    names = _unit_names(record)
    single = {str(unit): kld for unit, kld in record.single.items()} | record.single_halves
    gone = {*map(str, record.removed), *record.halves}
    order = sorted(range(len(names)), key=lambda place: (ranked.importance[place], place))
    rows = [
        [
            names[place],
            f"{ranked.importance[place]:.4g}",
            f"{single[names[place]]:.5f}" if names[place] in single else "-",
            "removed" if {names[place], names[place].partition(".")[0]} & gone else "",
        ]
        for place in order
    ]
    what = "half" if len(names) > record.blocks else "block"
    title = f"{'halves' if what == 'half' else 'blocks'} by {record.by}, least important first"
    say_table(speaker, title, [what, record.by, "KL without it", ""], rows)


def _unit_names(record: Any) -> list[str]:
    """What was ranked: blocks, or the attention and the MLP of each."""
    blocks = [str(block) for block in range(record.blocks)]
    if len(record.importance) == record.blocks:
        return blocks
    return [f"{block}.{part}" for block in blocks for part in ("attn", "mlp")]


def _draw(name: str, ranked: Any, folder: Path, speaker: Speaker) -> None:
    from llmcompress.errors import InputError
    from llmcompress.pictures.figures import void_figures

    figures = void_figures("voids", ranked.measured.series, name)
    if not figures:
        raise InputError("--pictures: only voids can be drawn", "rank by voids")
    write_pictures(folder, f"Voids of {name}", figures, speaker)


def _tell_result(request: Any, finished: Any, speaker: Speaker) -> None:
    record, size = finished.record, finished.directory_bytes
    lines = [f"removed     {as_set(record.removed)} of {record.blocks} blocks"] if record.removed else []
    lines += [f"skipped     {as_set(record.halves)}, halves of blocks"] if record.halves else []
    if finished.nothing is None:
        lines.append(
            f"KL          {record.kld:.5f} ± {record.standard_error:.5f} nats/token over {record.sequences} sequences, "
            f"at most {record.upper:.5f} (95 %)"
        )
    else:
        lines += [f"nothing     {finished.nothing.what}", f"            {finished.nothing.hint}"]
    if size is not None:
        lines += [
            "verified    reopened, and its logits are those of the model with these blocks passed over",
            f"written to  {request.output}  ({megabytes(size)})",
            f"next        llmcompress quantize {path_word(request.output)} --budget 3.5bits",
        ]
    elif finished.nothing is None:
        lines.append("nothing was written; give -o to write the result")
    speaker.result({"output": request.output and request.output.name, **record.model_dump(mode="json")}, lines)
