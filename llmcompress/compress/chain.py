"""What a plan is carried out with: the job, and calibration text on its way through the blocks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmcompress.compress.curvatures import output_curvatures
from llmcompress.compress.group import Method
from llmcompress.compress.head import logits_reader
from llmcompress.compress.overflow import usable
from llmcompress.compress.pipeline import QUANTIZERS
from llmcompress.compress.rewriting.hints import Hints
from llmcompress.compress.rounds import BlockRounds, Streams
from llmcompress.compress.shards import ShardMap
from llmcompress.model.checkpoint import TORCH_DTYPES
from llmcompress.model.crew import ALONE, Crew
from llmcompress.model.products import cached_batch
from llmcompress.model.shares import Share
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import BlockCall, BlockStream
from llmcompress.model.text import Batches
from llmcompress.plugins import find
from llmcompress.recipes import Recipe
from llmcompress.types import BlockTrace, LinearInfo, ModelTrace, Plan


def split_text(recipe: Recipe, skeleton: Skeleton, batches: Batches) -> list[Tensor]:
    """Batches of the recipe, or as many sequences as a core's cache holds; who learns takes a step on each batch."""
    size = recipe.calibration.batch_size
    if not batches.tokens.numel() or hasattr(find(QUANTIZERS, recipe.quantizer), "LEARNERS"):
        return batches.split(size)
    width = int(skeleton.config.get_text_config().hidden_size)
    return batches.split(cached_batch(size, batches.tokens.shape[1], width, skeleton.device))


@dataclass(frozen=True)
class ApplyJob:
    """Everything a plan needs to be carried out.

    `batches` are the calibration tokens, int64 `(batch, tokens)` each, empty where the quantizer needs
    none; `probe` is one short batch whose logits at the end are what `verify` compares with.
    """

    plan: Plan
    trace: ModelTrace
    skeleton: Skeleton
    shards: ShardMap
    batches: list[Tensor]
    probe: Tensor
    hints: Hints = field(default_factory=Hints)

    @property
    def crew(self) -> Crew:
        """The processes that carry it out."""
        return self.skeleton.crew

    @property
    def share(self) -> Share:
        """This process's part of the batches. Learning goes from one batch to another, and needs them all."""
        return Share(len(self.batches), ALONE if self.method.learners else self.crew)

    @property
    def method(self) -> Method:
        """How the plan rounds."""
        dtype = TORCH_DTYPES[self.shards.scale_dtype]
        return Method(find(QUANTIZERS, self.plan.quantizer), self.plan.options, dtype, learns=True, hints=self.hints)

    @property
    def parts(self) -> tuple[BlockTrace | LinearInfo, ...]:
        """What is quantized, a step each: the blocks, then the head where it is to be."""
        head = self.shards.head
        return self.trace.blocks if head is None else (*self.trace.blocks, head)


@dataclass
class Chain:
    """Hidden states of every batch of this process, the probe last, and how the model calls its blocks with them.

    `tokens` are its batches, of all of which they are a `share`. `full` are the batches' hidden states under the
    full-precision model, empty where it does not run beside; `curvatures` are for the method, see `Method`.
    """

    stream: BlockStream
    share: Share
    tokens: list[Tensor]
    hidden: list[Tensor]
    full: list[Tensor]
    calls: list[list[BlockCall]]
    curvatures: Mapping[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def advance(self, index: int, rounds: BlockRounds) -> bool:
        """Every batch through block `index` as it will be stored, and as it was where that runs beside.

        Where anything that leaves it is not usable, on any process, nothing is changed, and the answer is no.
        """
        streams, full = rounds.streams, list[Tensor]()
        hidden = [torch.empty(0) for _ in streams.calls]
        if streams.leads:
            full = [rounds.leave_full(place) for place in range(len(self.full))]
            hidden = [rounds.leave_stored(place, call) for place, call in enumerate(streams.calls)]
        hidden.append(self.stream.run_block(index, self.hidden[-1], self.calls[-1][index]))
        if not self.share.crew.agreed(all(map(usable, (*hidden, *full)))):
            return False
        self.hidden, self.full = hidden, full
        return True

    @torch.no_grad()
    def catch_up(self, done: Sequence[BlockTrace]) -> None:
        """Run the full-precision model through blocks that are finished."""
        for info in done:
            block = self.stream.skeleton.load_block(info.index)
            for place, hidden in enumerate(self.full):
                left = self.stream.run_block(info.index, hidden, self.calls[place][info.index])
                self.full[place] = self.stream.keep(left)
            self.stream.skeleton.free(block)

    def end(self) -> None:
        """Nothing reads the batches any more; the probe goes on."""
        self.hidden[:-1], self.full = [torch.empty(0) for _ in self.hidden[:-1]], []

    def streams(self, index: int, job: ApplyJob) -> Streams:
        """The batches as they enter block `index`."""
        batches = len(self.calls) - 1
        calls = [call[index] for call in self.calls[:batches]]
        learns, last = bool(job.method.learners), index + 1 == len(job.trace.blocks)
        logits = logits_reader(self.stream, self.tokens) if learns and last else None
        leads = learns or index + 1 < len(job.parts)
        full, keep = list(self.full) if job.method.compares else None, self.stream.keep
        return Streams(self.hidden[:batches], full, calls, leads, logits, keep, self.share)


def start_chain(job: ApplyJob) -> Chain:
    """Enter the model with every batch and the probe; before that, the backward that output-side feedback needs."""
    wanted = job.plan.specs if job.plan.options.output_feedback else ()
    curvatures = output_curvatures(job.skeleton, job.trace, job.batches, wanted)
    stream, share, tokens = BlockStream(job.skeleton), job.share, job.share.of(job.batches)
    hidden, calls = stream.start([*tokens, job.probe])
    job.skeleton.free_rest()
    job.skeleton.free(job.skeleton.blocks[0])
    full = list(hidden[:-1]) if job.method.compares else []
    return Chain(stream, share, tokens, hidden, full, calls, curvatures)
