"""Expected KL of rounding, from gradients: `1/2 E (sum g dy)^2`, as much of the sum inside the square as asked for.

`dW` is what the quantizer that will be used does to a weight, `dy = x dW^T` what that changes in its linear's
output, `g` the gradient of the log-likelihood with respect to that output. Labels are drawn from the model (the
true Fisher) or are the text's own next tokens (the empirical one). `score.fisher.reduce`:

- `sum`: squares of single products, as in ModelOpt's gradient score; no cross terms, least noise.
- `dot`: products are added over the outputs of a fused unit first, token by token.
- `sequence`: added over all tokens of a sequence as well: the exact quadratic form of the Fisher matrix, but one
  number per sequence and draw of labels, so it needs many.

Memory is one block, or one group of its linears: a forward stores the hidden states that enter each block, then
the blocks are visited last to first, each run again with gradients.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.compress.head import head_input
from llmcompress.compress.measuring import slices
from llmcompress.compress.observe import collect_hessians, groups_of, module_of, weight_of
from llmcompress.compress.overflow import checked
from llmcompress.compress.rounding import Seen
from llmcompress.compress.scoring import Measured, ScoreJob, layer_score, rounding_errors
from llmcompress.model.products import linear
from llmcompress.model.shares import OrderedSums, Share
from llmcompress.model.stream import BlockCall, BlockStream
from llmcompress.types import BlockTrace, LayerScore, LinearInfo, LinearSpec, Unit

UNIT: Unit = "nats/token"
NEEDS_DATA = True
CHUNK = 1 << 24  # output changes are computed about this many at a time

Errors = dict[str, list[tuple[LinearSpec, Tensor]]]


def output_gradient(
    stream: BlockStream,
    tokens: Tensor,
    hidden: Tensor,
    generators: Sequence[torch.Generator],
    *,
    labels: str = "model",
    parts: Sequence[slice] = (slice(None),),
) -> Tensor:
    """Gradient, with respect to the last hidden states, of the summed loss of drawn labels or of the next tokens.

    `generators` draw the labels, one for each sequence; `parts` of the positions have their logits one after the other.
    """
    found = []
    for part in parts:
        here = range(*part.indices(tokens.shape[1]))
        leaf = hidden[:, part].detach().requires_grad_(True)
        with torch.enable_grad():
            logits = stream.logits_of(tokens[:, part], leaf)
            if labels == "data":
                chosen = tokens[:, here.start + 1 : here.stop + 1].flatten()
                logits = logits[:, : chosen.numel() // len(tokens)].flatten(0, 1)
            else:
                logits = logits.flatten(0, 1)
                with torch.no_grad():
                    chances = torch.softmax(logits, -1).cpu().view(len(tokens), -1, logits.shape[-1])
                    pairs = zip(chances, generators, strict=True)
                    chosen = torch.cat([torch.multinomial(x, 1, generator=each).flatten() for x, each in pairs])
            loss = nn.functional.cross_entropy(logits, chosen.to(logits.device), reduction="sum")
        found.append(torch.autograd.grad(loss, leaf)[0])
    return torch.cat(found, 1)


def seed_of(seed: int, draw: int, sequence: int) -> int:
    """The seed of the labels of one sequence: they are the same whoever draws them, and whatever batch it is in."""
    words = f"{seed} labels {draw} {sequence}".encode()
    return int.from_bytes(hashlib.sha256(words).digest()[:8], "little") >> 1


class Sums:
    """The squares, by linear for `sum` and by fused unit otherwise, and width."""

    def __init__(
        self, linears: Mapping[str, LinearInfo], errors: Errors, reduce: str, share: Share | None = None
    ) -> None:
        self.linears, self.errors, self.reduce = linears, errors, reduce
        self._keys = {
            (name if reduce == "sum" else linears[name].unit, spec): None
            for name, specs in errors.items()
            for spec, _ in specs
        }
        self._sums = OrderedSums(share or Share(0))
        self._squares: dict[tuple[str, LinearSpec], float] = {}  # of the batch at hand
        self.shape = (1, 1)  # sequences and tokens of the batch at hand
        self._open: dict[tuple[str, LinearSpec], Tensor] = {}

    def add(self, name: str, inputs: Tensor, gradient: Tensor, rows: Tensor | None = None) -> None:
        """One linear's inputs `(batch, tokens, columns)` and output gradients `(batch, tokens, rows)`.

        Both may be flat, `(tokens, ...)`; `rows` are then the tokens of the batch that an expert's linear reads.
        """
        inputs, gradient = inputs.flatten(0, -2), gradient.flatten(0, -2)
        if not len(inputs):
            return  # an expert that no token was routed to
        step = max(CHUNK // gradient.shape[1], 1)
        for spec, error in self.errors[name]:
            change = error.float()
            parts = [
                linear(inputs[start : start + step], change).mul_(gradient[start : start + step])
                for start in range(0, len(inputs), step)
            ]
            if self.reduce == "sum":
                key = (name, spec)
                total = sum(float(part.square_().sum(dtype=torch.float64)) for part in parts)
                self._squares[key] = self._squares.get(key, 0.0) + total
                continue
            key = (self.linears[name].unit, spec)
            dots = torch.cat([part.sum(1, dtype=torch.float64) for part in parts])
            if rows is not None:
                dots = dots.new_zeros(self.shape[0] * self.shape[1]).index_add(0, rows, dots)
            if self.reduce == "sequence":
                dots = dots.view(self.shape[0], -1).sum(1)
            self._open[key] = self._open[key] + dots if key in self._open else dots

    def settle(self) -> None:
        """Square what was added since the last time: every linear of a unit has been seen for a batch."""
        for key, dots in self._open.items():
            self._squares[key] = self._squares.get(key, 0.0) + float(dots.square().sum())
        squares = [self._squares.get(key, 0.0) for key in self._keys]
        self._sums.put("squares", torch.tensor(squares, dtype=torch.float64))
        self._sums.close_batch()
        self._open.clear()
        self._squares.clear()

    def layers(self, count: int) -> list[LayerScore]:
        """Damages per token, `1/2 found / count`; a unit's is shared among its linears by weight count.

        The same on every process that shares the text.
        """
        squares = self._sums.take().get("squares")  # none where nothing was to be scored
        found = dict(zip(self._keys, [] if squares is None else squares.tolist(), strict=True))
        weights: dict[str, int] = {}
        for name in self.errors:
            weights[self.linears[name].unit] = weights.get(self.linears[name].unit, 0) + self.linears[name].weights
        layers = []
        for name, specs in self.errors.items():
            linear = self.linears[name]
            key, share = (name, 1.0) if self.reduce == "sum" else (linear.unit, linear.weights / weights[linear.unit])
            rows = ((spec, 0.5 * share * found[key, spec] / count, None) for spec, _ in specs)
            layers.append(layer_score(name, rows))
        return layers


@contextmanager
def _measuring(modules: Mapping[str, nn.Module], sums: Sums, hidden: Tensor) -> Iterator[None]:
    """Add to `sums` while a backward from `hidden` `(batch, tokens, hidden)` runs through the modules."""
    handles = []
    sums.shape = (hidden.shape[0], hidden.shape[1])
    for known in modules:

        def after(module: nn.Module, args: tuple[Any, ...], output: Tensor, name: str = known) -> None:
            inputs, rows = args[0].detach(), getattr(module, "rows", None)
            output.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: sums.add(name, inputs, gradient, rows)
            )

        handles.append(modules[known].register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Backward:
    """The streamed backward over one calibration text."""

    def __init__(self, job: ScoreJob) -> None:
        self.job, self.options = job, job.options.fisher
        self.stream, self.tokens, self.share = job.shared()
        self.hidden, self.calls = self.stream.start(self.tokens)
        job.skeleton.free_rest()
        self.entering: list[list[Tensor]] = []
        self.gradients: list[list[Tensor]] = []  # by draw, then batch
        positions = job.batches.tokens.shape[1] - (1 if self.options.labels == "data" else 0)
        self.count = len(job.batches.tokens) * positions * self.options.draws

    def forward(self) -> None:
        """Keep what enters each block."""
        for info in self.job.trace.blocks:
            block = self.job.skeleton.load_block(info.index)
            self.entering.append([self.job.skeleton.shelf.put_away(hidden) for hidden in self.hidden])
            with torch.no_grad():
                pairs = zip(self.hidden, self.calls, strict=True)
                self.hidden = [self.stream.keep(self._run(info, h, c)) for h, c in pairs]
            self.job.skeleton.free(block)

    def _run(self, info: BlockTrace, hidden: Tensor, call: list[BlockCall]) -> Tensor:
        return checked(info, self.stream.run_block(info.index, hidden, call[info.index]))

    def head(self) -> list[LayerScore]:
        """Gradients entering the last block's output, and the head's own score where it has candidates."""
        self.job.skeleton.load_exit()
        info, errors, modules = self.job.trace.head, Errors(), dict[str, nn.Module]()
        if info is not None and info.name in self.job.candidates:
            module = self.job.skeleton.model.get_submodule(info.name)
            weight: Tensor = module.weight
            seen = None
            if self.job.quantizer.NEEDS_HESSIAN:
                seen = head_input(module, self.stream, self.tokens, self.hidden, share=self.share)
            errors = _errors(self.job, {info.name: weight.detach().clone()}, seen)
            modules[info.name] = module
        sums = Sums({} if info is None else {info.name: info}, errors, self.options.reduce, self.share)
        vocabulary = int(self.job.skeleton.config.get_text_config().vocab_size)
        parts = [[slice(None)] if modules else slices(tokens, vocabulary) for tokens in self.tokens]
        for draw in range(self.options.draws):
            found = []
            rows = zip(self.share.places, self.tokens, self.hidden, parts, strict=True)
            for place, tokens, state, part in rows:
                drawers = self._drawers(draw, place, len(tokens))
                with _measuring(modules, sums, state):
                    gradient = output_gradient(
                        self.stream, tokens, state, drawers, labels=self.options.labels, parts=part
                    )
                found.append(self.stream.keep(gradient))
                sums.settle()
            self.gradients.append(found)
        self.job.skeleton.free_rest()
        return sums.layers(self.count)

    def _drawers(self, draw: int, place: int, count: int) -> list[torch.Generator]:
        """What draws the labels of the sequences of a batch."""
        first = place * self.job.batch_size
        seeds = [seed_of(self.job.seed, draw, first + row) for row in range(count)]
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    def block(self, info: BlockTrace) -> list[LayerScore]:
        """Scores of one block, and the gradients carried to the one before it.

        Where memory is limited the groups are scored in turn: the block runs once for each, and what every candidate
        does to the weights of one is gone before the next. Nothing that is added up reaches over groups.
        """
        block, entering = self.job.skeleton.load_block(info.index), self.entering.pop()
        groups = list(groups_of(info))
        parts = [[group] for group in groups] if self.job.in_turn else [groups]
        found = [self._part(info, block, entering, part, last=part is parts[-1]) for part in parts]
        self.job.skeleton.free(block)
        return [layer for layers in found for layer in layers]

    def _part(
        self, info: BlockTrace, block: nn.Module, entering: list[Tensor], part: Sequence[int], *, last: bool
    ) -> list[LayerScore]:
        known: dict[int, Seen] = {}
        if self.job.quantizer.NEEDS_HESSIAN:
            runs = [partial(self._run, info, h, c) for h, c in zip(entering, self.calls, strict=True)]
            found = collect_hessians(block, info, runs, self.share, only=part)
            known = {group: found.pop(group).waiting(self.stream.keep) for group in list(found)}
        members = [x for x in info.linears if x.shared_input in part and x.name in self.job.candidates]
        linears, errors = {x.name: x for x in members}, Errors()
        for group in part:
            weights = {x.name: weight_of(block, info, x).contiguous() for x in members if x.shared_input == group}
            errors |= _errors(self.job, weights, known.pop(group, None))
        sums = Sums(linears, errors, self.options.reduce, self.share)
        modules = {x.name: module_of(block, info, x) for x in members}
        for gradients in self.gradients if members or last else ():
            for place, call in enumerate(self.calls):
                leaf = entering[place].detach().requires_grad_(True)
                with _measuring(modules, sums, leaf), torch.enable_grad():
                    output = self._run(info, leaf, call)
                    gradient = torch.autograd.grad(output, leaf, gradients[place])[0]
                if last:
                    gradients[place] = self.stream.keep(gradient)
                sums.settle()
        return sums.layers(self.count)


def _errors(job: ScoreJob, weights: Mapping[str, Tensor], seen: Seen | None) -> Errors:
    found = Errors()
    for name, spec, error in rounding_errors(job, weights, seen):
        found.setdefault(name, []).append((spec, job.skeleton.shelf.keep(error.to(torch.bfloat16))))
    return found


def score(job: ScoreJob) -> Measured:
    """Score every linear and candidate in nats per token."""
    backward = _Backward(job)
    backward.forward()
    head = backward.head()
    found = {info.index: backward.block(info) for info in reversed(job.trace.blocks)}
    return Measured((*(layer for index in sorted(found) for layer in found[index]), *head))
