"""Learn the rounding of a whole block: the driver that block-level quantizers share.

Such a quantizer is a file that, besides `quantize`, has `LEARNERS`, functions of a weight, codes and options: each
begins from codes already found and returns a Learned, and the best of the answers is kept. The driver runs the block
on what the stored model gives it, compares what leaves with what leaves the full-precision model's block, and steps.
The last block is compared by the logits that come of it. Codes are taken over only where they lower that difference
on sequences that were not trained on, so the answer is never worse there than the one begun from.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from llmcompress.compress.grid import Codes
from llmcompress.compress.observe import local_name
from llmcompress.model.products import Quick
from llmcompress.model.stream import BlockCall, hidden_of
from llmcompress.types import BlockTrace, LinearInfo, QuantizerOptions

LOOK_EVERY = 10  # steps between two looks at held-out sequences
HELD_OUT = 8  # one sequence in so many is held out

Logits = Callable[[int, Tensor], Tensor]  # of a batch, from the hidden states that left the last block


class Learned(Protocol):
    """A weight whose rounding is being learned."""

    def weight(self) -> Tensor:
        """Dequantized, float32 `(rows, columns)`, with gradients to the parameters."""

    def step(self, progress: float) -> None:
        """One step along the gradients that have gathered, then forget them; `progress` runs from 0 to 1."""

    def penalty(self, progress: float) -> Tensor | float:
        """What is added to the loss."""

    def codes(self, dtype: torch.dtype) -> Codes:
        """What would be stored."""


@dataclass(frozen=True)
class Lesson:
    """One block, and what it is to do: `inputs` and `outputs` `(batch, tokens, hidden)`, a call for each.

    `logits` is given for the last block.
    """

    block: nn.Module
    info: BlockTrace
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    calls: Sequence[BlockCall]
    logits: Logits | None = None


@dataclass(frozen=True)
class Lessons:
    """Losses on the held-out sequences: before, and of what was kept.

    Squared differences relative to the size of the block's output, or KL divergence in nats per token.
    """

    before: float
    after: float


def learn_block(
    lesson: Lesson,
    learned: Mapping[str, tuple[LinearInfo, Learned]],
    *,
    options: QuantizerOptions,
    dtype: torch.dtype,
    seed: int = 0,
) -> tuple[dict[str, Codes], Lessons]:
    """Learn the rounding of the linears of a block, by name. Returns the best codes seen and what they gained.

    The lesson has at least two batches: every eighth, or the last, is held out.
    """
    course = _Course(lesson, learned, dtype)
    best, before = course.stored(), course.loss(course.stored())
    lowest = before
    generator = torch.Generator().manual_seed(seed)
    for step in range(options.iterations):
        progress = step / options.iterations
        course.step(generator, progress)
        if step % LOOK_EVERY == LOOK_EVERY - 1 or step == options.iterations - 1:
            found = course.stored()
            loss = course.loss(found)
            if loss < lowest:
                best, lowest = found, loss
    return best, Lessons(before, lowest)


class _Course:
    """The block with learned weights in place of its own."""

    def __init__(self, lesson: Lesson, learned: Mapping[str, tuple[LinearInfo, Learned]], dtype: torch.dtype) -> None:
        self.lesson, self.learned, self.dtype = lesson, learned, dtype
        places = range(len(lesson.inputs))
        self.held = [place for place in places if place % HELD_OUT == HELD_OUT - 1] or [places[-1]]
        self.taught = [place for place in places if place not in self.held]
        size = sum(float(lesson.outputs[p].square().mean()) for p in self.held) / len(self.held)
        self.size = max(size, 1e-30)

    def _forward(self, weights: Mapping[str, Tensor], place: int) -> Tensor:
        call = self.lesson.calls[place]
        parameters = {}
        for name, (linear, _) in self.learned.items():
            stored = weights[name].T if linear.transposed else weights[name]
            parameters[f"{local_name(self.lesson.info, linear)}.weight"] = stored
        given = (self.lesson.inputs[place], *call.args)
        with Quick():
            return hidden_of(functional_call(self.lesson.block, parameters, given, call.kwargs))

    def _error(self, leaving: Tensor, place: int) -> Tensor:
        wanted, logits = self.lesson.outputs[place], self.lesson.logits
        if logits is None:
            return (leaving - wanted).square().mean() / self.size
        with torch.no_grad():
            p = torch.log_softmax(logits(place, wanted), -1)
        q = torch.log_softmax(logits(place, leaving), -1)
        return torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean()

    def step(self, generator: torch.Generator, progress: float) -> None:
        """One step on one batch."""
        place = self.taught[int(torch.randint(len(self.taught), (1,), generator=generator))]
        with torch.enable_grad():
            leaving = self._forward({name: x.weight() for name, (_, x) in self.learned.items()}, place)
            loss = self._error(leaving, place) + sum(x.penalty(progress) for _, x in self.learned.values())
            loss.backward()  # type: ignore[no-untyped-call]
        for _, x in self.learned.values():
            x.step(progress)

    def stored(self) -> dict[str, Codes]:
        """Where the parameters stand, as codes."""
        return {name: x.codes(self.dtype) for name, (_, x) in self.learned.items()}

    @torch.no_grad()
    def loss(self, codes: Mapping[str, Codes]) -> float:
        """Mean over the held-out batches."""
        weights = {name: found.dequantize() for name, found in codes.items()}
        losses = [float(self._error(self._forward(weights, p), p)) for p in self.held]
        return sum(losses) / len(losses)
