"""Voids (L2 adaptive computation, arXiv 2505.14467): the share of tokens for which a block is active.

A block is a void for a token whose norm it raises by less than `alpha` times the range of what earlier blocks
did to it. The importance given is the usage, the share of tokens that the block is no void for, and at least
1e-6, so that a block that is always void counts next to nothing. The rule looks at norms alone: a block that
turns hidden states without lengthening them is a void to it.

Options: `voids.alpha`; `voids.phase` `prompt` (the calibration text) or `generation` (tokens the model itself
goes on with); `voids.skip_first` leaves position 0 out of the prompt phase, where an attention sink's huge norm
would make every later block a void; `voids.from_embedding` counts what block 0 does to the embedding's norm,
else block 0 is always active; `voids.prompts`, `voids.prompt_tokens` and `voids.new_tokens` size the generation
phase, which never exceeds the model's context.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from llmcompress.compress.scoring import Measured, Observer, ScoreJob, layers_from_blocks
from llmcompress.errors import InputError
from llmcompress.model.stream import BlockStream
from llmcompress.options import VoidsOptions
from llmcompress.types import BlockTrace, Series, Unit

UNIT: Unit = "unitless"
NEEDS_DATA = True
FLOOR = 1e-6


class RunningRange:
    """The rule, one block at a time: keeps each token's last norm and the extremes of its changes so far.

    Feed norms `(tokens,)` of any shape, first those entering block 0, or those leaving it where the change made
    by block 0 is not to count.
    """

    def __init__(self, norms: Tensor) -> None:
        self.norms = norms
        self.highest: Tensor | None = None
        self.lowest: Tensor | None = None

    def voids(self, norms: Tensor, alpha: float) -> Tensor:
        """For which tokens the next block, whose output has these norms, is a void: bool, in their shape."""
        change = norms - self.norms
        self.norms = norms
        if self.highest is None or self.lowest is None:
            self.highest = self.lowest = change
            return change < 0
        found = change < alpha * (self.highest - self.lowest)
        self.highest, self.lowest = torch.maximum(self.highest, change), torch.minimum(self.lowest, change)
        return found


def voids_of(norms: Tensor, alpha: float) -> Tensor:
    """Voids from norms of one phase: `(steps + 1, ...)` in, bool `(steps, ...)` out.

    `norms[0]` is where changes are counted from; a step is void where `change < alpha * (max - min)` over the
    changes before it, or below 0 where there is at most one.
    """
    rule = RunningRange(norms[0])
    found = torch.zeros_like(norms[1:], dtype=torch.bool)
    for step, after in enumerate(norms[1:]):
        found[step] = rule.voids(after, alpha)
    return found


def lengths(hidden: Tensor) -> Tensor:
    """Euclidean norm of every token's hidden state, float64 `(batch, tokens)`."""
    found: Tensor = torch.linalg.vector_norm(hidden, dim=-1).double()
    return found


@torch.no_grad()
def continue_greedily(
    stream: BlockStream, prompts: Tensor, draft: Tensor, *, hold: bool, see: Callable[[int, Tensor, Tensor], None]
) -> Tensor:
    """What the model itself goes on with, int64 `(rows, new)`, streamed a block at a time; everything is freed after.

    prompts  (rows, tokens)  int64, all of one length
    draft    (rows, new)     a first guess at the continuation; it changes the work, not the answer
    hold     keep the blocks loaded from pass to pass
    see      called with a block's number, the numbers of some rows, and those rows' hidden states `(some rows,
             tokens + new, hidden)` as they enter block 0 (number -1) and leave every block; for each row the
             last call of a number is that of the answer

    A pass gives the preferred token at every place at once. After pass `k` the first `k` tokens of a row no longer
    change, and a pass that confirms a row is its last: at most `new + 1`, fewer where the draft was right.
    """
    skeleton, start = stream.skeleton, prompts.shape[1]
    tokens, rows = torch.cat([prompts, draft], dim=1), torch.arange(len(prompts))
    skeleton.load_rest()
    skeleton.load_block(0)
    for _ in range(draft.shape[1] + 1):
        hidden, calls = stream.enter(tokens[rows])
        see(-1, rows, hidden)
        for index, block in enumerate(skeleton.blocks):
            if any(parameter.is_meta for parameter in block.parameters()):
                skeleton.load_block(index)
            hidden = stream.run_block(index, hidden, calls[index])
            see(index, rows, hidden)
            if not hold:
                skeleton.free(block)
        preferred = stream.leave(tokens[rows], hidden)[:, start - 1 : -1].argmax(-1).cpu()
        changed = (preferred != tokens[rows, start:]).any(1)
        tokens[rows, start:] = preferred
        rows = rows[changed]
        if not len(rows):
            break
    skeleton.free(skeleton.model)
    return tokens[:, start:]


