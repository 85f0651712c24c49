"""Measured scores: one unit changed at a time, the KL divergence of the whole model looked at."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from llmcompress.compress.measuring import MeasureJob, Text, at_width, nearest_width, units_of, widths_of
from llmcompress.compress.scoring import ScoreJob, layer_score
from llmcompress.errors import InputError
from llmcompress.types import LayerScore, LinearInfo, LinearSpec

Damage = tuple[float, float]  # nats per token, and its standard error over sequences


def measure_job(job: ScoreJob, quantizer: ModuleType | None = None) -> MeasureJob:
    """The model of a score job, with the quantizer that will be used or another."""
    return MeasureJob(job.skeleton, job.trace, quantizer or job.quantizer, job.rounding, job.scale_dtype)


def swap_text(job: ScoreJob) -> Text:
    """Half of the text at most, shortened, to judge by; the rest for Hessians. Raises InputError for one sequence."""
    options, tokens = job.options.swaps, job.batches.tokens
    count = min(options.samples, len(tokens) // 2)
    if count < 1:
        raise InputError(
            "measured scores need at least two calibration sequences", "use --set calibration.score_samples=32"
        )
    judging = tokens[len(tokens) - count :, : options.tokens]
    parts = (tokens[: len(tokens) - count], judging)
    return Text(*(list(torch.split(part, job.batch_size)) for part in parts))


def memory_bytes(job: ScoreJob) -> int:
    """How much memory the hidden states of swaps may take."""
    return job.options.swaps.memory_mb << 20


@dataclass(frozen=True)
class Swap:
    """One unit at one width."""

    unit: str
    bits: int


def swaps_of(job: ScoreJob, skip: int | None = None) -> list[Swap]:
    """Every unit at every width it could get, but for `skip`."""
    units = units_of(job.trace, job.candidates)
    return [
        Swap(unit, bits)
        for unit, members in units.items()
        for bits in widths_of(members, job.candidates)
        if bits != skip
    ]


def changes_of(job: ScoreJob, swaps: Sequence[Swap]) -> list[dict[str, LinearSpec]]:
    """The formats each swap gives the linears of its unit."""
    units = units_of(job.trace, job.candidates)
    return [at_width(units[swap.unit], job.candidates, swap.bits) for swap in swaps]


def uniform_base(job: ScoreJob, bits: int) -> dict[str, LinearSpec]:
    """Every linear at one width, or at the nearest it could get."""
    base: dict[str, LinearSpec] = {}
    for members in units_of(job.trace, job.candidates).values():
        base |= at_width(members, job.candidates, nearest_width(widths_of(members, job.candidates), bits))
    return base


def base_bits(job: ScoreJob) -> int:
    """The width swaps are made around: asked for, nearest to the budget, or the middle of the candidates."""
    widths = sorted({spec.bits for specs in job.candidates.values() for spec in specs})
    asked = job.options.swaps.base_bits or job.working_bits
    return widths[len(widths) // 2] if asked is None else nearest_width(widths, asked)


def mean_and_error(values: Tensor) -> Damage:
    """Mean over sequences and its standard error."""
    spread = float(values.std(correction=1)) if len(values) > 1 else 0.0
    return float(values.mean()), spread / len(values) ** 0.5


def decreasing(values: Sequence[float]) -> list[float]:
    """Nearest non-increasing sequence in least squares (pool adjacent violators): noise aside, more bits never hurt."""
    pools: list[tuple[float, int]] = []
    for value in values:
        total, count = value, 1
        while pools and pools[-1][0] / pools[-1][1] <= total / count:
            before, size = pools.pop()
            total, count = total + before, count + size
        pools.append((total, count))
    return [total / count for total, count in pools for _ in range(count)]


def layers_from_units(job: ScoreJob, table: Mapping[tuple[str, int], Damage]) -> tuple[LayerScore, ...]:
    """Damages of units, shared among their linears by weight count, made non-increasing in bits and not negative.

    A constant per unit does not change which allocation is best, so each unit is shifted to end at or above 0.
    """
    found: dict[str, LayerScore] = {}
    for unit, members in units_of(job.trace, job.candidates).items():
        widths = widths_of(members, job.candidates)
        smooth = decreasing([table[unit, bits][0] for bits in widths])
        shift = min(smooth[-1], 0.0)
        damages = {bits: value - shift for bits, value in zip(widths, smooth, strict=True)}
        errors = {bits: table[unit, bits][1] for bits in widths}
        total = sum(linear.weights for linear in members)
        for linear in members:
            found[linear.name] = _layer(job, linear, linear.weights / total, damages=damages, errors=errors)
    return tuple(found[linear.name] for linear in job.trace.every if linear.name in found)


def _layer(
    job: ScoreJob, linear: LinearInfo, share: float, *, damages: Mapping[int, float], errors: Mapping[int, float]
) -> LayerScore:
    specs = [spec for spec in job.candidates[linear.name] if spec.bits in damages]
    return layer_score(linear.name, ((s, share * damages[s.bits], share * errors[s.bits]) for s in specs))
