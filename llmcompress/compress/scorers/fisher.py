"""Expected KL of rounding one linear, from gradients: `1/2 * mean over tokens of sum_o (g_o * dy_o)^2`.

`dW` is what the quantizer that will be used does to the weight, `dy = x dW^T` what that changes in the
linear's output. `g` is the gradient of the log-likelihood of labels *sampled from the model* (the true
Fisher, not the empirical one) with respect to that output. Cross terms between outputs and between tokens
are dropped, as in ModelOpt's gradient score.

Memory is one block: a forward stores the hidden states that enter each block, then the blocks are
visited last to first, each run again with gradients.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.compress.observe import collect_hessians, module_of, weight_of
from llmcompress.compress.scoring import Measured, ScoreJob, rounding_errors
from llmcompress.model.stream import BlockStream
from llmcompress.types import BlockTrace, Candidate, LayerScore, LinearSpec, Unit

UNIT: Unit = "nats/token"
NEEDS_DATA = True


def output_gradient(stream: BlockStream, tokens: Tensor, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient, with respect to the last hidden states, of the summed loss of labels drawn from the model."""
    leaf = hidden.detach().requires_grad_(True)
    with torch.enable_grad():
        logits = stream.logits_of(tokens, leaf).flatten(0, 1)
        with torch.no_grad():
            labels = torch.multinomial(torch.softmax(logits, -1).cpu(), 1, generator=generator).flatten()
        loss = nn.functional.cross_entropy(logits, labels.to(logits.device), reduction="sum")
    return torch.autograd.grad(loss, leaf)[0]


Damages = dict[tuple[str, LinearSpec], Tensor]


@contextmanager
def _measuring(
    block: nn.Module, info: BlockTrace, errors: dict[str, list[tuple[LinearSpec, Tensor]]], into: Damages
) -> Iterator[None]:
    """Add each linear's `sum (g * dy)^2` to `into` while a backward runs through the block."""
    handles = []
    for linear in info.linears:
        if linear.name not in errors:
            continue

        def after(_: nn.Module, args: tuple[Any, ...], output: Tensor, name: str = linear.name) -> None:
            inputs = args[0].detach().flatten(0, -2)

            def arrive(gradient: Tensor) -> None:
                flat = gradient.flatten(0, -2)
                for spec, error in errors[name]:
                    change = inputs @ error.float().T
                    into[name, spec] += (change * flat).square().sum(dtype=torch.float64)

            output.register_hook(arrive)  # type: ignore[no-untyped-call]

        handles.append(module_of(block, info, linear).register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def score(job: ScoreJob) -> Measured:
    """Score every linear and candidate in nats per token."""
    stream, tokens = job.stream()
    generator = torch.Generator().manual_seed(job.seed)
    hidden, calls = stream.start(tokens)
    entering = []
    for info in job.trace.blocks:
        block = job.skeleton.load_block(info.index)
        entering.append(hidden)
        with torch.no_grad():
            hidden = [stream.run_block(info.index, h, call[info.index]) for h, call in zip(hidden, calls, strict=True)]
        job.skeleton.free(block)
    gradients = [output_gradient(stream, t, h, generator) for t, h in zip(tokens, hidden, strict=True)]
    job.skeleton.free_rest()
    count = job.batches.tokens.numel()
    found: dict[int, list[LayerScore]] = {}
    for info in reversed(job.trace.blocks):
        block = job.skeleton.load_block(info.index)
        hessians: dict[int, Tensor] = {}
        if job.quantizer.NEEDS_HESSIAN:
            runs = [
                partial(stream.run_block, info.index, h, c[info.index])
                for h, c in zip(entering[-1], calls, strict=True)
            ]
            hessians, _ = collect_hessians(block, info, runs)
        errors, damages = _prepare(job, block, info, hessians)
        with _measuring(block, info, errors, damages):
            for place, call in enumerate(calls):
                leaf = entering[-1][place].detach().requires_grad_(True)
                with torch.enable_grad():
                    output = stream.run_block(info.index, leaf, call[info.index])
                gradients[place] = torch.autograd.grad(output, leaf, gradients[place])[0]
        entering.pop()
        found[info.index] = _layers(info, errors, damages, count)
        job.skeleton.free(block)
    return Measured(tuple(layer for index in sorted(found) for layer in found[index]))


def _prepare(
    job: ScoreJob, block: nn.Module, info: BlockTrace, hessians: dict[int, Tensor]
) -> tuple[dict[str, list[tuple[LinearSpec, Tensor]]], Damages]:
    """The rounding error of every candidate, and a zero to add its damage to."""
    errors: dict[str, list[tuple[LinearSpec, Tensor]]] = {}
    damages: Damages = {}
    for linear in info.linears:
        if linear.name in job.candidates:
            weight = weight_of(block, info, linear).contiguous()
            found = rounding_errors(job, linear, weight, hessians.get(linear.shared_input))
            errors[linear.name] = [(spec, error.to(torch.bfloat16)) for spec, error in found]
            for spec, _ in errors[linear.name]:
                damages[linear.name, spec] = torch.zeros((), dtype=torch.float64, device=weight.device)
    return errors, damages


def _layers(
    info: BlockTrace, errors: dict[str, list[tuple[LinearSpec, Tensor]]], damages: Damages, count: int
) -> list[LayerScore]:
    layers = []
    for linear in info.linears:
        if linear.name in errors:
            candidates = tuple(
                Candidate(spec=spec, damage=0.5 * float(damages[linear.name, spec]) / count)
                for spec, _ in errors[linear.name]
            )
            layers.append(LayerScore(linear=linear.name, candidates=candidates))
    return layers
