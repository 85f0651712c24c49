"""`llmcompress export`: a checkpoint in a format that other programs read."""

from pathlib import Path
from typing import Any

import click

from llmcompress.cli.options import find_model, speaking, trusting
from llmcompress.cli.push import check_original, check_target, push_options, pushed
from llmcompress.cli.say import Speaker, command_line, megabytes
from llmcompress.plugins import available

FORMATS = "llmcompress.compress.export.formats"
DTYPES = ("bfloat16", "float16", "float32")


@click.command("export")
@click.argument("checkpoint")
@click.option("--format", "format_", type=click.Choice(available(FORMATS)), required=True, help="What to write.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Where it goes. Default: CHECKPOINT-FORMAT.")
@click.option("--dtype", type=click.Choice(DTYPES), help="bf16, gguf: of what is not packed. Default: bfloat16.")
@click.option("--kind", type=click.Choice(("nf4", "fp4", "int8")), help="bnb: the table of values. Default: nf4.")
@click.option("--double/--no-double", default=None, help="bnb: quantize scales once more. Default: yes.")
@click.option("--requantize", type=click.Choice(("q4_0", "q5_0", "q8_0")), help="gguf: of what has no type of its own.")
@click.option("--calibration", metavar="SPEC", help="gguf: text whose inputs weigh what is requantized.")
@click.option(
    "--checkpoint-format",
    type=click.Choice(("gptq", "gptq_v2")),
    help="gptq: version 1, zero-points less one, or 2. Default: 1 where all are symmetric, which most programs read.",
)
@click.option("--force", is_flag=True, help="Replace an existing output, atomically, once the new one is complete.")
@push_options
@trusting
@speaking
def export_command(checkpoint: str, output: Path | None, speaker: Speaker, **flags: Any) -> None:
    """Write CHECKPOINT, an output of ours or a plain model, in another format.

    Codes are carried over without loss where the format has a place for them, otherwise the command says what becomes
    of them, or refuses with the reason. Everything is read back from the files and compared before it is published.
    """
    format_, force = flags.pop("format_"), flags.pop("force")
    repository, public = flags.pop("repository"), flags.pop("public")
    check_target(repository, public)
    source = find_model(checkpoint, packed=True)
    check_original(repository, source.repository)
    from llmcompress.compress.export.checkpoint import Options
    from llmcompress.compress.export.run import Exported, ExportRequest, export

    output = output or Path(f"{source.name}-{format_}")
    request = ExportRequest(source, output, format_, command_line(), Options(**flags), force)
    for event in export(request):
        if isinstance(event, Exported):
            sent = None if repository is None else pushed(output, repository, public, speaker)
            _tell(output, event, sent, speaker=speaker)
        else:
            speaker.talk(f"{event} ...")


def _tell(output: Path, event: Any, sent: Any, *, speaker: Speaker) -> None:
    record = event.record
    kinds = [(weight.was, weight.type) for weight in record.weights]
    lines = [
        f"weights     {kinds.count((was, kind))} from {was} to {kind}, "
        f"largest relative error {max(w.error for w in record.weights if (w.was, w.type) == (was, kind)):.2g}"
        for was, kind in sorted(set(kinds))
    ]
    lines += [f"note        {note}" for note in record.notes]
    lines += [
        f"read back   {'every weight is the same' if record.lossless else 'every weight is what was meant'}; logits "
        f"within {record.logit_difference:.2g}, KL {record.kld:.2g} nats/token on {record.probe_tokens} random tokens",
        f"written to  {output}  ({megabytes(event.directory_bytes)})",
    ]
    document = {"output": output.name, **record.model_dump(mode="json")}
    if sent is not None:
        document["push"], more = sent
        lines += more
    speaker.result(document, lines)
