"""What linears read, rounded: to 8-bit or 4-bit integers or to float8, under one scale or one for each token."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.kernels.hadamard import transformed
from llmcompress.spec import InputSpec

FLOAT8 = torch.float8_e4m3fn
FLOAT8_MAX = torch.finfo(FLOAT8).max


@dataclass(frozen=True)
class InputQuantizer:
    """Rounds the inputs of a linear as its format says.

    scale  (1,)  where it is one for everything: in the dtype it is stored in
    zero   (1,)  int8, the code of 0, where that is not 0

    An integer code is `clip(round(x / scale) + zero)` in `[-2**(bits - 1), 2**(bits - 1))`. A token's own scale is its
    largest magnitude over `(2**bits - 1) / 2`, for float8 over 448: as compressed-tensors has it. Where the format says
    so, a Hadamard matrix mixes the inputs first, and values are those of the mixed ones.
    """

    spec: InputSpec
    scale: Tensor | None = None
    zero: Tensor | None = None

    def codes(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of `(..., columns)`, as float32, and their scale, which broadcasts against them."""
        return self._codes(self.mixed(inputs.float()))

    def mixed(self, inputs: Tensor) -> Tensor:
        """Inputs `(..., columns)` as they are before they are rounded, in their dtype."""
        return transformed(inputs, self.spec.hadamard) if self.spec.hadamard else inputs

    def _codes(self, found: Tensor) -> tuple[Tensor, Tensor]:
        scale = self._token_scale(found) if self.scale is None else self.scale.to(found.device).float()
        if self.spec.kind == "fp8":
            return (found / scale).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8).float(), scale
        half = 1 << (self.spec.bits - 1)
        rounded = found / scale
        if self.zero is not None:
            rounded = rounded + self.zero.to(found.device)
        return torch.round(rounded).clamp(-half, half - 1), scale

    def _token_scale(self, inputs: Tensor) -> Tensor:
        most = FLOAT8_MAX if self.spec.kind == "fp8" else ((1 << self.spec.bits) - 1) / 2
        scale = inputs.abs().amax(-1, keepdim=True) / most
        return torch.where(scale == 0, torch.ones_like(scale), scale)

    def __call__(self, inputs: Tensor) -> Tensor:
        """The values that the codes of `inputs` stand for, in the dtype of `inputs`. Gradients pass through."""
        exact = self.mixed(inputs)
        codes, scale = self._codes(self.mixed(inputs.detach().float()))
        centred = codes if self.zero is None else codes - self.zero.to(codes.device)
        values = (centred * scale).to(inputs.dtype)
        return exact + (values - exact).detach() if inputs.requires_grad else values
