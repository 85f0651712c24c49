"""Options several commands share."""

import gc
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from llmcompress.cli.crew import rank
from llmcompress.cli.say import Speaker, open_log
from llmcompress.errors import InputError, MachineError, out_of_memory
from llmcompress.files import ALLOW_EXTERNAL, ALLOW_NONFINITE, LARGEST_NUMBER, read_json

Command = Callable[..., Any]
OURS = "llmcompress"  # reads whatever is planned: nobody has to plan for it
RUNTIMES = tuple(
    str(runtime["name"])  # of the table alone: the package beside it takes a tenth of a second to import
    for runtime in read_json(Path(__file__).parents[1] / "runtimes" / "runtimes.json")["runtimes"]
    if runtime["name"] != OURS
)
RUNTIME = click.option(
    "--runtime",
    type=click.Choice(RUNTIMES),
    help="Plan only what this program runs packed, or what an export carries over exactly. Default: any.",
)
Answer = TypeVar("Answer")


class Finite(click.FloatRange):
    """A range of numbers: nan lies in none, and infinity is no number to work with."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number. Raises what click raises for a wrong word."""
        found = float(super().convert(value, param, ctx))
        if not math.isfinite(found):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return found


class Whole(click.IntRange):
    """A range of whole numbers, none of them beyond what torch and numpy can count."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number. Raises what click raises for a wrong word."""
        found = int(super().convert(value, param, ctx))
        if abs(found) > LARGEST_NUMBER:
            self.fail(f"{value} is more than {LARGEST_NUMBER}.", param, ctx)
        return found


def speaking(function: Command) -> Command:
    """Add --json, -q, -v and --log-file, and hand the command a Speaker."""

    @click.option("--json", "as_json", is_flag=True, help="Exactly one JSON document on stdout.")
    @click.option("-q", "--quiet", is_flag=True, help="No talk on stderr.")
    @click.option("-v", "--verbose", is_flag=True, help="More talk on stderr.")
    @click.option("--log-file", type=click.Path(dir_okay=False, path_type=Path), help="Write a log here.")
    @wraps(function)
    def with_speaker(*args: Any, as_json: bool, quiet: bool, verbose: bool, log_file: Path | None, **rest: Any) -> Any:
        first = rank() == 0  # of several processes only one speaks
        open_log(log_file if first else None)
        speaker = Speaker(json=as_json, quiet=quiet or not first, verbose=verbose, silent=not first)
        return function(*args, speaker=speaker, **rest)

    return with_speaker


def trusting(function: Command) -> Command:
    """Add --allow-external-files and --allow-nonfinite, in force for the command and for what it starts."""

    @click.option("--allow-nonfinite", is_flag=True, help="Keep tensors with NaN or infinity, unquantized.")
    @wraps(function)
    def with_trust(*args: Any, allow_nonfinite: bool, **rest: Any) -> Any:
        with _allowing({ALLOW_NONFINITE: allow_nonfinite}):
            return function(*args, **rest)

    return following(with_trust)


def following(function: Command) -> Command:
    """Add --allow-external-files alone, for commands that open headers and no weights."""

    @click.option("--allow-external-files", is_flag=True, help="Follow links of the model that lead out of it.")
    @wraps(function)
    def with_links(*args: Any, allow_external_files: bool, **rest: Any) -> Any:
        with _allowing({ALLOW_EXTERNAL: allow_external_files}):
            return function(*args, **rest)

    return with_links


@contextmanager
def _allowing(wanted: dict[str, bool]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update({name: "1" for name, given in wanted.items() if given})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})


def with_half(call: Callable[[int], Answer], batch_size: int, speaker: Speaker, *, crew: Any = None) -> Answer:
    """What `call` answers for a batch size; for half of it where memory runs out the first time, in any process."""
    try:
        answer = call(batch_size)
        if crew is not None:
            crew.wait()
        return answer
    except (MemoryError, RuntimeError, MachineError) as error:
        if batch_size < 2 or not out_of_memory(error):
            raise
        if crew is not None:
            crew.meet_again(error)
    gc.collect()
    speaker.talk(f"warning: memory ran out: again with batches of {batch_size // 2}; last bits may differ")
    return call(batch_size // 2)


def batches_of(recipe: Any, size: int) -> Any:
    """The recipe with batches of so many sequences."""
    return recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update={"batch_size": size})})


def recipe_options(function: Command) -> Command:
    """Add --recipe, --set, --calibration, --seed and --device."""
    for option in (
        click.option("--device", default=None, envvar="LLMCOMPRESS_DEVICE", help="cpu or cuda. Default: cpu."),
        click.option("--seed", type=Whole(0), default=None, envvar="LLMCOMPRESS_SEED", help="Default: 0."),
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


def check_place(path: Path | None, *, made: bool = False) -> None:
    """A file that is written when all is done has a folder, before anything is. Raises InputError, MachineError.

    made  the folder, and those above it, will be made where they are missing
    """
    folder = None if path is None else path.absolute().parent
    while made and folder is not None and not folder.exists():
        folder = folder.parent
    if folder is None:
        return
    if not folder.is_dir():
        raise InputError(f"no such folder for the output: {folder}", "create it, or choose another name")
    if not os.access(folder, os.W_OK):
        raise MachineError(f"cannot write in {folder.name}", "check its permissions, or choose another name")


def keep_apart(output: Path | None, *read: Path | None) -> None:
    """What is written takes the place of nothing that is read. Raises InputError."""
    if output is None or not output.exists():
        return
    for path in read:
        if path is not None and path.exists() and output.samefile(path):
            raise InputError(f"{output} is read here, and would be written over", "choose another name")


def given(*names: str) -> str | None:
    """The first of these options of the command that was given on the command line, as it is written there."""
    source = click.get_current_context().get_parameter_source
    found = next((name for name in names if source(name) is ParameterSource.COMMANDLINE), None)
    return None if found is None else "-o" if found == "output" else f"--{found.replace('_', '-')}"


def evaluation_folder(source: Any) -> Path:
    """Where an evaluation goes when nobody says: OUT-eval, beside OUT, where `report` and `push` look for it.

    In this folder for what is on the Hub, for the demo model, and where nothing can be written beside the model.
    """
    name = source.name.rsplit("/", 1)[-1].replace("@", "-")
    whole = source.path.resolve()
    named = source.repository is not None or source.name == "demo"
    if named or not os.access(whole.parent, os.W_OK):
        return Path(f"{name}-eval")
    return Path(os.path.relpath(whole.with_name(f"{whole.name}-eval")))


def find_model(model: str, *, packed: bool = False) -> Any:
    """MODEL on this machine, looked over before any library that could open it is imported. Raises InputError.

    What is wrong with its settings is found before the classes of models are imported.

    packed  it may be quantized already
    """
    from llmcompress.hub.source import resolve
    from llmcompress.preflight import check_source

    source = resolve(model)
    files = check_source(source.path, packed=packed)
    from llmcompress.model.integrity import scan_small

    scan_small(files)
    from llmcompress.model.config import read_config

    read_config(files)
    return source


def pick_device(device: str | None) -> str:
    """A device torch has here. Raises InputError."""
    import torch

    try:
        kind = torch.device(device or "cpu").type
    except RuntimeError:
        raise InputError(f"--device {device}: no such device", "use cpu or cuda") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {device}: no CUDA device here", "leave --device out to use the CPU")
    if kind not in ("cpu", "cuda"):
        raise InputError(f"--device {device}: not supported", "use cpu or cuda")
    if device == "cuda" and "LOCAL_RANK" in os.environ:  # a GPU for each process of this machine
        return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    return device or "cpu"
