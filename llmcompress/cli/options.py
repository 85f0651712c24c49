"""Options several commands share."""

from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import click

from llmcompress.cli.say import Speaker, open_log

Command = Callable[..., Any]
RUNTIMES = ("transformers", "vllm", "sglang", "llamacpp", "bnb", "gptqmodel")
RUNTIME = click.option(
    "--runtime",
    type=click.Choice(RUNTIMES),
    help="Plan only what this program runs packed, or what an export carries over exactly. Default: any.",
)


def speaking(function: Command) -> Command:
    """Add --json, -q, -v and --log-file, and hand the command a Speaker."""

    @click.option("--json", "as_json", is_flag=True, help="Exactly one JSON document on stdout.")
    @click.option("-q", "--quiet", is_flag=True, help="No talk on stderr.")
    @click.option("-v", "--verbose", is_flag=True, help="More talk on stderr.")
    @click.option("--log-file", type=click.Path(dir_okay=False, path_type=Path), help="Write a log here.")
    @wraps(function)
    def with_speaker(*args: Any, as_json: bool, quiet: bool, verbose: bool, log_file: Path | None, **rest: Any) -> Any:
        open_log(log_file)
        return function(*args, speaker=Speaker(json=as_json, quiet=quiet, verbose=verbose), **rest)

    return with_speaker


def recipe_options(function: Command) -> Command:
    """Add --recipe, --set, --calibration, --seed and --device."""
    for option in (
        click.option("--device", default=None, envvar="LLMCOMPRESS_DEVICE", help="cpu or cuda. Default: cpu."),
        click.option("--seed", type=click.IntRange(0), default=None, envvar="LLMCOMPRESS_SEED", help="Default: 0."),
        click.option(
            "--calibration",
            metavar="SPEC",
            default=None,
            envvar="LLMCOMPRESS_CALIBRATION",
            help="builtin, self, a text file, or org/name[:split[:column]]. Default: the recipe's.",
        ),
        click.option("--set", "changes", metavar="KEY=VALUE", multiple=True, help="Change one key of the recipe."),
        click.option(
            "--recipe",
            metavar="NAME|FILE",
            default="balanced",
            envvar="LLMCOMPRESS_RECIPE",
            show_default=True,
            help="A ready-made recipe (`llmcompress list recipes`) or a YAML file.",
        ),
    ):
        function = option(function)
    return function


MEMORY = click.option(
    "--max-memory",
    metavar="SIZE",
    help="Keep to about so much, as 2GB: hidden states go to files, then batches shrink.",
)


def memory_of(text: str | None) -> int | None:
    """`--max-memory` in bytes, None where it was not given. Raises InputError."""
    from llmcompress.compress.allocate.budget import parse_size

    return None if text is None else parse_size(text, "--max-memory")


def read_recipe(
    recipe: str, changes: tuple[str, ...], calibration: str | None, seed: int | None, *, runtime: str | None = None
) -> Any:
    """The recipe with the flags laid over it. Raises InputError."""
    from llmcompress.recipes import load_recipe

    found = load_recipe(recipe, changes if runtime is None else (*changes, f"plan.runtime={runtime}"))
    if calibration is not None:
        part = found.calibration.model_copy(update={"source": calibration})
        found = found.model_copy(update={"calibration": part})
    return found if seed is None else found.model_copy(update={"seed": seed})


def find_model(model: str, *, packed: bool = False) -> Any:
    """MODEL on this machine, looked over before any library that could open it is imported. Raises InputError.

    packed  it may be quantized already
    """
    from llmcompress.model.hub import resolve
    from llmcompress.preflight import check_source

    source = resolve(model)
    check_source(source.path, packed=packed)
    return source


def pick_device(device: str | None) -> str:
    """A device torch has here. Raises InputError."""
    import torch

    from llmcompress.errors import InputError

    try:
        kind = torch.device(device or "cpu").type
    except RuntimeError:
        raise InputError(f"--device {device}: no such device", "use cpu or cuda") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {device}: no CUDA device here", "leave --device out to use the CPU")
    if kind not in ("cpu", "cuda"):
        raise InputError(f"--device {device}: not supported", "use cpu or cuda")
    return device or "cpu"