def generation_sizes(options: VoidsOptions, shape: Sequence[int], context: int | None) -> tuple[int, int, int]:
    """Rows, prompt tokens and new tokens for a text of `shape` `(rows, tokens)` that fit a context; new may be 0."""
    room = context if context is not None else shape[1] + options.new_tokens
    prompt = max(min(options.prompt_tokens, shape[1], room - 1), 1)
    return min(options.prompts, shape[0]), prompt, min(options.new_tokens, room - prompt)


class _Voids(Observer):
    """Keeps the running range of every token, and each block's count of active ones."""

    def __init__(self, job: ScoreJob) -> None:
        super().__init__(job)
        options = job.options.voids
        context = getattr(job.skeleton.config.get_text_config(), "max_position_embeddings", None)
        self.sizes = generation_sizes(options, job.batches.tokens.shape, context)
        if options.phase == "generation" and not self.sizes[2]:
            raise InputError("voids.phase: generation without a new token", "set score.voids.new_tokens to 1 or more")
        self.rules: list[RunningRange] = []
        self.active = [0.0] * len(job.trace.blocks)
        self.place = 0

    def open(self, block: nn.Module, info: BlockTrace) -> AbstractContextManager[object]:
        self.place = 0
        return nullcontext()

    def see(self, info: BlockTrace, entering: Tensor, leaving: Tensor) -> None:
        options = self.job.options.voids
        first = 1 if options.skip_first and leaving.shape[1] > 1 else 0
        norms = lengths(leaving)[:, first:]
        if info.index == 0:
            self.rules.append(RunningRange(lengths(entering)[:, first:] if options.from_embedding else norms))
        if info.index == 0 and not options.from_embedding:
            self.active[0] += norms.numel()
        else:
            self.active[info.index] += int((~self.rules[self.place].voids(norms, options.alpha)).sum())
        self.place += 1

    def generation(self) -> list[float]:
        """Share of the generated tokens for which each block is active."""
        rows, prompt, new = self.sizes
        options, text = self.job.options.voids, self.job.batches.tokens[:rows]
        draft = text[:, prompt : prompt + new]
        draft = torch.nn.functional.pad(draft, (0, new - draft.shape[1]))
        norms = torch.zeros(len(self.active) + 1, rows, new, dtype=torch.float64)

        def keep(index: int, some: Tensor, hidden: Tensor) -> None:
            norms[index + 1, some] = lengths(hidden[:, prompt:]).cpu()

        continue_greedily(BlockStream(self.job.skeleton), text[:, :prompt], draft, hold=self._blocks_fit(), see=keep)
        void = voids_of(norms if options.from_embedding else norms[1:], options.alpha)
        usage = [1 - float(step.double().mean()) for step in void]
        return usage if options.from_embedding else [1.0, *usage]

    def _blocks_fit(self) -> bool:
        """Whether all blocks together need no more memory than the hidden states of the pass that is over."""
        skeleton = self.job.skeleton
        states = self.job.batches.tokens.numel() * int(skeleton.config.get_text_config().hidden_size)
        return sum(parameter.numel() for parameter in skeleton.blocks.parameters()) <= states

    def finish(self) -> Measured:
        seen = sum(rule.norms.numel() for rule in self.rules)
        usage = {"prompt": [count / seen for count in self.active]}
        if self.sizes[2]:
            usage["generation"] = self.generation()
        importance = [max(value, FLOOR) for value in usage[self.job.options.voids.phase]]
        series = tuple(Series(name=f"usage {phase}", values=tuple(values)) for phase, values in usage.items())
        return Measured(layers_from_blocks(self.job, importance), series)


def observer(job: ScoreJob) -> Observer:
    """Score every linear by the usage of its block, measured on the full-precision model."""
    return _Voids(job)
