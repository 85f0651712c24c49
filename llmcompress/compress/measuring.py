"""What measured scores, trials and exchanges share: units, changes of weights, and KL per sequence."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from llmcompress.compress.group import Method
from llmcompress.compress.lowrank import quantized
from llmcompress.compress.rewriting.hints import Hints
from llmcompress.compress.rounding import Request, Seen
from llmcompress.model.skeleton import Skeleton
from llmcompress.types import LinearInfo, LinearSpec, ModelTrace, QuantizerOptions

SLICE_LOGITS = 1 << 22  # that are there at a time while distributions are compared


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
    first order, which matters at 8 bits, where the divergence itself is 1e-6. In place: no gradient goes through it.
    """
    gap = p - q
    terms = torch.expm1(-gap).add_(gap).mul_(p.exp())
    return terms.sum(-1).mean(-1, dtype=torch.float64)


def sequence_dnll(p: Tensor, q: Tensor, tokens: Tensor) -> Tensor:
    """Rise of the negative log-likelihood of each next token under `q`, mean over each sequence, float64 `(batch,)`.

    p, q    (batch, tokens, vocabulary)  log-probabilities
    tokens  (batch, tokens)              at least two per sequence
    """
    return _rise(p[:, :-1], q[:, :-1], tokens[:, 1:])


def _rise(p: Tensor, q: Tensor, following: Tensor) -> Tensor:
    """`sequence_dnll` of positions whose next tokens are `following`."""
    places = following[..., None].to(p.device)
    return (p.gather(-1, places) - q.gather(-1, places)).squeeze(-1).mean(-1, dtype=torch.float64)


def slices(tokens: Tensor, vocabulary: int) -> list[slice]:
    """Positions of a batch `(batch, tokens)`, in runs that have about `SLICE_LOGITS` logits.

    What comes of logits one position at a time needs no more of them at once.
    """
    length = tokens.shape[1]
    step = max(SLICE_LOGITS // (len(tokens) * vocabulary), 1)
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


class DamageSums:
    """KL divergence and rise of the loss on one batch of token ids `(batch, tokens)`, float64 `(batch,)` each."""

    def __init__(self, tokens: Tensor) -> None:
        self._tokens = tokens
        self.kld = torch.zeros(len(tokens), dtype=torch.float64)
        self.dnll = torch.zeros(len(tokens), dtype=torch.float64)

    def add(self, part: slice, p: Tensor, q: Tensor) -> None:
        """Log-probabilities `(batch, positions, vocabulary)` of both models at some positions, see `slices`."""
        length = self._tokens.shape[1]
        self.kld += sequence_kld(p, q).cpu() * (p.shape[1] / length)
        following = self._tokens[:, part.start + 1 : part.stop + 1]  # nothing follows the last position
        if (known := following.shape[1]) > 0:
            self.dnll += _rise(p[:, :known], q[:, :known], following).cpu() * (known / (length - 1))


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
