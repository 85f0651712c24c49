"""What rewrites found that rounding should know, kept in one file beside the rewritten model."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from llmcompress.compress.rewriting.clipping import ActivationQuantizer
from llmcompress.files import commit_bytes

NAME = "hints.safetensors"
LIMITS, SCALE, ZERO, BITS = "limits:", "scale:", "zero:", "bits:"


@dataclass(frozen=True)
class Hints:
    """By the full name of a linear.

    quantizers  of what it reads, where a rewrite made the input ready for one scale (repquant)
    limits      largest magnitude (rows, groups) to clamp its weight to before rounding (awq)
    """

    quantizers: Mapping[str, ActivationQuantizer] = field(default_factory=dict)
    limits: Mapping[str, Tensor] = field(default_factory=dict)

    def clamped(self, linear: str, weight: Tensor) -> Tensor:
        """A weight `(rows, columns)` within the limits of its groups, where it has some."""
        limits = self.limits.get(linear)
        if limits is None:
            return weight
        bound = limits.to(weight).repeat_interleave(weight.shape[1] // limits.shape[1], dim=1)
        return weight.clamp(-bound, bound)

    def write(self, folder: Path) -> None:
        """Write them into a folder, durably."""
        # of their own each: readers of one norm share theirs, which safetensors refuses
        tensors = {LIMITS + name: limit.cpu().contiguous() for name, limit in self.limits.items()}
        for name, quantizer in self.quantizers.items():
            tensors[SCALE + name] = quantizer.scale.cpu().reshape(()).clone()
            tensors[ZERO + name] = quantizer.zero.cpu().reshape(()).clone()
            tensors[BITS + name] = torch.tensor(quantizer.bits)
        commit_bytes(folder / NAME, save(tensors))

    @classmethod
    def read(cls, folder: Path) -> "Hints":
        """What `write` left."""
        found = load_file(folder / NAME)
        quantizers = {}
        for key, scale in found.items():
            if key.startswith(SCALE):
                name = key.removeprefix(SCALE)
                quantizers[name] = ActivationQuantizer(scale, found[ZERO + name], int(found[BITS + name]))
        limits = {key.removeprefix(LIMITS): value for key, value in found.items() if key.startswith(LIMITS)}
        return cls(quantizers, limits)
