"""Heavy tails of weight spectra (HTSR, SETOL: arXiv 2507.17912): how a matrix's largest eigenvalues fall off.

Data-free. The eigenvalues `lambda = sigma(W)^2` of a well-trained matrix have a power-law tail
`lambda^-alpha`; a heavy tail, `alpha` near 2, holds more of what was learned than a thin one. Option
`htsr.metric`: `alpha`; `alpha_hat = alpha * log10(lambda_max)`; or `erg`, the distance between where the
power law begins and where the top eigenvalues stop multiplying to more than 1. `htsr.tail` says how the
beginning of the tail is found: least Kolmogorov-Smirnov distance, `mid`, or `peak`. `htsr.pool`: every linear
by itself, or the mean over its block.

The importance given is `4^(-x / 4)` with the metric `x` (for `erg`, its size) held within 8 of 0: as damage
falls by 4 for every bit, one unit of `alpha` less then asks for a quarter of a bit more. Beyond 8 a fit says
no more than that there is no heavy tail. A linear with fewer than 10 eigenvalues gets the median of the others.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmcompress.compress.observe import weight_of
from llmcompress.compress.scoring import Measured, Observer, ScoreJob, layers_from_importance
from llmcompress.types import BlockTrace, Series, Unit

UNIT: Unit = "unitless"
NEEDS_DATA = False
FEWEST = 10  # eigenvalues a tail can be fitted to
CUT = 1e-5  # of the mean eigenvalue; an absolute cut would make the score depend on the scale of the weights
BINS = 100
BITS_PER_UNIT = 0.25
FURTHEST = 8.0
TYPICAL = {"alpha": 4.0, "alpha_hat": 0.0, "erg": 0.0}  # where no linear of the model can be fitted


@dataclass(frozen=True)
class Tail:
    """A power law `p(lambda) ~ lambda^-alpha` from `start` up, and its distance from the eigenvalues there."""

    alpha: float
    start: float
    distance: float


@dataclass(frozen=True)
class Spectrum:
    """What the eigenvalues of one weight say; `erg_gap` is in units of their mean."""

    alpha: float
    alpha_hat: float
    erg_gap: float


def eigenvalues_of(weight: Tensor) -> Tensor:
    """Squared singular values of `(rows, columns)`, float64, ascending, on the CPU, `min(rows, columns)` of them."""
    wide = weight if weight.shape[0] <= weight.shape[1] else weight.T
    wide = wide.double()
    found: Tensor = torch.linalg.eigvalsh(wide @ wide.T)
    return found.clamp_min(0).cpu()


def above_cut(eigenvalues: Tensor) -> Tensor:
    """The eigenvalues a tail is fitted to: those above `CUT` of the mean."""
    return eigenvalues[eigenvalues > CUT * eigenvalues.mean()]


def tail_alpha(tail: Tensor, start: float) -> float:
    """Maximum-likelihood exponent `1 + n / sum ln(lambda / start)` of eigenvalues `(n,)` that are at least `start`."""
    total = float((tail / start).log().sum())
    return 1.0 + len(tail) / total if total > 0 else math.inf


def fit_from(eigenvalues: Tensor, place: int) -> Tail:
    """The power law fitted to the ascending eigenvalues from index `place` on.

    The empirical distribution at the i-th eigenvalue is taken as `i / n`, counted from 0, as Clauset's code,
    powerlaw and WeightWatcher take it, so that all of them choose the same beginning.
    """
    tail = eigenvalues[place:]
    start, count = float(tail[0]), len(tail)
    alpha = tail_alpha(tail, start)
    if math.isinf(alpha):
        return Tail(alpha, start, 1.0)
    law = 1.0 - (tail / start) ** (1.0 - alpha)
    steps = torch.arange(count, dtype=tail.dtype) / count
    return Tail(alpha, start, float((law - steps).abs().max()))


def find_tail(eigenvalues: Tensor, *, tail: str = "ks") -> Tail:
    """Fit a power law to the tail of a spectrum.

    eigenvalues  (n,)   ascending, positive, at least two of them different
    tail         "ks"   begin where the Kolmogorov-Smirnov distance is least (Clauset, Shalizi and Newman 2009)
                 "mid"  begin at the median
                 "peak" the least distance among beginnings within [.95, 1.5] of the peak of the histogram of
                        `log10 lambda` (AlphaPruning, whose code compares a value with a logarithm there)
    """
    last = len(eigenvalues) - 1  # a tail of one eigenvalue has no exponent
    if tail == "mid":
        return fit_from(eigenvalues, min(len(eigenvalues) // 2, last - 1))
    places: Iterable[int] = range(last)
    if tail == "peak":
        peak = histogram_peak(eigenvalues)
        near = (eigenvalues >= 0.95 * peak) & (eigenvalues <= 1.5 * peak)
        places = [place for place in near.nonzero().flatten().tolist() if place < last] or places
    fits = [fit_from(eigenvalues, place) for place in places]
    return min(fits, key=lambda fit: fit.distance)


def histogram_peak(eigenvalues: Tensor) -> float:
    """Lower edge of the fullest of `BINS` equal bins of `log10 lambda`."""
    logs = eigenvalues.log10()
    counts, edges = torch.histogram(logs, BINS)
    return float(10.0 ** edges[int(counts.argmax())])


def erg_start(eigenvalues: Tensor) -> float:
    """The least eigenvalue of the longest top segment whose product is still at least 1, in units of the mean.

    eigenvalues  (n,)  ascending; they are first divided by their mean, so that they sum to `n`
    The largest is at least the mean, so the segment is never empty. Source: SETOL, its determinant condition.
    """
    scaled = eigenvalues.flip(0) / eigenvalues.mean()
    sums = scaled.log().cumsum(0)
    above = (sums >= 0).nonzero().flatten()
    return float(scaled[int(above[-1])]) if len(above) else float(scaled[0])


def spectrum_of(eigenvalues: Tensor, *, tail: str = "ks") -> Spectrum | None:
    """All metrics of one spectrum `(n,)`, ascending, zeros and all.

    None where fewer than `FEWEST` eigenvalues are above the cut, or where they are all equal.
    """
    kept = above_cut(eigenvalues)
    if len(kept) < FEWEST or float(kept[-1]) <= float(kept[0]) * (1 + 1e-9):
        return None
    found = find_tail(kept, tail=tail)
    if math.isinf(found.alpha):
        return None
    alpha_hat = found.alpha * math.log10(float(kept[-1]))
    gap = found.start / float(eigenvalues.mean()) - erg_start(eigenvalues)
    return Spectrum(found.alpha, alpha_hat, gap)


def pruning_ratios(
    alphas: Sequence[float], weights: Sequence[int], *, target: float, spread: float = 0.3
) -> tuple[float, ...]:
    """AlphaPruning's share of each block to remove: more where the tail is thin, `target` of all weights together.

    alphas   mean alpha of each block; `weights` the number of weights of each
    spread   the least and the greatest share differ by `1 - spread : 1 + spread` before they are rescaled;
             a share may exceed 1 where `target * (1 + spread)` does, and it is for the caller to see to that
    """
    low, high = min(alphas), max(alphas)
    span = high - low
    shares = [1.0 if span == 0 else (alpha - low) / span * 2 * spread + 1 - spread for alpha in alphas]
    scale = target * sum(weights) / sum(n * share for n, share in zip(weights, shares, strict=True))
    return tuple(scale * share for share in shares)


def importance_of(metric: float) -> float:
    """`4^(-metric / 4)`, the metric held within 8 of 0; always positive."""
    return float(4.0 ** (-BITS_PER_UNIT * min(max(metric, -FURTHEST), FURTHEST)))


def _filled(values: dict[str, float], names: Sequence[str], typical: float) -> dict[str, float]:
    """`values`, and their median (or what is typical) for every name without one."""
    neutral = statistics.median(values.values()) if values else typical
    return {name: values.get(name, neutral) for name in names}


class _Spectra(Observer):
    """Keeps the spectrum of every linear that can be fitted."""

    def __init__(self, job: ScoreJob) -> None:
        super().__init__(job)
        self.found: dict[str, Spectrum] = {}

    def open(self, block: nn.Module, info: BlockTrace) -> AbstractContextManager[object]:
        for linear in info.linears:
            spectrum = spectrum_of(eigenvalues_of(weight_of(block, info, linear)), tail=self.job.options.htsr.tail)
            if spectrum is not None:
                self.found[linear.name] = spectrum
        return nullcontext()

    def _values(self, metric: str) -> dict[str, float]:
        """A metric of every linear."""
        field = "erg_gap" if metric == "erg" else metric
        values = {name: float(getattr(spectrum, field)) for name, spectrum in self.found.items()}
        return _filled(values, [linear.name for linear in self.job.trace.linears], TYPICAL[metric])

    def _block_means(self, values: dict[str, float]) -> tuple[float, ...]:
        overall = statistics.median(values.values()) if values else 0.0
        names = [[linear.name for linear in info.linears] for info in self.job.trace.blocks]
        return tuple(statistics.fmean(values[name] for name in each) if each else overall for each in names)

    def finish(self) -> Measured:
        options = self.job.options.htsr
        values = self._values(options.metric)
        if options.metric == "erg":
            values = {name: abs(value) for name, value in values.items()}
        if options.pool == "block":
            means = self._block_means(values)
            values = {linear.name: means[info.index] for info in self.job.trace.blocks for linear in info.linears}
        series = tuple(
            Series(name=name, values=self._block_means(self._values(metric)))
            for name, metric in (("alpha", "alpha"), ("alpha hat", "alpha_hat"), ("erg gap", "erg"))
        )
        return Measured(layers_from_importance(self.job, lambda linear: importance_of(values[linear.name])), series)


def observer(job: ScoreJob) -> Observer:
    """Score every linear by the tail of its weight's spectrum."""
    return _Spectra(job)
