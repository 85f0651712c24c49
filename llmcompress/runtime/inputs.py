"""Linears that round what they read: any module with one input and a weight, and taken off again.

Where weights and inputs are both 8-bit integers the module multiplies integers; elsewhere a hook puts the rounded
values in place of the inputs.
"""

from typing import Any

from torch import Tensor, nn

from llmcompress.kernels.codes import Codes
from llmcompress.kernels.hadamard import transformed
from llmcompress.kernels.inputs import InputQuantizer
from llmcompress.kernels.integers import IntegerWeight


class RoundInputs:
    """A hook before a module's forward."""

    def __init__(self, quantizer: InputQuantizer) -> None:
        self.quantizer = quantizer

    def __call__(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.quantizer(args[0]), *args[1:])


class MixInputs:
    """A hook before a module's forward: a Hadamard matrix on blocks of its inputs, which are not rounded."""

    def __init__(self, block: int) -> None:
        self.block = block

    def __call__(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (transformed(args[0], self.block), *args[1:])


class MultiplyIntegers:
    """In place of a module's forward: a linear of 8-bit integers."""

    def __init__(self, module: nn.Module, weight: IntegerWeight, quantizer: InputQuantizer) -> None:
        self.module, self.weight, self.quantizer = module, weight, quantizer

    def __call__(self, inputs: Tensor) -> Tensor:
        product = self.weight.multiply(inputs, self.quantizer)
        bias = getattr(self.module, "bias", None)
        return (product if bias is None else product + bias.float()).to(inputs.dtype)


def attach(module: nn.Module, quantizer: InputQuantizer) -> None:
    """From now on a module reads rounded inputs. Hooks that are registered later see them rounded too."""
    detach(module)
    module.register_forward_pre_hook(RoundInputs(quantizer))


def attach_mixing(module: nn.Module, block: int) -> None:
    """From now on a module reads its inputs mixed, see `MixInputs`; its weight is not changed here."""
    detach(module)
    module.register_forward_pre_hook(MixInputs(block))


def attach_stored(module: nn.Module, codes: Codes) -> None:
    """From now on a module computes what its stored form says, in integers where that can be; else it rounds inputs."""
    if codes.inputs is None:
        return
    if not codes.spec.integer:
        attach(module, codes.inputs)
        return
    detach(module)
    device = next(module.parameters()).device
    weight = IntegerWeight.of(codes.codes.to(device), codes.scale.to(device))
    vars(module)["forward"] = MultiplyIntegers(module, weight, codes.inputs)


def detach(root: nn.Module) -> None:
    """Take everything of this kind off a module and all modules inside it."""
    for module in root.modules():
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if isinstance(hook, RoundInputs | MixInputs)]:
            del hooks[key]
        if isinstance(vars(module).get("forward"), MultiplyIntegers):
            del vars(module)["forward"]
