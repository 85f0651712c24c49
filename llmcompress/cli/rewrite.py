"""`llmcompress rewrite`: the same model in a form that quantizes better, as a checkpoint of its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from llmcompress.cli.options import find_model, pick_device, read_recipe, recipe_options, speaking, trusting
from llmcompress.cli.say import Speaker, megabytes, path_word
from llmcompress.plugins import available, summary

REPARAM = "llmcompress.compress.reparam"
TYPED = "llmcompress.rewrites"


def _note(context: click.Context, option: click.Parameter, given: bool) -> None:
    if given:
        context.meta.setdefault(TYPED, []).append(option.name)


def method_flags(function: Callable[..., Any]) -> Callable[..., Any]:
    """A flag for every rewrite there is; the context remembers the order they were typed in."""
    for name in reversed(available(REPARAM)):
        help_ = summary(REPARAM, name).split(": ", 1)[-1]
        function = click.option(f"--{name}", is_flag=True, expose_value=False, callback=_note, help=help_)(function)
    return function


@click.command("rewrite")
@click.argument("model")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Where the new checkpoint goes.")
@method_flags
@recipe_options
@click.option("--force", is_flag=True, help="Replace an existing output, atomically, once the new one is complete.")
@trusting
@speaking
def rewrite_command(model: str, output: Path, speaker: Speaker, **flags: Any) -> None:
    """Rewrite MODEL without changing what it computes, in the order the flags are given.

    Options of a rewrite are keys of the recipe, e.g. --set rewrite.smooth.alpha=0.6. `quantize` does the same by itself
    where a recipe has rewrite.methods.
    """
    from llmcompress.errors import InputError

    methods = tuple(click.get_current_context().meta.get(TYPED, ()))
    recipe = read_recipe(flags["recipe"], flags["changes"], flags["calibration"], flags["seed"])
    if methods:
        recipe = recipe.model_copy(update={"rewrite": recipe.rewrite.model_copy(update={"methods": methods})})
    if not recipe.rewrite.methods:
        names = ", ".join(f"--{name}" for name in available(REPARAM))
        raise InputError("no rewrite was asked for", f"give one or more of {names}")
    source = find_model(model)
    from llmcompress.compress.pipeline import rewrite_model

    speaker.talk(f"rewriting {model} with {', '.join(recipe.rewrite.methods)} ...")
    record, size = rewrite_model(source, recipe, output, device=pick_device(flags["device"]), force=flags["force"])
    if not speaker.json:
        tell_rewriting(record, speaker)
    lines = [
        f"written to  {output}  ({megabytes(size)})",
        f"next        llmcompress quantize {path_word(output)} --budget 3.5bits",
    ]
    speaker.result({"output": output.name, **record.model_dump(mode="json")}, lines)


def tell_rewriting(record: Any, speaker: Speaker) -> None:
    """What was rewritten, what was not and why."""
    for method in record.methods:
        outcomes = [x for x in record.outcomes if x.method == method]
        sites, difference = sum(x.sites for x in outcomes), max(x.difference for x in outcomes)
        speaker.talk(f"  {method}: {sites} sites, output within {difference:.0e} of what it was in float64")
        reasons: dict[str, int] = {}
        for fallback in (f for x in outcomes for f in x.fallbacks):
            reasons[fallback.reason] = reasons.get(fallback.reason, 0) + 1
        for reason, count in reasons.items():
            speaker.talk(f"    {count} site(s) left as they were: {reason}")
        for note in dict.fromkeys(note for x in outcomes for note in x.notes):
            speaker.talk(f"    {note}")
    speaker.talk(f"  storing it in the source's dtype costs KL {record.storing_kld:.1e}")
