"""Numbers before work: how big the result will be, and what the machine needs to make it."""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from llmcompress.compress.allocate.budget import Budget
from llmcompress.compress.head import LOGITS
from llmcompress.compress.pipeline import QUANTIZERS, Opened
from llmcompress.compress.rewrite import check_methods
from llmcompress.compress.rounds import Method
from llmcompress.errors import InputError, MachineError
from llmcompress.plugins import find
from llmcompress.recipes import Recipe
from llmcompress.types import LinearSpec

FLOAT_BYTES = 4
REWRITING_BYTES = 24  # of a parameter: float32 before and after, float64, and that again to go back to
BASE_BYTES = 800 << 20  # the interpreter, torch and transformers themselves


@dataclass(frozen=True)
class Forecast:
    """What a run will need and give. Sizes in bytes."""

    blocks: int
    parameters: int
    quantized_weights: int
    source_bytes: int
    output_bytes: int
    bits_per_weight: float
    file_bits_per_weight: float
    peak_memory_bytes: int
    disk_bytes: int
    hidden_bytes: int

    def document(self) -> dict[str, float]:
        """As plain JSON."""
        return asdict(self)


def _extreme(opened: Opened, *, largest: bool) -> dict[str, LinearSpec]:
    return {name: specs[-1 if largest else 0] for name, specs in opened.candidates.items()}


def forecast(opened: Opened, recipe: Recipe, budget: Budget) -> Forecast:
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
        _refuse(opened, budget, low_bits / max(weights, 1), low_bytes)
    spent = min(wanted, float(high_bits))
    output = int(min(other + spent / 8, high_bytes))
    hidden = _hidden_bytes(opened, recipe)
    return Forecast(
        blocks=len(opened.trace.blocks),
        parameters=opened.trace.parameters,
        quantized_weights=weights,
        source_bytes=opened.source_bytes,
        output_bytes=output,
        bits_per_weight=spent / max(weights, 1),
        file_bits_per_weight=output * 8 / opened.trace.parameters,
        peak_memory_bytes=_peak_memory(opened, recipe, hidden),
        disk_bytes=output + 2 * hidden + _rewritten_bytes(opened, recipe),
        hidden_bytes=hidden,
    )


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
    width = int(opened.skeleton.config.get_text_config().hidden_size)
    length = min(recipe.calibration.sequence_length, opened.context_tokens or recipe.calibration.sequence_length)
    return recipe.calibration.samples * length * width * FLOAT_BYTES


def _rewritten_bytes(opened: Opened, recipe: Recipe) -> int:
    """The rewritten model on disk, for a while twice where all of it is rewritten at once."""
    if not recipe.rewrite.methods:
        return 0
    return opened.source_bytes * (2 if check_methods(recipe.rewrite.methods) else 1)


def _method(recipe: Recipe) -> Method:
    return Method(find(QUANTIZERS, recipe.quantizer), recipe.quantize, torch.float32, learns=True)


def _peak_memory(opened: Opened, recipe: Recipe, hidden: int) -> int:
    """Largest block in float32 with a second copy while it is rounded, its Hessians, hidden states, the head."""
    block = max((sum(p.numel() for p in b.parameters()) for b in opened.skeleton.blocks), default=0)
    widths = [
        {x.shared_input: x.columns for x in info.linears if x.name in opened.candidates} for info in opened.trace.blocks
    ]
    hessians = max((sum(columns**2 for columns in groups.values()) for groups in widths), default=0)
    rest = opened.trace.parameters - sum(p.numel() for p in opened.skeleton.blocks.parameters())
    scoring = block * 2 * len(recipe.plan.bits)  # bfloat16 errors of every candidate
    stored = hidden * recipe.calibration.score_samples // recipe.calibration.samples * len(opened.trace.blocks)
    vocabulary = int(opened.skeleton.config.get_text_config().vocab_size)
    logits = recipe.calibration.batch_size * recipe.calibration.sequence_length * vocabulary * FLOAT_BYTES * 3
    method = _method(recipe)
    models = 2 if method.compares else 1  # hidden states, what left the attention, and the copy being written
    applying = block * (1 + models) * FLOAT_BYTES + hessians * FLOAT_BYTES * 3 * models + hidden * 3 * models
    if method.learners:  # what is learned and its gradients, logits of a batch and theirs
        applying += 4 * block * FLOAT_BYTES + 2 * min(logits, 3 * LOGITS * FLOAT_BYTES)
    rewriting = 0
    if recipe.rewrite.methods:  # float64, and a copy to go back to, of the model or of a block
        parameters = opened.trace.parameters if check_methods(recipe.rewrite.methods) else block
        rewriting = parameters * REWRITING_BYTES + hidden
    head = opened.shards.head
    if head is not None:  # copies of its weight while it is rounded, its Hessian, logits of a batch
        applying = max(applying, (head.weights * 3 + head.columns**2 * 3) * FLOAT_BYTES + hidden * 2 + logits)
    needed = max(rest * FLOAT_BYTES + max(applying, block * FLOAT_BYTES + scoring + stored + logits), rewriting)
    return BASE_BYTES + needed


def check_disk(needed: Forecast, output: Path) -> None:
    """Raises MachineError when the output's disk is too small, before any work."""
    free = shutil.disk_usage(output.absolute().parent).free
    if free < needed.disk_bytes:
        raise MachineError(
            f"not enough disk space for {output.name}: need {needed.disk_bytes / 1e6:.1f} MB, {free / 1e6:.1f} MB free",
            "free space or choose another -o",
        )
