"""What passes between a quantizer and whoever asks it.

A quantizer is a file with `NEEDS_HESSIAN` and

    quantize(requests, seen, *, options, dtype) -> list[Quantized]

All requests of one call read the same input, so whatever depends on the input alone (a factorised Hessian, an
order of columns) is worked out once for all linears of a group and for all formats of each.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from llmcompress.compress.grid import Codes, find_scale, round_weight
from llmcompress.types import LinearSpec, QuantizerOptions

NOT_FINITE = "second moments of its calibration inputs are not finite"


def finite(numbers: Tensor) -> bool:
    """Whether all are: the least and the largest are NaN where one is, and found much sooner than by `isfinite`."""
    return not numbers.numel() or all(bool(torch.isfinite(end)) for end in torch.aminmax(numbers))


@dataclass(frozen=True)
class Seen:
    """What calibration showed of the input `x` that some linears share, in the model as it will be stored.

    hessian  (columns, columns)  mean of `x x^T` over tokens
    tokens   how many tokens; 0 where it is not known
    drift    (columns, columns)  mean of `(x' - x) x^T`, `x'` being what the full-precision model reads there;
             None where it was not measured, or is already part of the weights asked for
    known    what was worked out from the Hessian and is needed again, see `once`
    """

    hessian: Tensor
    tokens: int = 0
    drift: Tensor | None = None
    known: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` gives, worked out at its first call with this key: linears of one input come in several parts."""
        if key not in self.known:
            self.known[key] = make()
        return self.known[key]

    @property
    def finite(self) -> bool:
        """Whether the Hessian can be used at all."""
        return finite(self.hessian)

    @property
    def nothing(self) -> bool:
        """Whether no token was seen, as of an expert that none was routed to."""
        return not bool(self.hessian.any())

    def steadied(self) -> Self:
        """The same as if as many tokens again as there are columns had been seen, alike in every direction.

        `H + (columns / tokens) mean(diag H) I`. Rounding that trusts the Hessian of a few tokens can be several times
        worse on others than rounding to nearest; with this it is better on average, however few there are
        (`bench/few_tokens.py`).
        """
        if not self.tokens:
            return self
        share = self.hessian.diagonal().mean() * (len(self.hessian) / self.tokens)
        hessian = self.hessian.clone()
        hessian.diagonal().add_(share)
        return replace(self, hessian=hessian, known={})

    def waiting(self, keep: Callable[[Tensor], Tensor]) -> Self:
        """The same, what was summed up where `keep` has what is only read now and then."""
        drift = None if self.drift is None else keep(self.drift)
        return replace(self, hessian=keep(self.hessian), drift=drift, known={})

    @property
    def importance(self) -> Tensor:
        """Weight of each column's squared error in a search for scales: its mean square, 1 on average, `(columns,)`."""
        diagonal = self.hessian.diagonal()
        return (diagonal / diagonal.mean().clamp_min(1e-30)).clamp_min(1e-6)


@dataclass(frozen=True)
class Request:
    """A weight `(rows, columns)`, float32, and the format it is to get.

    `curvature` `(rows, rows)` is that of the loss in the linear's outputs, see `kronecker`; None where it is not used.
    """

    weight: Tensor
    spec: LinearSpec
    curvature: Tensor | None = None


@dataclass(frozen=True)
class Quantized:
    """Codes of one linear, and every fallback taken on the way, as sentences for the report.

    `blind`: the quantizer needs to know the input, and what is known of it is of no use.
    """

    codes: Codes
    fallbacks: tuple[str, ...] = ()
    blind: bool = False


def portions(requests: Sequence[Request], places: Sequence[int], weights: int) -> list[list[int]]:
    """Which requests are rounded together, by their places: one after another, until they have so many weights."""
    found: list[list[int]] = []
    room = 0
    for place in places:
        size = requests[place].weight.numel()
        if not found or size > room:
            found.append([])
            room = weights
        found[-1].append(place)
        room -= size
    return found


def stacked(parts: Sequence[Codes]) -> Codes:
    """The codes of a weight from those of its rows, some at a time."""
    return Codes(torch.cat([x.codes for x in parts]), torch.cat([x.scale for x in parts]), parts[0].spec)


def nearest(request: Request, options: QuantizerOptions, dtype: torch.dtype, note: str = "") -> Quantized:
    """Symmetric integers by rounding, after a search for scales; `note` says why, if it was not asked for.

    With a note the answer is a blind one.
    """
    scale = find_scale(request.weight, request.spec, dtype, clip=options.clip)
    return Quantized(round_weight(request.weight, scale, request.spec), (note,) if note else (), blind=bool(note))
