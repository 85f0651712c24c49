"""What measured scores, trials and exchanges share: units, changes of weights, and KL per sequence."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from llmcompress.compress.lowrank import quantized
from llmcompress.compress.rewriting.hints import Hints
from llmcompress.compress.rounding import Request, Seen
from llmcompress.compress.rounds import Method
from llmcompress.model.skeleton import Skeleton
from llmcompress.types import LinearInfo, LinearSpec, ModelTrace, QuantizerOptions


@dataclass(frozen=True)
class MeasureJob:
    """The model and the quantizer to try; `dtype` is that of stored scales."""

    skeleton: Skeleton
    trace: ModelTrace
    quantizer: ModuleType
    options: QuantizerOptions
    dtype: torch.dtype
    hints: Hints = field(default_factory=Hints)

    @property
    def method(self) -> Method:
        """How this job rounds."""
        return Method(self.quantizer, self.options, self.dtype, hints=self.hints)


@dataclass(frozen=True)
class Text:
    """Token batches, int64 `(batch, tokens)`: Hessians come from `calibration`, KL divergences from `judging`."""

    calibration: list[Tensor]
    judging: list[Tensor]


@dataclass(frozen=True)
class Noise:
    """Gaussian noise in place of rounding: `|dW| = level * |W|` in expectation."""

    level: float
    seed: int


Change = LinearSpec | Noise
Changes = Mapping[str, Change]  # by linear name


def changed_weight(job: MeasureJob, weight: Tensor, seen: Seen | None, change: Change) -> Tensor:
    """The weight `(rows, columns)` after a change, as a reader of the file would see it."""
    if isinstance(change, Noise):
        generator = torch.Generator().manual_seed(change.seed)
        drawn = torch.randn(weight.shape, generator=generator).to(weight)
        return weight + drawn * (change.level * float(weight.norm()) / math.sqrt(weight.numel()))
    results = quantized(job.quantizer, [Request(weight, change)], seen, options=job.options, dtype=job.dtype)
    stored: Tensor = results[0].codes.dequantize()
    return stored


def sequence_kld(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of each sequence, mean over its tokens, float64 `(batch,)`.

    p, q  (batch, tokens, vocabulary)  log-probabilities, float32

    Every term `q - p + p log(p / q)` is positive, and a normalisation error of a float32 softmax cancels to
    first order, which matters at 8 bits, where the divergence itself is 1e-6.
    """
    gap = p - q
    terms = p.exp() * (torch.expm1(-gap) + gap)
    return terms.sum(-1).mean(-1, dtype=torch.float64)


def sequence_dnll(p: Tensor, q: Tensor, tokens: Tensor) -> Tensor:
    """Rise of the negative log-likelihood of each next token under `q`, mean over each sequence, float64 `(batch,)`.

    p, q    (batch, tokens, vocabulary)  log-probabilities
    tokens  (batch, tokens)              at least two per sequence
    """
    following = tokens[:, 1:, None].to(p.device)
    return (p[:, :-1] - q[:, :-1]).gather(-1, following).squeeze(-1).mean(-1, dtype=torch.float64)


def units_of(trace: ModelTrace, candidates: Mapping[str, Sequence[LinearSpec]]) -> dict[str, tuple[LinearInfo, ...]]:
    """The fused units that have candidates, in call order, with their linears."""
    found: dict[str, list[LinearInfo]] = {}
    for linear in trace.every:
        if candidates.get(linear.name):
            found.setdefault(linear.unit, []).append(linear)
    return {unit: tuple(members) for unit, members in found.items()}


def widths_of(members: Sequence[LinearInfo], candidates: Mapping[str, Sequence[LinearSpec]]) -> tuple[int, ...]:
    """Widths that every linear of a unit could get, ascending."""
    sets = [{spec.bits for spec in candidates[linear.name]} for linear in members]
    return tuple(sorted(set.intersection(*sets)))


def at_width(
    members: Sequence[LinearInfo], candidates: Mapping[str, Sequence[LinearSpec]], bits: int
) -> dict[str, LinearSpec]:
    """The format of each linear of a unit at one width."""
    return {linear.name: next(spec for spec in candidates[linear.name] if spec.bits == bits) for linear in members}


def nearest_width(widths: Sequence[int], bits: float) -> int:
    """The width nearest to a number of bits; the larger of two equally near."""
    return min(widths, key=lambda width: (abs(width - bits), -width))
