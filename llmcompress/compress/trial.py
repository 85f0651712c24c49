"""Carry allocations out without writing anything, and measure what they really cost.

All allocations share one pass over the checkpoint: each block is quantized once per allocation, and
each keeps its own chain of hidden states, because the next block must see what came before it.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llmcompress.compress.curvatures import output_curvatures
from llmcompress.compress.head import HeadView, logits_reader
from llmcompress.compress.learning import Logits
from llmcompress.compress.measuring import DamageSums, MeasureJob, Text, slices
from llmcompress.compress.rounds import BlockRounds, Streams
from llmcompress.compress.statistics import mean, standard_error
from llmcompress.model.shares import Share
from llmcompress.model.stream import BlockCall, BlockStream
from llmcompress.types import BitAllocation, BlockTrace, FeedbackTrial, LinearSpec, QuantizerOptions, Trial


@dataclass(frozen=True)
class Damage:
    """Of each allocation on each sequence, nats per token, float64 `(allocations, sequences)`.

    `kld` is the KL divergence from the full-precision model, `dnll` the rise of the negative log-likelihood.
    """

    kld: Tensor
    dnll: Tensor


@dataclass(frozen=True)
class Contestant:
    """An allocation, and how it was found."""

    label: str
    allocation: BitAllocation


def trials_of(contestants: Sequence[Contestant], damage: Damage) -> tuple[Trial, ...]:
    """What was measured of each, for the record."""
    return tuple(
        Trial(
            label=contestant.label,
            widths=tuple(sorted({a.spec.bits for a in contestant.allocation.assigned})),
            bits_per_weight=contestant.allocation.bits_per_weight,
            expected_damage=contestant.allocation.expected_damage,
            measured_kld=mean(klds),
            standard_error=standard_error(klds) if len(klds) > 1 else 0.0,
        )
        for contestant, klds in zip(contestants, damage.kld.tolist(), strict=True)
    )


def best_of(trials: Sequence[Trial]) -> int:
    """The place of the one with the least measured KL divergence."""
    return min(range(len(trials)), key=lambda place: trials[place].measured_kld)


@dataclass
class _Way:
    """One allocation: formats by linear, its hidden states by batch, and the blocks it passes over."""

    specs: Mapping[str, LinearSpec]
    hidden: list[Tensor]
    drop: frozenset[int]


def measure_allocations(
    job: MeasureJob, allocations: Sequence[BitAllocation], text: Text, drops: Sequence[frozenset[int]] = ()
) -> Damage:
    """Carry allocations out and compare them with the full-precision model.

    Hessians come from `text.calibration` alone; sequences are those of `text.judging`. `drops` are blocks that are
    passed over, a set for each allocation: it is rounded to compute what the full-precision model without them does,
    and compared with the one that has them all.
    """
    drops = drops or [frozenset()] * len(allocations)
    tables = [{a.linear: a.spec for a in allocation.assigned} for allocation in allocations]
    walk = _Walk(job, text, drops, names=frozenset().union(*tables))
    ways = [_Way(specs, list(walk.aims[drop]), drop) for specs, drop in zip(tables, drops, strict=True)]
    for info in job.trace.blocks:
        walk.through(info, ways)
    job.skeleton.load_exit()
    pairs = [walk.damage(way) for way in ways]
    job.skeleton.free_rest()
    return Damage(torch.stack([kld for kld, _ in pairs]), torch.stack([dnll for _, dnll in pairs]))


def try_output_feedback(job: MeasureJob, allocation: BitAllocation, text: Text) -> FeedbackTrial:
    """Carry an allocation out without output-side feedback and with the job's, on the same text."""
    without = job.options.model_copy(update={"output_feedback": 0})
    jobs = (replace(job, options=without), job)
    plain, sided = (measure_allocations(one, [allocation], text).kld[0].tolist() for one in jobs)
    changes = [new - old for old, new in zip(plain, sided, strict=True)]
    return FeedbackTrial(
        rows=job.options.output_feedback,
        kld_without=mean(plain),
        kld_with=mean(sided),
        standard_error=standard_error(changes) if len(changes) > 1 else 0.0,
    )


def judged_options(
    job: MeasureJob, options: QuantizerOptions, allocation: BitAllocation, text: Text
) -> tuple[QuantizerOptions, FeedbackTrial | None]:
    """`options`, without output-side feedback where it does not lower the measured damage of an allocation."""
    if not options.output_feedback:
        return options, None
    found = try_output_feedback(replace(job, options=options), allocation, text)
    return (options if found.accepted else options.model_copy(update={"output_feedback": 0})), found


