"""Rotations (QuaRot, arXiv 2404.00456; SpinQuant, arXiv 2405.16406): turn the residual stream and each head's values.

Every vector written to the stream is multiplied by an orthogonal `R1`, every reader undoes it: a norm without a gain
lets a rotation through, so gains are folded first. Inside a head, values are turned by `R2` and the output projection
turned back. Outliers of single channels are spread over all. Nothing is left to do at run time.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from llmcompress.compress.rewriting.orthogonal import cayley_step, identity, random_hadamard, random_orthogonal
from llmcompress.compress.rewriting.residual import (
    Residual,
    centre,
    centred_norms,
    find_residual,
    fold_norms,
    readers_of,
    record_untied,
    replace_norms,
    tied,
    untie,
)
from llmcompress.compress.rewriting.sites import Link, head_size, links
from llmcompress.compress.rewriting.work import Call, Rewritten, Subject, working
from llmcompress.model.stream import linear_modules
from llmcompress.options import ReparamOptions, RotateOptions

SCOPE = "model"
UNSAVED = "LayerNorms became torch.nn.RMSNorm, which the model's own class does not have"


def rewrite(subject: Subject, options: ReparamOptions) -> Rewritten:
    """Rotate a whole model in place. Raises InputError, saying why, for models with norms after the sublayers and such.

    A LayerNorm model is brought to RMSNorm form first. `learn` lowers the KL divergence from the model to itself with
    rounded activations, where SpinQuant lowers its loss on the text's own tokens: fewer tokens do.
    """
    model, asked = subject.module, options.rotate
    with working(subject) as work:
        residual = find_residual(model, work.probe)
        shared, layer_norms = tied(model), any(centred_norms(residual))

        def prepare() -> None:
            untie(model)
            if layer_norms:
                centre(residual)
            fold_norms(residual)
            replace_norms(residual)

        work.require("norms", list(model.modules()), prepare)
        record_untied(model)
        turning = _Turning(model, residual, _heads(residual) if asked.heads else [])
        turns = turning.draw(asked)
        if asked.learn:
            turns = _learn(turning, turns, [call.doubled() for call in subject.calls], asked)
        work.require("rotation", list(model.modules()), lambda: turning.install(turns))
    notes = (*((UNSAVED,) if layer_norms else ()), *(("the head now has a weight of its own",) if shared else ()))
    return work.result(native=not layer_norms, notes=notes)


@dataclass(frozen=True)
class _Heads:
    """A link of one block whose rows may be mixed within heads of `size`."""

    block: nn.Module
    link: Link
    size: int


def _heads(residual: Residual) -> list[_Heads]:
    found = []
    for part in residual.blocks:
        for link in links(part.block, part.call):
            size = head_size(part.block, part.call, link)
            if size > 1:
                found.append(_Heads(part.block, link, size))
    return found


class _Turning:
    """What rotations do to a model's parameters, as a function of the rotations."""

    def __init__(self, model: nn.Module, residual: Residual, heads: Sequence[_Heads]) -> None:
        self.model, self.heads, self.width = model, heads, residual.width
        self._names = {id(module): name for name, module in model.named_modules()}
        self._transposed = {
            self._names[id(module)] for module in linear_modules(model).values() if not isinstance(module, nn.Linear)
        }
        inside = [part.block.get_submodule(name) for part in residual.blocks for name in part.writers]
        plain = [module for module in residual.embeddings if isinstance(module, nn.Embedding)]
        written = [module for module in residual.embeddings if not isinstance(module, nn.Embedding)]
        # an embedding's rows are written as they are: turned like the columns of a reader
        self.by_columns = self._named([*plain, *readers_of(residual)])
        self.by_rows = self._named([*written, *inside])

    def _named(self, modules: Sequence[nn.Module]) -> list[str]:
        return list(dict.fromkeys(self._names[id(module)] for module in modules))

    def draw(self, options: RotateOptions) -> list[Tensor]:
        """Random rotations: of the stream `(1, width, width)`, then of the heads of each link `(heads, size, size)`."""
        generator = torch.Generator().manual_seed(options.seed)
        draw = {"hadamard": random_hadamard, "orthogonal": random_orthogonal, "identity": identity}[options.base]
        shapes = [(1, self.width), *((len(h.link.rows) // h.size, h.size) for h in self.heads)]
        device = next(self.model.parameters()).device
        return [torch.stack([draw(size, generator) for _ in range(count)]).to(device) for count, size in shapes]

    def parameters(self, turns: Sequence[Tensor]) -> dict[str, Tensor]:
        """The parameters that change, turned; gradients flow to `turns`."""
        own = {name: value.detach() for name, value in self.model.named_parameters()}
        changed: dict[str, Tensor] = {}

        def update(name: str, change: Any) -> None:
            if name in own:
                changed[name] = change(changed.get(name, own[name]))

        stream = turns[0][0]
        for name in self.by_columns:
            update(f"{name}.weight", lambda w, name=name: self._columns(name, w, lambda m: m @ stream))
        for name in self.by_rows:
            update(f"{name}.weight", lambda w, name=name: self._rows(name, w, lambda m: stream.T @ m))
            update(f"{name}.bias", lambda b: b @ stream)
        for one, turn in zip(self.heads, turns[1:], strict=True):
            rows, size = one.link.rows, one.size
            source = self._names[id(one.block.get_submodule(one.link.source))]
            target = self._names[id(one.block.get_submodule(one.link.target))]
            head = torch.searchsorted(rows, one.link.row_of)[::size] // size  # of each run of columns

            def mixed(m: Tensor, rows: Tensor = rows, turn: Tensor = turn) -> Tensor:
                found = turn.mT @ m[rows].reshape(*turn.shape[:2], -1)
                return m.index_copy(0, rows, found.flatten(0, 1))

            def unmixed(m: Tensor, turn: Tensor = turn, head: Tensor = head, size: int = size) -> Tensor:
                return torch.einsum("oks,kst->okt", m.reshape(len(m), -1, size), turn[head]).flatten(1)

            update(f"{source}.weight", lambda w, name=source, mixed=mixed: self._rows(name, w, mixed))
            update(f"{source}.bias", lambda b, mixed=mixed: mixed(b[:, None])[:, 0])
            update(f"{target}.weight", lambda w, name=target, unmixed=unmixed: self._columns(name, w, unmixed))
        return changed

    def _rows(self, name: str, weight: Tensor, change: Any) -> Tensor:
        found: Tensor = change(weight.T).T if name in self._transposed else change(weight)
        return found

    _columns = _rows  # both see the weight as (rows, columns)

    def install(self, turns: Sequence[Tensor]) -> None:
        """Write the turned parameters into the model."""
        own = dict(self.model.named_parameters())
        for name, value in self.parameters(turns).items():
            own[name].data.copy_(value)


def _fake_quantized(inputs: Tensor, bits: int) -> Tensor:
    """Asymmetric per-token rounding. The backward pass takes rounding for the identity, but sees the range it makes."""
    low, high = inputs.amin(-1, keepdim=True).clamp_max(0), inputs.amax(-1, keepdim=True).clamp_min(0)
    scale = ((high - low) / (2**bits - 1)).clamp_min(1e-12)
    zero = torch.round(-low / scale).detach()
    ratio = inputs / scale
    rounded = ratio + (torch.round(ratio) - ratio).detach()
    codes = torch.clamp(rounded + zero, 0, 2**bits - 1)
    found: Tensor = (codes - zero) * scale
    return found


def quantized_kl(model: nn.Module, parameters: dict[str, Tensor], calls: Sequence[Call], bits: int) -> Tensor:
    """KL divergence, nats per token, that rounding the inputs of the blocks' linears to `bits` bits causes.

    parameters  in the place of the model's own, where named; they must not change the model's function
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    linears = [module for module in linear_modules(model).values() if module is not head]
    divergences = []
    for call in calls:
        with torch.no_grad():
            goal = torch.log_softmax(call.run(model), -1)
        handles = [
            linear.register_forward_pre_hook(lambda _, args: (_fake_quantized(args[0], bits), *args[1:]))
            for linear in linears
        ]
        try:
            logits = functional_call(model, parameters, call.args, dict(call.kwargs)).logits
        finally:
            for handle in handles:
                handle.remove()
        divergences.append((goal.exp() * (goal - torch.log_softmax(logits, -1))).sum(-1).mean())
    return torch.stack(divergences).mean()


def _learn(turning: _Turning, turns: Sequence[Tensor], calls: Sequence[Call], options: RotateOptions) -> list[Tensor]:
    """Full-batch Cayley steps of decreasing length; the rotations of least loss are kept, the first ones among them."""
    points = list(turns)
    best, lowest = points, float("inf")
    for step in range(options.steps + 1):
        with torch.enable_grad():
            leaves = [point.detach().requires_grad_() for point in points]
            loss = quantized_kl(turning.model, turning.parameters(leaves), calls, options.bits)
            gradients = torch.autograd.grad(loss, leaves)
        value = float(loss.detach())
        if value < lowest:
            best, lowest = points, value
        length = options.rate * (1 - step / options.steps)
        points = [
            torch.stack([cayley_step(one, slope, length) for one, slope in zip(point, gradient, strict=True)])
            for point, gradient in zip(points, gradients, strict=True)
        ]
    return best
