"""Two models over the same text, a block of one and then the same block of the other."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from llmcompress.eval.facts import BlockCost, BlockError
from llmcompress.eval.report import number
from llmcompress.model.shares import Share
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import BlockCall, BlockStream

OTHER_BASIS = 0.5  # embeddings that differ by more belong to a stream that was rotated


class Pair:
    """Streams two skeletons side by side. `trajectory` and `costs` are there once the first logits are.

    In memory at one time: hidden states of both for all batches, and one block of one of them, or, at the end, the
    heads of both. `trajectory` stays empty where the models
    have different numbers of blocks, or embeddings so far apart that their streams are not in one basis.
    """

    def __init__(self, reference: Skeleton, candidate: Skeleton) -> None:
        self.streams = BlockStream(reference), BlockStream(candidate)
        self.trajectory: tuple[BlockError, ...] = ()
        self.costs: tuple[BlockCost, ...] = ()

    @torch.no_grad()
    def logits(self, batches: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits of reference and candidate for each batch of token ids. Raises InputError where the stream does.

        Where processes share the batches, for each of those that are this one's; `trajectory` is of all.
        """
        share = Share(len(batches), self.streams[0].skeleton.crew)
        batches = share.of(batches)
        started = [self._start(stream, batches) for stream in self.streams]
        hidden = [states for states, _ in started]
        depths = [len(stream.skeleton.blocks) for stream in self.streams]
        found = [_distance(-1, share, *hidden)]
        for index in range(max(depths)):
            taken: list[float | None] = [None, None]
            for side, (stream, depth, (states, calls)) in enumerate(zip(self.streams, depths, started, strict=True)):
                if index < depth:
                    begun = time.perf_counter()
                    stream.pass_block(index, states, calls)
                    taken[side] = time.perf_counter() - begun
            self.costs += (_cost(index, *taken),)
            found.append(_distance(index, share, *hidden))
        entered = found[0].relative_error
        if depths[0] == depths[1] and entered is not None and entered <= OTHER_BASIS:
            self.trajectory = tuple(found)
        for place, tokens in enumerate(batches):
            left, right = (
                stream.leave(tokens, states[place]) for stream, states in zip(self.streams, hidden, strict=True)
            )
            yield left, right
            hidden[0][place] = hidden[1][place] = torch.empty(0)
        for stream in self.streams:
            stream.skeleton.free_rest()

    @staticmethod
    def _start(stream: BlockStream, batches: Sequence[Tensor]) -> tuple[list[Tensor], list[list[BlockCall]]]:
        entered = stream.start(batches)
        stream.skeleton.free(stream.skeleton.model)
        return entered


def _cost(block: int, reference: float | None, candidate: float | None) -> BlockCost:
    resident = None
    status = Path("/proc/self/status")
    if status.is_file():
        lines = dict(line.partition(":")[::2] for line in status.read_text(encoding="utf-8").splitlines())
        resident = int(lines["RssAnon"].split()[0]) * 1024 if "RssAnon" in lines else None
    return BlockCost(block=block, reference_seconds=reference, candidate_seconds=candidate, resident_bytes=resident)


def _distance(block: int, share: Share, reference: Sequence[Tensor], candidate: Sequence[Tensor]) -> BlockError:
    sums = torch.zeros(3, dtype=torch.float64)
    for part in share.all(list(map(_differences, reference, candidate))):
        if not len(part):
            return BlockError(block=block, relative_error=None, cosine=None)
        sums += part
    errors, cosines, tokens = sums.tolist()
    return BlockError(block=block, relative_error=number(errors / tokens), cosine=number(cosines / tokens))


def _differences(reference: Tensor, candidate: Tensor) -> Tensor:
    """Sums over tokens of relative error and cosine, and their number; nothing where shapes differ."""
    if reference.shape != candidate.shape:
        return torch.empty(0, dtype=torch.float64)
    p, q = reference.double(), candidate.double()
    size = p.norm(dim=-1).clamp_min(1e-30)
    error = float(((q - p).norm(dim=-1) / size).sum())
    cosine = float(((p * q).sum(-1) / size / q.norm(dim=-1).clamp_min(1e-30)).sum())
    return torch.tensor([error, cosine, size.numel()], dtype=torch.float64)
