"""`llmcompress heal`: bring a pruned or quantized checkpoint nearer to its original."""

from pathlib import Path
from typing import Any

import click

from llmcompress.cli.options import Finite, Whole, find_model, given, pick_device, speaking, trusting
from llmcompress.cli.say import Speaker, command_line, megabytes, path_word, typed
from llmcompress.cli.trackers import Tracker, tracking
from llmcompress.errors import InputError
from llmcompress.files import read_json

OPTIONS = (
    click.option("--against", required=True, metavar="MODEL", help="The original: a directory, org/name or demo."),
    click.option("-o", "--output", type=click.Path(path_type=Path), help="Default: OUT-healed in this folder."),
    click.option(
        "--method",
        type=click.Choice(["lora", "norms"]),
        help="lora: low-rank adapters, needs peft. norms: gains of norms, scales of packed linears. "
        "Default: norms for a packed checkpoint, lora for a plain one.",
    ),
    click.option(
        "--at",
        metavar="WHERE",
        default="rdp",
        show_default=True,
        help="Blocks to train: rdp (where the path of the hidden states bends, and beside removed ones), all, random, "
        "or numbers: 0,3.",
    ),
    click.option("--blocks", type=Whole(1), help="How many bends, or random ones. Default: a third."),
    click.option("--lisa", type=Whole(1), metavar="K", help="Train K of the blocks at a time: less memory."),
    click.option("--period", type=Whole(1), default=20, show_default=True, help="Steps between draws of K."),
    click.option("--rank", type=Whole(1), default=32, show_default=True, help="Of the adapters."),
    click.option("--alpha", type=Finite(0, min_open=True), help="Of the adapters. Default: 2 rank."),
    click.option("--lr", type=Finite(0, min_open=True), help="Default: 0.002 for lora, 0.005 for norms."),
    click.option("--steps", type=Whole(1), default=1000, show_default=True),
    click.option("--batch-size", type=Whole(1), default=4, show_default=True, help="Sequences in a step."),
    click.option("--samples", type=Whole(1), default=1024, show_default=True, help="Sequences of text."),
    click.option("--sequence-length", type=Whole(8), default=256, show_default=True, help="Tokens in each."),
    click.option(
        "--held-out", type=Whole(2), default=32, show_default=True,
        help="Sequences to stop by, and as many to judge by, of the samples.",
    ),
    click.option("--every", type=Whole(1), default=50, show_default=True, help="Steps from look to look."),
    click.option("--patience", type=Whole(1), default=5, show_default=True, help="Looks without a new best."),
    click.option("--minutes", type=Finite(0, min_open=True), help="Stop training after this long."),
    click.option(
        "--calibration", metavar="SPEC", default="builtin", show_default=True, envvar="LLMCOMPRESS_CALIBRATION",
        help="builtin, self, a text file, or org/name[:split[:column]].",
    ),
    click.option("--seed", type=Whole(0), default=0, show_default=True, envvar="LLMCOMPRESS_SEED"),
    click.option("--device", default=None, envvar="LLMCOMPRESS_DEVICE", help="cpu or cuda. Default: cpu."),
    click.option("--force", is_flag=True, help="Replace an existing output, atomically, once the new one is complete."),
    click.option("--restart", is_flag=True, help="Discard an unfinished run instead of going on with it."),
)  # fmt: skip


def _options(function: Any) -> Any:
    for option in reversed(OPTIONS):
        function = option(function)
    return function


@click.command("heal")
@click.argument("out")
@_options
@trusting
@speaking
@tracking
def heal_command(out: str, speaker: Speaker, tracker: Tracker, **flags: Any) -> None:
    """Recover quality of OUT, a pruned or quantized checkpoint, by training a little of it to answer as MODEL does.

    The loss is KL(original || healed) on text. What comes out is never worse than OUT on text that was not trained on.
    The same command goes on where an interrupted run stopped.
    """
    request = _request(out, flags)
    from llmcompress.compress.heal.run import Healed, Started, heal
    from llmcompress.compress.heal.state import Position
    from llmcompress.compress.run import Warned

    finished = None
    tracker.start(request.output.name, {"model": request.source.name, "against": request.against.name})
    for event in heal(request):
        match event:
            case str():
                speaker.talk(f"{event} ...")
            case Warned():
                speaker.talk(f"warning: {event.text}")
            case Started():
                _tell_start(event, speaker)
            case Position():
                speaker.talk(_look_line(event))
                tracker.log({"held_out_kld": event.history[-1].kld, "seconds": event.seconds}, event.step)
            case Healed():
                finished = event
                tracker.log({"kld": event.record.kld.mean, "kld_before": event.record.kld_before.mean})
    _tell_result(request, finished, speaker)


