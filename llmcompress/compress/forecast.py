"""Numbers before work: how big the result will be, and what the machine needs to make it."""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llmcompress.compress.allocate.budget import Budget
from llmcompress.compress.memory import stages, with_batches
from llmcompress.compress.pipeline import Opened, needs_data
from llmcompress.compress.rewrite import check_methods
from llmcompress.errors import InputError, MachineError
from llmcompress.model.needs import Stages, fit, peak
from llmcompress.model.sources import read_documents
from llmcompress.recipes import Recipe
from llmcompress.runtimes.aim import advising
from llmcompress.types import LinearSpec

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Forecast:
    """What a run will need and give. Sizes in bytes.

    `memory` says what the peak, of the stage `memory_stage`, is made of; `spilled` whether hidden states wait in files.
    """

    blocks: int
    parameters: int
    quantized_weights: int
    source_bytes: int
    output_bytes: int
    bits_per_weight: float
    file_bits_per_weight: float
    peak_memory_bytes: int
    memory_stage: str
    memory: dict[str, int]
    spilled: bool
    disk_bytes: int
    hidden_bytes: int

    def document(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)


def _extreme(opened: Opened, *, largest: bool) -> dict[str, LinearSpec]:
    return {name: specs[-1 if largest else 0] for name, specs in opened.candidates.items()}


def forecast(
    opened: Opened, recipe: Recipe, budget: Budget, *, spilled: bool = False, scored: bool = False
) -> Forecast:
    """Header arithmetic only: no weight is read. Raises InputError for a budget below the smallest formats.

    For a limit of damage these are the most it can come to.
    """
    linears = [x for x in opened.trace.every if x.name in opened.candidates]
    weights = sum(x.weights for x in linears)
    totals = []
    for largest in (False, True):
        specs = _extreme(opened, largest=largest)
        bits = sum(specs[x.name].storage_bits(x.rows, x.columns) for x in linears)
        totals.append((bits, opened.shards.file_bytes(specs)))
    (low_bits, low_bytes), (high_bits, high_bytes) = totals
    other = low_bytes - low_bits / 8
    wanted: float = budget.amount * weights
    if budget.measured:
        wanted = float(high_bits)  # how small it can be is not known before it is measured
    elif budget.kind != "linears":
        whole = budget.amount if budget.kind == "bytes" else budget.amount * opened.trace.parameters / 8
        wanted = (whole - other) * 8
    if wanted < low_bits:
        with advising(recipe.plan.runtime):
            _refuse(opened, budget, low_bits / max(weights, 1), low_bytes)
    spent = min(wanted, float(high_bits))
    output = int(min(other + spent / 8, high_bytes))
    hidden = _hidden_bytes(opened, recipe)
    found = stages(opened, recipe, reads=needs_data(recipe), scored=scored)
    highest = peak(found, spilled=spilled)
    return Forecast(
        blocks=len(opened.trace.blocks),
        parameters=opened.trace.parameters,
        quantized_weights=weights,
        source_bytes=opened.source_bytes,
        output_bytes=output,
        bits_per_weight=spent / max(weights, 1),
        file_bits_per_weight=output * 8 / opened.trace.parameters,
        peak_memory_bytes=highest.total(spilled=spilled),
        memory_stage=highest.name,
        memory=highest.every(spilled=spilled),
        spilled=spilled,
        disk_bytes=output + _waiting_bytes(opened, recipe, found, spilled=spilled) + _rewritten_bytes(opened, recipe),
        hidden_bytes=hidden,
    )


def fitted(
    opened: Opened, recipe: Recipe, budget: Budget, *, limit: int | None, scored: bool = False
) -> tuple[Recipe, Forecast]:
    """The recipe that keeps to `limit` bytes of memory, where there is a limit, and its forecast.

    Hidden states go to files first, which changes no result; then calibration text goes through in smaller batches.
    Raises InputError with the memory that is needed where even batches of one sequence do not fit, and for a
    calibration text that is not there.
    """
    reads = needs_data(recipe)
    if reads and recipe.calibration.source != "self":
        read_documents(recipe.calibration.source, "calibration")
    other = ", or take --recipe fast, which reads no text" if reads else ""
    found = fit(
        lambda size: stages(opened, with_batches(recipe, size), reads=reads, scored=scored),
        recipe.calibration.batch_size,
        limit,
        other=other,
    )
    recipe = with_batches(recipe, found.batch_size)
    return recipe, forecast(opened, recipe, budget, spilled=found.spilled, scored=scored)


def unread(recipe: Recipe) -> tuple[str, ...]:
    """A warning where a calibration text is named and nothing reads it."""
    source = recipe.calibration.source
    if source == "builtin" or needs_data(recipe):
        return ()
    return (f"calibration text {source} is not read: neither {recipe.scorer} nor {recipe.quantizer} looks at text",)


def _refuse(opened: Opened, budget: Budget, smallest: float, smallest_bytes: int) -> None:
    if budget.kind == "linears":
        nearest = f"{smallest + 0.0005:.3f}bits"
    elif budget.kind == "file":
        nearest = f"{smallest_bytes * 8 / opened.trace.parameters + 0.0005:.3f}bits/file"
    else:
        nearest = f"{smallest_bytes}B"
    raise InputError(
        f"budget {budget.text} cannot be met: the smallest possible is {nearest}",
        f"ask for {nearest} or more, or allow fewer bits with --set plan.bits",
    )


def _hidden_bytes(opened: Opened, recipe: Recipe) -> int:
    """Of the whole calibration text after one block; none where nothing reads it."""
    if not needs_data(recipe):
        return 0
    width = int(opened.skeleton.config.get_text_config().hidden_size)
    length = min(recipe.calibration.sequence_length, opened.context_tokens or recipe.calibration.sequence_length)
    return recipe.calibration.samples * length * width * FLOAT_BYTES


def _waiting_bytes(opened: Opened, recipe: Recipe, found: Stages, *, spilled: bool) -> int:
    """Hidden states on disk: those of two steps, of every block while `fisher` goes forward, and what is spilled."""
    hidden = _hidden_bytes(opened, recipe)
    waiting = 2 * hidden + (max(stage.hidden + stage.files for stage in found) if spilled else 0)
    if recipe.scorer == "fisher":
        part = min(recipe.calibration.score_samples, recipe.calibration.samples)
        waiting += hidden * part * len(opened.trace.blocks) // recipe.calibration.samples
    return waiting


def _rewritten_bytes(opened: Opened, recipe: Recipe) -> int:
    """The rewritten model on disk, for a while twice where all of it is rewritten at once."""
    if not recipe.rewrite.methods:
        return 0
    return opened.source_bytes * (2 if check_methods(recipe.rewrite.methods) else 1)


def check_disk(needed: Forecast, output: Path) -> None:
    """Raises MachineError when the output's disk is too small, before any work."""
    free = shutil.disk_usage(output.absolute().parent).free
    if free < needed.disk_bytes:
        raise MachineError(
            f"not enough disk space for {output.name}: need {needed.disk_bytes / 1e6:.1f} MB, {free / 1e6:.1f} MB free",
            "free space or choose another -o",
        )
