"""Rotations while a model runs: a Hadamard matrix on what the last linear of a block reads (R4 of QuaRot, 2404.00456).

Inputs that a nonlinearity has made cannot be rotated by anything before them, so the matrix is applied as they are
read, in blocks of a power of two. It is orthogonal and symmetric: with `x' = x H` and `W' = W H`, `x' W'^T = x W^T`.
Outliers of single columns are spread over their blocks, and what rounds the inputs has an easier time.
"""

from collections.abc import Mapping

import torch
from torch import nn

from llmcompress.compress.observe import groups_of, install_weight, module_of, weight_of
from llmcompress.errors import InputError
from llmcompress.kernels.hadamard import block_of, transformed
from llmcompress.runtime.inputs import attach_mixing
from llmcompress.types import BlockTrace, LinearInfo, LinearSpec, ModelTrace

SMALLEST = 16  # columns that are worth mixing
LEAVE = "leave quantize.online_hadamard off"

Specs = Mapping[str, tuple[LinearSpec, ...]]


def last_linear(info: BlockTrace) -> LinearInfo:
    """The linear that ends the MLP of a block: the last it calls, alone in reading what the linears before it made.

    Raises InputError where there is none such.
    """
    if any(linear.expert is not None for linear in info.linears):
        raise InputError(f"{info.name}: its inputs go to experts, which are not rotated", LEAVE)
    groups = list(groups_of(info).values())
    fed = {feed.shared_input for feed in info.norms}
    last = groups[-1] if groups else []
    before = {linear.rows for linear in groups[-2]} if len(groups) > 1 else set()
    made = len(last) == 1 and bool({last[0].columns, 2 * last[0].columns} & before)
    if not made or last[0].shared_input in fed:
        raise InputError(f"{info.name}: no linear ends an MLP here that could be rotated", LEAVE)
    return last[0]


def with_mixed_inputs(trace: ModelTrace, candidates: Specs) -> dict[str, tuple[LinearSpec, ...]]:
    """Formats in which the last linear of every block mixes its inputs before it rounds them.

    Raises InputError where it cannot be told which that is, where no power of two from 16 up divides its columns, or
    where inputs are not rounded.
    """
    found = dict(candidates)
    for info in trace.blocks:
        linear = last_linear(info)
        block = block_of(linear.columns)
        if block < SMALLEST:
            raise InputError(f"{linear.name}: {linear.columns} inputs, which {SMALLEST} does not divide", LEAVE)
        specs = []
        for spec in found.get(linear.name, ()):
            if spec.inputs is None:
                raise InputError(
                    "quantize.online_hadamard: inputs are not rounded, and for weights alone it gains nothing",
                    "set quantize.inputs too, for example int8 or int4-token",
                )
            inputs = spec.inputs.model_copy(update={"hadamard": block})
            specs.append(spec.model_copy(update={"inputs": inputs}))
        if specs:
            found[linear.name] = tuple(specs)
    return found


@torch.no_grad()
def mix_inputs(block: nn.Module, info: BlockTrace, specs: Mapping[str, LinearSpec]) -> None:
    """Rotate the inputs and the weights of linears whose format says so; the block computes what it did.

    The matrix stays on until inputs are detached, see `runtime.inputs`.
    """
    for linear in info.linears:
        spec = specs.get(linear.name)
        if spec is not None and spec.inputs is not None and spec.inputs.hadamard:
            size = spec.inputs.hadamard
            install_weight(block, info, linear, transformed(weight_of(block, info, linear).contiguous(), size))
            attach_mixing(module_of(block, info, linear), size)
