"""Static activation quantizers with one scale per channel, and the ranges they clip to.

Codes are unsigned: `q = clip(round(x / scale) + zero, 0, 2**bits - 1)`, and `x ~ (q - zero) * scale`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

SHRINKS = 20
SHRINK_STEP = 0.025
NARROWEST = 1e-5  # of the mean scale: below it a channel counts as constant
WIDEST = 4.0  # learned thresholds start at sigmoid(4) = 0.98 of the range seen, or below
CHUNK = 1 << 22  # values quantized at once in the grid search

Clip = Literal["none", "grid", "learn"]


@dataclass(frozen=True)
class ActivationQuantizer:
    """A static asymmetric quantizer.

    scale  (channels,), or () for one that is tensor-wise
    zero   the same shape, whole numbers
    """

    scale: Tensor
    zero: Tensor
    bits: int

    def codes(self, inputs: Tensor) -> Tensor:
        """Codes of `(..., channels)`, as floats."""
        return torch.clamp(torch.round(inputs / self.scale) + self.zero, 0, 2**self.bits - 1)

    def dequantize(self, codes: Tensor) -> Tensor:
        """What the codes stand for."""
        return (codes - self.zero) * self.scale

    def __call__(self, inputs: Tensor) -> Tensor:
        """Quantize and dequantize."""
        return self.dequantize(self.codes(inputs))

    def tensorwise(self) -> "ActivationQuantizer":
        """The mean scale, and the mean zero-point rounded to a code: only then do codes stay what they were."""
        return ActivationQuantizer(self.scale.mean(), torch.round(self.zero.mean()), self.bits)


def range_quantizer(low: Tensor, high: Tensor, bits: int, *, symmetric: bool = False) -> ActivationQuantizer:
    """The quantizer that covers `[low, high]` of every channel; `symmetric` gives all the zero-point `2**(bits - 1)`.

    low, high  (channels,) or (); 0 is always inside. A channel without a range gets the mean scale of the others.
    """
    low, high = low.clamp_max(0), high.clamp_min(0)
    half = 2 ** (bits - 1)
    scale = torch.maximum(high / (half - 1), -low / half) if symmetric else (high - low) / (2**bits - 1)
    alive = scale > NARROWEST * scale.max()
    usual = scale[alive].mean() if bool(alive.any()) else torch.ones_like(scale.sum())
    scale = torch.where(alive, scale, usual)
    zero = torch.full_like(scale, half) if symmetric else torch.round(-low / scale).clamp(0, 2**bits - 1)
    return ActivationQuantizer(scale, zero, bits)


def find_quantizer(
    inputs: Tensor, bits: int, *, symmetric: bool = False, clip: Clip = "none", gram: Tensor, steps: int = 200
) -> ActivationQuantizer:
    """The channel-wise quantizer of what linears read.

    inputs  (tokens, channels)
    gram    (channels, channels)  `W^T W` of the linears that read them, stacked; used by `learn`
    clip    nothing; the best of 20 x 20 pairs of thresholds per channel; or thresholds learned for the linears' outputs
    """
    if clip == "learn":
        return learn_clipping(inputs, bits, symmetric=symmetric, gram=gram, steps=steps)
    if clip == "grid":
        return grid_clipping(inputs, bits, symmetric=symmetric)
    return range_quantizer(inputs.amin(0), inputs.amax(0), bits, symmetric=symmetric)


def grid_clipping(inputs: Tensor, bits: int, *, symmetric: bool = False) -> ActivationQuantizer:
    """Shrink the lower and the upper end of each channel's range, each over 20 steps, to the least squared error.

    inputs  (tokens, channels). Weighting a channel's error by its column of the weight would not change its best pair.
    """
    return range_quantizer(*grid_thresholds(inputs, bits, symmetric=symmetric), bits, symmetric=symmetric)


def grid_thresholds(inputs: Tensor, bits: int, *, symmetric: bool = False) -> tuple[Tensor, Tensor]:
    """The lower and upper ends, `(channels,)` each, that `grid_clipping` chooses."""
    low, high = inputs.amin(0), inputs.amax(0)
    shrinks = [1 - SHRINK_STEP * step for step in range(SHRINKS)]
    best_low, best_high = low.clone(), high.clone()
    lowest = torch.full_like(low, torch.inf)
    width = max(CHUNK // max(len(inputs), 1), 1)
    for start in range(0, len(low), width):
        part = slice(start, start + width)
        for down in shrinks:
            for up in shrinks:
                quantizer = range_quantizer(low[part] * down, high[part] * up, bits, symmetric=symmetric)
                loss = (quantizer(inputs[:, part]) - inputs[:, part]).square().sum(0)
                better = loss < lowest[part]
                lowest[part] = torch.where(better, loss, lowest[part])
                best_low[part] = torch.where(better, low[part] * down, best_low[part])
                best_high[part] = torch.where(better, high[part] * up, best_high[part])
    return best_low, best_high


def output_error(inputs: Tensor, quantizer: ActivationQuantizer, gram: Tensor) -> float:
    """Mean over tokens of the squared error that quantizing the inputs makes in the readers' outputs."""
    error = quantizer(inputs) - inputs
    return float(((error @ gram) * error).sum(1).mean())


def learn_clipping(
    inputs: Tensor, bits: int, *, symmetric: bool = False, gram: Tensor, steps: int = 200, rate: float = 5e-3
) -> ActivationQuantizer:
    """Learn both thresholds of every channel by Adam, against the output of the linears that read it (RepQuant).

    inputs  (tokens, channels)
    gram    (channels, channels)  `W^T W`

    A threshold is `sigmoid(a)` of the range seen, and starts where the grid search, which looks at channels one by one,
    left it. The output error of `x -> Q(x)` is `tr(E gram E^T)`, so the linears themselves are not run. Rounding counts
    as the identity in the backward pass. The best quantizer seen is kept, the plain range and the grid's among them.
    """
    low, high = inputs.amin(0), inputs.amax(0)
    best = range_quantizer(low, high, bits, symmetric=symmetric)
    lowest = output_error(inputs, best, gram)
    start = torch.stack(grid_thresholds(inputs, bits, symmetric=symmetric)) / torch.stack([low, high])
    first = grid_clipping(inputs, bits, symmetric=symmetric)
    if output_error(inputs, first, gram) < lowest:
        best, lowest = first, output_error(inputs, first, gram)
    widest = torch.sigmoid(torch.tensor(WIDEST, dtype=inputs.dtype)).item()
    with torch.enable_grad():
        ends = torch.logit(torch.nan_to_num(start, nan=1.0).clamp(0.01, widest)).requires_grad_()
        optimizer = torch.optim.Adam([ends], lr=rate)
        for _ in range(steps + 1):
            shrink = torch.sigmoid(ends)
            found = range_quantizer(shrink[0] * low, shrink[1] * high, bits, symmetric=symmetric)
            loss = _soft_error(inputs, found, gram)
            if float(loss.detach()) < lowest:
                lowest = float(loss.detach())
                best = ActivationQuantizer(found.scale.detach().clone(), found.zero.detach().clone(), bits)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return best


def _soft_error(inputs: Tensor, quantizer: ActivationQuantizer, gram: Tensor) -> Tensor:
    """`output_error` with a gradient: rounding passes it through, clipping stops it."""
    ratio = inputs / quantizer.scale
    rounded = ratio + (torch.round(ratio) - ratio).detach()
    error = quantizer.dequantize(torch.clamp(rounded + quantizer.zero, 0, 2**quantizer.bits - 1)) - inputs
    return ((error @ gram) * error).sum(1).mean()
