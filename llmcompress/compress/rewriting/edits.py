"""Edits of linears and norms that name no family: weights as (rows, columns), gains as `gamma` and `beta`.

How a norm keeps its gain (`weight` or `1 + weight`, with a bias or without, centred or not) is found by calling it.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from llmcompress.errors import InputError

PROBE_ROWS = 4


def matrix(linear: nn.Module) -> Tensor:
    """The weight of a linear as `(rows, columns)`: a view, writing to it writes to the linear."""
    weight: Tensor = linear.weight  # type: ignore[assignment]
    return weight.detach() if isinstance(linear, nn.Linear) else weight.detach().T


def bias_of(linear: nn.Module) -> Tensor | None:
    """The bias of a linear, to be written to, or None."""
    bias = linear._parameters.get("bias")
    return None if bias is None else bias.detach()


def scale_columns(linear: nn.Module, factor: Tensor) -> None:
    """Multiply each column `(columns,)`, in place."""
    matrix(linear).mul_(factor.to(matrix(linear).dtype))


def scale_rows(linear: nn.Module, factor: Tensor) -> None:
    """Multiply each row `(rows,)` and its bias, in place."""
    weight, bias = matrix(linear), bias_of(linear)
    weight.mul_(factor.to(weight.dtype)[:, None])
    if bias is not None:
        bias.mul_(factor.to(bias.dtype))


def mix_rows(linear: nn.Module, left: Tensor) -> None:
    """`W <- left W`, `b <- left b`, in place; `left` is `(rows, rows)`."""
    weight, bias = matrix(linear), bias_of(linear)
    weight.copy_(left.to(weight.dtype) @ weight)
    if bias is not None:
        bias.copy_(left.to(bias.dtype) @ bias)


def add_bias(linear: nn.Module, shift: Tensor) -> None:
    """Add to the bias, which is made where there is none."""
    bias = bias_of(linear)
    if bias is None:
        linear.bias = nn.Parameter(shift.to(matrix(linear).dtype).clone(), requires_grad=False)
    else:
        bias.add_(shift.to(bias.dtype))


class BiasedNorm(nn.Module):
    """A norm without a bias, and the bias that a rewrite gave it."""

    def __init__(self, norm: nn.Module, bias: Tensor) -> None:
        super().__init__()
        self.norm = norm
        self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """`norm(hidden) + bias`."""
        normed: Tensor = self.norm(hidden)
        return normed + self.bias


@dataclass(frozen=True)
class Gain:
    """The gain of a norm: `y = n * gamma + beta`, where `n` is the normalised input.

    offset   `gamma = offset + weight`: 0, or 1 in Gemma's norms
    centred  the mean is subtracted first (LayerNorm)
    epsilon  added to the mean square
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    offset: float
    centred: bool
    epsilon: float

    @property
    def gamma(self) -> Tensor:
        return self.weight.detach() + self.offset

    @property
    def beta(self) -> Tensor:
        return torch.zeros_like(self.weight) if self.bias is None else self.bias.detach()

    def set(self, gamma: Tensor, beta: Tensor | None = None) -> None:
        """Write a gain; `beta` only where the norm has a bias."""
        self.weight.data.copy_(gamma - self.offset)
        if self.bias is not None and beta is not None:
            self.bias.data.copy_(beta)


def read_gain(norm: nn.Module) -> Gain:
    """Find out how a float64 norm keeps its gain, by calling it with weights of ours. Raises InputError when it cannot.

    The norm itself is not touched.
    """
    names = dict(norm.named_parameters())
    weights = [name for name in names if name.split(".")[-1] == "weight"]
    biases = [name for name in names if name.split(".")[-1] == "bias"]
    if len(weights) != 1 or len(weights) + len(biases) != len(names) or len(biases) > 1:
        raise InputError(f"{type(norm).__name__} has no gain to fold into", "")
    weight, bias = names[weights[0]], names[biases[0]] if biases else None
    if weight.ndim != 1:
        raise InputError(f"the gain of {type(norm).__name__} is not one value per channel", "")
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(PROBE_ROWS + 2, len(weight), generator=generator, dtype=weight.dtype).to(weight.device)
    inputs, other, shift = draw[:-2], draw[-2], draw[-1]

    def called(gain: Tensor, bias_value: Tensor, given: Tensor = inputs) -> Tensor:
        values = {weights[0]: gain} | ({biases[0]: bias_value} if biases else {})
        found: Tensor = functional_call(norm, values, (given,))
        return found

    zeros = torch.zeros_like(weight)
    base, unit = called(zeros, zeros), called(zeros + 1, zeros)
    normed = unit - base
    offset = next((value for value in (0.0, 1.0) if torch.allclose(base, normed * value, atol=1e-9)), None)
    given_gain = normed * ((offset or 0.0) + other) + (shift if biases else 0)
    if offset is None or not torch.allclose(called(other, shift), given_gain, atol=1e-9):
        raise InputError(f"the output of {type(norm).__name__} is not normed * gain + bias", "")
    centred = torch.allclose(called(zeros + 1, zeros, inputs + 3.0), unit, atol=1e-9)
    return Gain(weight, bias, offset, centred, _epsilon(norm, weights[0], len(weight), 1 + offset))


def _epsilon(norm: nn.Module, name: str, width: int, gamma: float) -> float:
    """What the norm adds to the mean square, from its response to an input far below it."""
    weight = norm.get_parameter(name)
    tiny = torch.full((1, width), 1e-6, dtype=weight.dtype, device=weight.device)
    tiny[:, ::2] *= -1
    if width % 2:
        tiny[:, -1] = 0
    zeros = {key: torch.zeros_like(value) for key, value in norm.named_parameters()}
    output = functional_call(norm, zeros | {name: zeros[name] + 1}, (tiny,))
    ratio = float((output[0, 0] / (tiny[0, 0] * gamma)).abs())
    return float(f"{max(ratio**-2 - float(tiny.square().mean()), 0.0):.8g}")


def fold_gain(gain: Gain, readers: Iterable[nn.Module]) -> None:
    """Move a norm's gain into its readers, `W <- W diag(gamma)` and `b <- b + W beta`; the gain becomes 1 and 0."""
    gamma, beta = gain.gamma.clone(), gain.beta.clone()
    for linear in readers:
        if bool(beta.any()):
            add_bias(linear, matrix(linear) @ beta)
        scale_columns(linear, gamma)
    gain.set(torch.ones_like(gamma), torch.zeros_like(beta))


def divide_gain(norm: nn.Module, readers: Iterable[nn.Module], factor: Tensor) -> None:
    """Divide what a norm returns by `factor` `(channels,)`, and multiply the columns of the linears that read it."""
    gain = read_gain(norm)
    gain.set(gain.gamma / factor, gain.beta / factor)
    for linear in readers:
        scale_columns(linear, factor)
