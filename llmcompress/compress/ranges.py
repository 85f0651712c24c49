"""Scales of what linears read, from calibration text."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmcompress.compress.grid import stored_scale
from llmcompress.compress.rewriting.clipping import ActivationQuantizer, grid_thresholds, range_quantizer
from llmcompress.errors import InputError
from llmcompress.kernels.inputs import FLOAT8_MAX, InputQuantizer
from llmcompress.model.shares import Share
from llmcompress.types import InputSpec, QuantizerOptions

SAMPLE = 1 << 17  # values that the grid search looks at


@dataclass(frozen=True)
class InputRanges:
    """How the inputs of linears are rounded: from text, or as a rewriting of the model has already settled it.

    known  by linear; taken where its bits are those asked for and its zero-point can be stored
    share  of which batches the inputs are this process's part; None where they are all
    """

    options: QuantizerOptions
    dtype: torch.dtype
    known: Mapping[str, ActivationQuantizer] = field(default_factory=dict)
    share: Share | None = None

    def find(self, spec: InputSpec, linear: str, inputs: Iterable[Tensor]) -> InputQuantizer:
        """The quantizer of one input that linears share; `linear` is the first of them.

        inputs  (tokens, columns) of each batch, read only where ranges are taken from them
        """
        if spec.scale == "token":
            return InputQuantizer(spec)
        settled = self.known.get(linear)
        if settled is None or not _fits(settled, spec):
            clip = self.options.input_clip == "grid"
            settled = calibrated(spec, inputs, clip=clip, where=linear, share=self.share)
        scale = stored_scale(settled.scale.reshape(1).float(), self.dtype)
        if spec.symmetric:
            return InputQuantizer(spec, scale)
        return InputQuantizer(spec, scale, (settled.zero.reshape(1) - (1 << (spec.bits - 1))).to(torch.int8))


def _fits(quantizer: ActivationQuantizer, spec: InputSpec) -> bool:
    """Whether a tensor-wise quantizer of integers is one of this format; it was found on inputs that nothing mixes."""
    central = float(quantizer.zero) == 1 << (spec.bits - 1)
    return spec.kind == "int" and not spec.hadamard and quantizer.bits == spec.bits and (central or not spec.symmetric)


def calibrated(
    spec: InputSpec, inputs: Iterable[Tensor], *, clip: bool, where: str, share: Share | None = None
) -> ActivationQuantizer:
    """The range of all values, or with `clip` the part of it that gives the least squared error on a sample of them.

    With a `share`, `inputs` are those of this process's batches, and the range is that of all.

    Raises InputError where no text, or nothing finite, reached the linear.
    """
    low, high, samples = [], [], []
    for batch in inputs:
        low.append(batch.min())
        high.append(batch.max())
        samples.append(batch.flatten())
        samples[-1] = samples[-1][:: max(len(samples[-1]) // SAMPLE, 1)].clone()
    if share is not None:
        low, high, samples = map(share.all, (low, high, samples))
    if not low or not all(bool(torch.isfinite(end)) for end in (*low, *high)):
        raise InputError(f"{where}: no range of inputs could be measured", "calibrate on text that the model can read")
    ends = torch.stack([torch.stack(low).min(), torch.stack(high).max()])
    if spec.kind == "fp8":  # steps grow with the values: clipping gains nothing
        scale = ends.abs().max() / FLOAT8_MAX
        return ActivationQuantizer(scale, torch.zeros_like(scale), spec.bits)
    if clip:
        values = torch.cat(samples)
        values = torch.cat([values[:: max(len(values) // SAMPLE, 1)], ends])[:, None]
        ends = torch.cat(grid_thresholds(values, spec.bits, symmetric=spec.symmetric))
    return range_quantizer(ends[0], ends[1], spec.bits, symmetric=spec.symmetric)