class _Walk:
    """Allocations on their way through the blocks, and beside them the full-precision models they aim at."""

    def __init__(self, job: MeasureJob, text: Text, drops: Sequence[frozenset[int]], *, names: Collection[str]) -> None:
        crew = job.skeleton.crew
        self.shares = Share(len(text.calibration), crew), Share(len(text.judging), crew)
        self.job = job
        wanted = names if job.options.output_feedback else ()
        self.curvatures = output_curvatures(job.skeleton, job.trace, text.calibration, wanted)
        self.text = Text(self.shares[0].of(text.calibration), self.shares[1].of(text.judging))
        self.cut = len(self.text.calibration)
        self.stream = BlockStream(job.skeleton)
        full, self.calls = self.stream.start([*self.text.calibration, *self.text.judging])
        job.skeleton.free_rest()
        self.aims = {drop: list(full) for drop in (frozenset[int](), *drops)}

    def through(self, info: BlockTrace, ways: Sequence[_Way]) -> None:
        """Everything through one block, each way as it would be stored."""
        job, logits = self.job, None
        if job.method.learners and info is job.trace.blocks[-1]:
            job.skeleton.load_exit()
            logits = logits_reader(self.stream, self.text.calibration)
        rounds: dict[frozenset[int], BlockRounds] = {}
        for way in ways:
            if info.index not in way.drop:
                rounds.pop(way.drop, None)  # what it kept is the same for the next
                rounds[way.drop] = self._carry_out(info, way, logits)
        job.skeleton.load_block(info.index)
        for drop, states in self.aims.items():
            first = self.cut if drop in rounds or not job.method.compares else 0
            if drop in rounds and job.method.compares:
                states[:first] = [rounds[drop].leave_full(place) for place in range(first)]
            if info.index not in drop:
                _advance(self.stream, info.index, states, self.calls, first)
        job.skeleton.free(job.skeleton.blocks[info.index])

    def _carry_out(self, info: BlockTrace, way: _Way, logits: Logits | None) -> BlockRounds:
        block, hidden, cut = self.job.skeleton.load_block(info.index), way.hidden, self.cut
        here = [call[info.index] for call in self.calls[:cut]]
        full = self.aims[way.drop][:cut] if self.job.method.compares else None
        streams = Streams(hidden[:cut], full, here, logits=logits, keep=self.stream.keep, share=self.shares[0])
        method = replace(self.job.method, curvatures=self.curvatures)
        rounds = BlockRounds(method, block, info, way.specs, streams)
        for _ in rounds.rounded():
            pass
        hidden[:cut] = [rounds.leave_stored(place, call) for place, call in enumerate(here)]
        _advance(self.stream, info.index, hidden, self.calls, cut)
        rounds.close()
        return rounds

    @torch.no_grad()
    def damage(self, way: _Way) -> tuple[Tensor, Tensor]:
        """KL divergence and rise of the loss by sequence; the rest of the model must be loaded."""
        reference = [*self.aims[way.drop][: self.cut], *self.aims[frozenset()][self.cut :]]
        cut = self.cut
        compared = reference[:cut] if self.job.method.compares else None
        head = HeadView(self.job, self.stream, self.text.calibration, way.hidden[:cut], compared, share=self.shares[0])
        head.look(way.specs)
        klds, dnlls = [], []
        vocabulary = int(self.job.skeleton.config.get_text_config().vocab_size)
        for tokens, left, right in zip(self.text.judging, reference[cut:], way.hidden[cut:], strict=True):
            sums = DamageSums(tokens)
            for part in slices(tokens, vocabulary):
                p = torch.log_softmax(self.stream.leave(tokens[:, part], left[:, part]), -1)
                with head.as_in(way.specs):
                    q = torch.log_softmax(self.stream.leave(tokens[:, part], right[:, part]), -1)
                sums.add(part, p, q)
            klds.append(sums.kld)
            dnlls.append(sums.dnll)
        return torch.cat(self.shares[1].all(klds)), torch.cat(self.shares[1].all(dnlls))


@torch.no_grad()
def _advance(
    stream: BlockStream, index: int, hidden: list[Tensor], calls: list[list[BlockCall]], first: int = 0
) -> None:
    for place in range(first, len(calls)):
        hidden[place] = stream.keep(stream.run_block(index, hidden[place], calls[place][index]))