def _request(out: str, flags: dict[str, Any]) -> Any:
    source, against = (find_model(word, packed=True) for word in (out, flags["against"]))
    _check_flags(flags, source)
    from llmcompress.compress.heal.lora import LoraOptions
    from llmcompress.compress.heal.places import Places
    from llmcompress.compress.heal.request import HealRequest
    from llmcompress.model.text import TextRequest

    size = flags["samples"], flags["sequence_length"]
    text = TextRequest(flags["calibration"], *size, flags["seed"], "calibration", "options")
    name = source.name.rstrip("/").rsplit("/", 1)[-1].replace("@", "-")
    return HealRequest(
        source=source,
        against=against,
        output=flags["output"] or Path(f"{name}-healed"),
        text=text,
        device=pick_device(flags["device"]),
        command=command_line(),
        method=flags["method"],
        places=Places(flags["at"], flags["blocks"]),
        lora=LoraOptions(flags["rank"], flags["alpha"] or 2.0 * flags["rank"]),
        schedule=_schedule(flags),
        held_out=flags["held_out"],
        force=flags["force"],
        restart=flags["restart"],
    )


def _check_flags(flags: dict[str, Any], source: Any) -> None:
    """Raises InputError for options that nothing would read."""
    packed = "quantization_config" in read_json(source.path / "config.json")
    adapters = given("rank", "alpha")
    if adapters is not None and (flags["method"] or ("norms" if packed else "lora")) == "norms":
        raise InputError(f"{adapters} is of adapters, and norms and scales are trained here", "add --method lora")
    if flags["lisa"] is None and given("period"):
        raise InputError("--period says nothing without --lisa", "add --lisa K, or leave it out")


def _schedule(flags: dict[str, Any]) -> Any:
    from llmcompress.compress.heal.training import Schedule

    same = ("steps", "batch_size", "every", "patience", "lisa", "period", "minutes", "seed")
    return Schedule(rate=flags["lr"] or 0.0, **{name: flags[name] for name in same})


def _tell_start(event: Any, speaker: Speaker) -> None:
    what = "low-rank adapters" if event.method == "lora" else "norms and scales"
    speaker.talk(f"{what} in blocks {_list(event.blocks)}: {event.parameters:,} numbers")
    if event.resumed_at is not None:
        speaker.talk(f"resuming after step {event.resumed_at}")


def _list(blocks: tuple[int, ...]) -> str:
    return ", ".join(map(str, blocks))


def _look_line(position: Any) -> str:
    new = "" if position.waited else "  best"
    return f"step {position.step}  held-out KL {position.history[-1].kld:.5f}  {position.seconds:.0f} s{new}"


def _figure(figure: Any) -> str:
    return f"{figure.mean:.5f} [{figure.low:.5f}, {figure.high:.5f}]"


def _tell_result(request: Any, finished: Any, speaker: Speaker) -> None:
    record = finished.record
    lines = [
        f"healed      {record.method} in blocks {_list(record.blocks)}, {record.parameters:,} numbers, "
        f"the best after step {record.best_step} of {record.steps}",
        f"KL          {_figure(record.kld_before)} -> {_figure(record.kld)} nats/token, "
        f"{record.recovered:.1%} recovered, {record.sequences} sequences, 95 %",
        f"loss        {_figure(record.rise_before)} -> {_figure(record.rise)} nats/token above the original's",
    ]
    if not record.helped:
        lines.append("nothing helped: the output is what went in")
    if record.adapter_bytes:
        lines.append(
            f"adapter     {record.adapter_bytes:,} bytes beside the checkpoint; its README.md says how to open it"
        )
    lines += [
        f"written to  {request.output}  ({megabytes(finished.directory_bytes)})",
        f"next        llmcompress eval {path_word(request.output)} --ref {typed(request.against)}",
    ]
    document = {"output": request.output.name, "helped": record.helped, "recovered": record.recovered}
    speaker.result(document | record.model_dump(mode="json"), lines)
