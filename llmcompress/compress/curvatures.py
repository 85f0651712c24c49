"""The curvature of the loss in the outputs of linears: `E g g^T`, for output-side feedback (see `kronecker`)."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.compress.measuring import slices
from llmcompress.compress.observe import module_of
from llmcompress.compress.scorers.fisher import output_gradient, seed_of
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import BlockStream
from llmcompress.types import ModelTrace

SEED = 0  # of the labels


def output_curvatures(
    skeleton: Skeleton, trace: ModelTrace, batches: Sequence[Tensor], names: Collection[str]
) -> dict[str, Tensor]:
    """`H_O` of the full-precision model's linears in `names`, `(outputs, outputs)`, by one streamed backward.

    batches  token ids `(batch, tokens)` each

    Experts are left out: each sees a share of the tokens, and such a matrix needs many more of them than it has rows.
    The matrices wait in files. Needs the model free, and leaves it so. Each process of a run makes all of them.
    """
    if not names:
        return {}
    stream = BlockStream(skeleton)
    hidden, calls = stream.start(batches)
    skeleton.free_rest()
    entering = []
    for info in trace.blocks:
        entering.append([skeleton.shelf.put_away(state) for state in hidden])
        stream.pass_block(info.index, hidden, calls)
    vocabulary, first, gradients = int(skeleton.config.get_text_config().vocab_size), 0, []
    for tokens, state in zip(batches, hidden, strict=True):
        drawn = [torch.Generator().manual_seed(seed_of(SEED, 0, first + place)) for place in range(len(tokens))]
        gradients.append(stream.keep(output_gradient(stream, tokens, state, drawn, parts=slices(tokens, vocabulary))))
        first += len(tokens)
    skeleton.free_rest()
    found: dict[str, Tensor] = {}
    for info in reversed(trace.blocks):
        block, states = skeleton.load_block(info.index), entering.pop()
        wanted = {x.name: module_of(block, info, x) for x in info.linears if x.name in names and x.expert is None}
        sums: dict[str, Tensor] = {}
        for place, call in enumerate(calls):
            leaf = states[place].detach().requires_grad_(True)
            with _summing(wanted, sums), torch.enable_grad():
                output = stream.run_block(info.index, leaf, call[info.index])
                gradients[place] = stream.keep(torch.autograd.grad(output, leaf, gradients[place])[0])
        found |= {name: skeleton.shelf.put_away(total) for name, total in sums.items()}
        skeleton.free(block)
    return found


@contextmanager
def _summing(modules: Mapping[str, nn.Module], sums: dict[str, Tensor]) -> Iterator[None]:
    """Add `g g^T` over the tokens of a backward to the sum of each module."""

    def add(name: str, gradient: Tensor) -> None:
        flat = gradient.flatten(0, -2)
        sums[name] = sums[name].addmm_(flat.T, flat) if name in sums else flat.T @ flat

    handles = []
    for linear, module in modules.items():

        def after(_: nn.Module, __: tuple[Any, ...], output: Tensor, name: str = linear) -> None:
            output.register_hook(lambda gradient: add(name, gradient))  # type: ignore[no-untyped-call]

        handles.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
