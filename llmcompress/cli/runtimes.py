"""Which programs open a checkpoint, or what a plan makes, as a table and as JSON."""

from typing import Any

from llmcompress.cli.drawing import say_lines
from llmcompress.cli.say import Speaker

LAYOUTS: dict[str, Any] = {
    "compressed-tensors": "compressed-tensors",
    "bitsandbytes": "bitsandbytes",
    "llmcompress": "native",
}


def openings(trace: Any, allocation: Any, options: Any) -> tuple[Any, ...]:
    """What every runtime makes of a plan."""
    from llmcompress.runtimes.answers import ask, planned

    specs = {assigned.linear: assigned.spec for assigned in allocation.assigned}
    return ask(planned(trace, specs, options))


def contained(files: Any) -> tuple[Any, ...]:
    """What every runtime makes of a checkpoint in one of the layouts that `quantize` writes, or of a plain one."""
    from llmcompress.model.checkpoint import CheckpointReader
    from llmcompress.runtime.packed import PackedReader
    from llmcompress.runtime.targets import block_of_expert
    from llmcompress.runtimes import Weight
    from llmcompress.runtimes.answers import Subject, ask

    section = files.config.get("quantization_config")
    if section is None:
        return ask(Subject(files.config["model_type"], "plain", ()))
    reader = PackedReader(CheckpointReader(files.tensors), files.config)
    sizes = {stem: reader.size_of(stem) for stem in reader.stems()}
    weights = tuple(
        Weight(
            name=stem,
            spec=reader.spec_of(stem),
            rows=rows,
            columns=columns,
            transposed=_transposed(files, stem),
            expert=block_of_expert(stem) is not None,
        )
        for stem, (rows, columns) in sizes.items()
    )
    cache, softmax = reader.rounded_attention
    layout = LAYOUTS[section["quant_method"]]
    return ask(Subject(files.config["model_type"], layout, weights, cache, softmax))


def _transposed(files: Any, stem: str) -> bool:
    """Whether a packed linear of compressed-tensors is a Conv1D: an empty weight stands guard beside it."""
    entry = files.tensors.get(f"{stem}.weight")
    return entry is not None and tuple(entry.shape) == (0,) and stem + ".weight_packed" in files.tensors


def document_of(found: tuple[Any, ...]) -> list[dict[str, Any]]:
    """The answers as JSON."""
    return [{**answer.model_dump(mode="json"), "verdict": answer.words} for answer in found]


def tell_runtimes(found: tuple[Any, ...], speaker: Speaker) -> None:
    """The table; silent with --json."""
    from llmcompress.runtimes.answers import rows_of

    rows = [["opened by", "how", "", ""], *rows_of(found)]
    widths = [*(max(len(row[place]) for row in rows) for place in range(3)), 0]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    say_lines(speaker, ["", *(line.rstrip() for line in lines)])
