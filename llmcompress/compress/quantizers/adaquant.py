"""AdaQuant (arXiv 2006.10518): move weights and scales together so that the linear's output error is least.

The published objective, `min over V, s of mean (y - x Q(W + V; s)^T)^2` by gradient steps through the rounding,
needs only the second moments of `x` when activations stay at full precision: it is `tr(dW H dW^T)`. So every
step here is a full-batch step over all calibration tokens, and the result is deterministic. In scores layers are
independent, each on the full-precision model's inputs ("parallel AdaQuant"); where a plan is carried out inputs are
those the stored model gives and the output asked for is the full-precision model's (`quantize.target`), which is
"sequential AdaQuant". Weights may move by more than one step of the grid, unlike AdaRound's.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from llmcompress.compress.grid import Codes, expand_scale, find_scale, round_weight, stored_scale
from llmcompress.compress.rounding import NOT_FINITE, Quantized, Request, Seen, nearest
from llmcompress.types import LinearSpec, QuantizerOptions

NEEDS_HESSIAN = True
SHIFT_RATE = 0.05  # of a step of the grid, per iteration
SCALE_RATE = 2e-3  # relative


def quantize(
    requests: Sequence[Request], seen: Seen | None, *, options: QuantizerOptions, dtype: torch.dtype
) -> list[Quantized]:
    """Quantize linears that read one input by `options.iterations` Adam steps each; the best codes seen are kept.

    Never a larger damped proxy loss than rounding. A Hessian that is not finite falls back to rounding, recorded.
    """
    if seen is None or not seen.finite:
        return [nearest(r, options, dtype, NOT_FINITE) for r in requests]
    return [_quantize(r.weight, r.spec, seen, options=options, dtype=dtype) for r in requests]


def _quantize(
    weight: Tensor, spec: LinearSpec, seen: Seen, *, options: QuantizerOptions, dtype: torch.dtype
) -> Quantized:
    hessian = seen.hessian
    mean = hessian.diagonal().mean().clamp_min(1e-30)
    metric = (hessian / mean).float() + options.damp * torch.eye(len(hessian), device=hessian.device)
    scale = find_scale(weight, spec, dtype, clip=options.clip, importance=seen.importance)
    best = round_weight(weight, scale, spec)
    lowest = _losses(weight, best.dequantize(), metric)
    codes, scales = best.codes.clone(), best.scale.clone()
    search = _Search(weight, scale, spec)
    for step in range(options.iterations):
        found = search.codes(dtype)
        error = found.dequantize() - weight
        gradient = error @ metric
        losses = (gradient * error).sum(1)
        better = losses < lowest
        codes[better], scales[better], lowest[better] = found.codes[better], found.scale[better], losses[better]
        search.step(gradient, found, 1 - step / options.iterations)
    return Quantized(Codes(codes, scales, spec))


def _losses(weight: Tensor, dequantized: Tensor, metric: Tensor) -> Tensor:
    """Damped proxy loss of each row; rows do not interact, so the best of each is kept by itself."""
    error = dequantized - weight
    return ((error @ metric) * error).sum(1)


class _Adam:
    """Adam's direction for one tensor."""

    def __init__(self, like: Tensor) -> None:
        self.first, self.second, self.count = torch.zeros_like(like), torch.zeros_like(like), 0

    def direction(self, gradient: Tensor) -> Tensor:
        self.count += 1
        self.first.lerp_(gradient, 0.1)
        self.second.lerp_(gradient.square(), 0.001)
        first = self.first / (1 - 0.9**self.count)
        second = self.second / (1 - 0.999**self.count)
        return first / (second.sqrt() + 1e-12)


class _Search:
    """The continuous parameters: a shift of each weight in steps of its grid, a factor on each scale."""

    def __init__(self, weight: Tensor, scale: Tensor, spec: LinearSpec) -> None:
        self.weight, self.start, self.spec = weight, scale.float(), spec
        self.shift = torch.zeros_like(weight)
        self.factor = torch.zeros_like(self.start)
        self.shift_adam, self.factor_adam = _Adam(self.shift), _Adam(self.factor)

    def codes(self, dtype: torch.dtype) -> Codes:
        """Where the parameters stand, as it would be stored."""
        scale = stored_scale(self.start * self.factor.exp(), dtype)
        return round_weight(self.weight + self.shift * expand_scale(scale, self.weight.shape[1]), scale, self.spec)

    def step(self, gradient: Tensor, found: Codes, decay: float) -> None:
        """One step through the rounding, as if its derivative were one inside the range."""
        size = self.spec.group_size
        wide = expand_scale(found.scale, self.weight.shape[1])
        half = 1 << (self.spec.bits - 1)
        wanted = self.weight / wide + self.shift
        inside = (wanted > -half - 0.5) & (wanted < half - 0.5)
        level = found.codes.float() - half
        by_scale = gradient * wide * torch.where(inside, level - wanted, level)
        by_scale = by_scale.view(*self.factor.shape, size).sum(-1)
        self.shift -= SHIFT_RATE * decay * self.shift_adam.direction(gradient * wide * inside)
        self.factor -= SCALE_RATE * decay * self.factor_adam.direction(by_scale)
