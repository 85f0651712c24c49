"""What every scorer is given, and the arithmetic they share."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from llmcompress.compress.grid import group_size_for
from llmcompress.compress.quantizers import rtn
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import BlockStream
from llmcompress.model.text import Batches
from llmcompress.types import Candidate, LayerScore, LinearInfo, LinearSpec, ModelTrace, QuantizerOptions, ScorerOptions


@dataclass(frozen=True)
class ScoreJob:
    """One model, one calibration text, and the formats each linear could get."""

    skeleton: Skeleton
    trace: ModelTrace
    batches: Batches
    candidates: Mapping[str, tuple[LinearSpec, ...]]  # by linear name; linears that fit no group size are absent
    scale_dtype: torch.dtype
    quantizer: ModuleType
    rounding: QuantizerOptions = field(default_factory=QuantizerOptions)
    options: ScorerOptions = field(default_factory=ScorerOptions)
    batch_size: int = 8
    seed: int = 0

    def stream(self) -> tuple[BlockStream, list[Tensor]]:
        """A fresh stream and the token batches to send through it."""
        return BlockStream(self.skeleton), self.batches.split(self.batch_size)


def candidates_for(trace: ModelTrace, bits: tuple[int, ...], group_size: int) -> dict[str, tuple[LinearSpec, ...]]:
    """The formats each linear could get; a linear whose width no group size divides gets none."""
    found = {}
    for linear in trace.linears:
        size = group_size_for(linear.columns, group_size)
        if size is not None:
            found[linear.name] = tuple(LinearSpec(bits=width, group_size=size) for width in sorted(bits))
    return found


def rounding_errors(
    job: ScoreJob, linear: LinearInfo, weight: Tensor, hessian: Tensor | None = None
) -> Iterator[tuple[LinearSpec, Tensor]]:
    """`(spec, dW)` for every candidate of a linear: what the quantizer that will be used does to its weight.

    Where that quantizer needs a Hessian and none is at hand, rounding with a clip search stands in.
    """
    quantizer = job.quantizer
    if quantizer.NEEDS_HESSIAN and hessian is None:
        quantizer = rtn
    for spec in job.candidates[linear.name]:
        result = quantizer.quantize(weight, hessian, spec, options=job.rounding, dtype=job.scale_dtype)
        yield spec, result.codes.dequantize() - weight


def relative_error(weight: Tensor, error: Tensor) -> float:
    """`|dW|^2 / |W|^2`."""
    return float(error.square().sum() / weight.square().sum().clamp_min(1e-30))


def score_from_importance(job: ScoreJob, linear: LinearInfo, weight: Tensor, importance: float) -> LayerScore:
    """Turn a unitless importance into damage: importance times the relative error of each candidate."""
    candidates = []
    for spec, error in rounding_errors(job, linear, weight):
        candidates.append(Candidate(spec=spec, damage=importance * relative_error(weight, error)))
    return LayerScore(linear=linear.name, importance=importance, candidates=tuple(candidates))
