"""`llmcompress prune --tie`: let neighbouring blocks share one stored weight."""

from typing import Any

from llmcompress.cli.options import find_model, pick_device, read_recipe
from llmcompress.cli.say import Speaker, as_set, command_line, megabytes, path_word, step_line, typed

OTHERS = ("voids", "by", "sublayers", "pairs", "blocks", "halves", "pictures")  # of removing


def tie_blocks(model: str, flags: dict[str, Any], speaker: Speaker) -> None:
    """Run it and say what came of it."""
    request = _request(model, flags)
    from llmcompress.compress.prune.records import RemovalStep
    from llmcompress.compress.tie.run import TiedResult, tie

    finished = None
    for event in tie(request):
        match event:
            case str():
                speaker.talk(f"{event} ...")
            case RemovalStep():
                speaker.talk(step_line(f"with {as_set(event.removed)} tied", event))
            case TiedResult():
                finished = event
    _tell(request, finished, speaker)


def _request(model: str, flags: dict[str, Any]) -> Any:
    from llmcompress.errors import InputError

    wrong = [name for name in OTHERS if flags[name] not in (None, False)]
    if wrong:
        raise InputError(f"--{wrong[0]} is about removing, --tie about sharing weights", "give one of them")
    if flags["max_memory"] is not None:
        raise InputError("--max-memory: tying blocks has no such limit", "leave it out, or lower score.swaps.memory_mb")
    if flags["groups"] is not None and flags["keep"] is not None:
        raise InputError("--groups and --keep say the same thing twice", "give one of them")
    recipe = read_recipe(flags["recipe"], flags["changes"], flags["calibration"], flags["seed"])
    source = find_model(model)
    from llmcompress.compress.prune.choose import Search
    from llmcompress.compress.tie.run import TieRequest

    return TieRequest(
        source=source,
        output=flags["output"],
        recipe=recipe,
        device=pick_device(flags["device"]),
        command=command_line(),
        size=flags["tie"],
        rank=flags["rank"],
        groups=flags["groups"],
        keep=flags["keep"],
        max_kld=flags["max_kld"],
        exclude=flags["exclude"],
        search=Search(flags["beam"], flags["shortlist"]),
        force=flags["force"],
    )


def _tell(request: Any, finished: Any, speaker: Speaker) -> None:
    record = finished.record
    instead, size = record.instead, finished.directory_bytes
    groups = ", ".join(f"{group} ({base})" for group, base in zip(record.groups, record.bases, strict=True))
    corrected = f"corrections of rank {record.rank}" if record.rank else "no corrections"
    share = 1 - record.bytes_after / record.bytes_before
    lines = [
        f"tied        blocks {groups} of {record.blocks}, {corrected}",
        f"weights     {megabytes(record.bytes_before)} -> {megabytes(record.bytes_after)}, {share:.1%} less",
        f"KL          {record.kld:.5f} ± {record.standard_error:.5f} nats/token over {record.sequences} sequences, "
        f"at most {record.upper:.5f} (95 %)",
        f"instead     removing {as_set(instead.removed)} saves {megabytes(instead.saved_bytes)} and costs "
        f"{instead.kld:.5f} ± {instead.standard_error:.5f}",
        f"verdict     {record.verdict}",
    ]
    if size is not None:
        lines += [
            "verified    reopened, and its logits are those of the model that was measured",
            f"written to  {request.output}  ({megabytes(size)}); only llmcompress.load opens it",
            f"next        llmcompress heal {path_word(request.output)} --against {typed(request.source)} --at all",
        ]
    else:
        lines.append("nothing was written; give -o to write the result")
    speaker.result({"output": request.output and request.output.name, **record.model_dump(mode="json")}, lines)
