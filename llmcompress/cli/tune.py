"""`llmcompress tune`."""

from pathlib import Path
from typing import Any

import click

from llmcompress.cli.options import speaking
from llmcompress.cli.say import Speaker
from llmcompress.errors import InputError

DTYPES = ("bfloat16", "float16")


@click.command("tune")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--dtype", type=click.Choice(DTYPES), default=DTYPES[0], show_default=True, help="Of the inputs.")
@click.option("--device", default="cuda", show_default=True)
@speaking
def tune_command(path: Path, dtype: str, device: str, speaker: Speaker) -> None:
    """Measure tile sizes of the kernels on this GPU for the linears of a checkpoint, and keep them for later runs."""
    from llmcompress.preflight import check_source

    files = check_source(path, packed=True)
    name = _gpu(device)
    linears = _linears(files)
    from llmcompress.kernels.triton.tuning import keep, read_own, user_table

    table, lines, document = read_own(name), [], {}
    for tuned in _measured(linears, dtype, device, speaker):
        # at once: measuring takes minutes, and what was measured stays right
        document = keep(name, table, tuned.key, most=tuned.tokens, config=tuned.config)
        lines.append(f"{tuned.key:<26} {tuned.tokens:>4} tokens  {tuned.before:8.2f} -> {tuned.microseconds:8.2f} us")
        lines += [f"  refused: {config} gives wrong products" for config in tuned.wrong]
        lines += [f"  refused: {config}: {how}" for config, how in tuned.fatal.items()]
    end = f"written to  {user_table(name)}" if lines else "no linear of this checkpoint has tiles to choose"
    speaker.result({"gpu": name, "table": document}, [*lines, end])


def _gpu(device: str) -> str:
    """Its name. Raises InputError where there is none, or no Triton."""
    import importlib.util

    import torch

    if importlib.util.find_spec("triton") is None:
        raise InputError("Triton is not installed", "pip install 'llmcompress[kernels]'")
    if not torch.cuda.is_available() or not device.startswith("cuda"):
        raise InputError(f"{device}: no GPU that PyTorch can use", "run it on the machine that will run the model")
    return torch.cuda.get_device_name(device)


def _linears(files: Any) -> list[tuple[Any, int, int]]:
    """Format, rows and columns of every packed linear of a checkpoint."""
    from llmcompress.model.checkpoint import CheckpointReader
    from llmcompress.runtime.packed import PackedReader

    reader = PackedReader(CheckpointReader(files.tensors), files.config)
    return [(reader.spec_of(stem).model_copy(update={"rank": 0}), *reader.size_of(stem)) for stem in reader.stems()]


def _measured(linears: list[tuple[Any, int, int]], dtype: str, device: str, speaker: Speaker) -> Any:
    import torch

    from llmcompress.kernels.triton.tune import tune

    for tuned in tune(linears, getattr(torch, dtype), torch.device(device)):
        speaker.talk(f"{tuned.key}, {tuned.tokens} tokens: {tuned.microseconds:.2f} us")
        yield tuned
