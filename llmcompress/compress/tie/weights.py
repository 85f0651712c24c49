"""What the linears of tied blocks multiply with: one weight for a group, and factors fitted to what each block loses.

With `W'` the shared weight and `H = mean x x^T` over what a linear reads, its factors are the best of their rank for
`tr (W - W' - up down) H (W - W' - up down)^T` (relaxed recursive transformers, arXiv 2410.20672, weighted by inputs).
Norms, biases and everything else that is no matrix stay each block's own.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmcompress.compress.lowrank import factors_of
from llmcompress.compress.observe import collect_hessians, local_name
from llmcompress.errors import InputError
from llmcompress.model.checkpoint import TORCH_DTYPES, read_tensor
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import BlockStream, linear_modules
from llmcompress.runtime.tying import corrected
from llmcompress.types import BlockTrace, LinearInfo, ModelTrace

FIRST, LAST, MEAN = "first", "last", "mean"
BASES = (FIRST, LAST, MEAN)  # whose weight a group shares
ADVICE = "remove blocks of it instead: llmcompress prune --blocks"
Factors = tuple[Tensor, Tensor]


class Group(NamedTuple):
    """Neighbouring blocks that share one weight: that of the first or the last of them, or their mean."""

    first: int
    size: int
    base: str = FIRST

    @property
    def blocks(self) -> range:
        return range(self.first, self.first + self.size)

    @property
    def own(self) -> int | None:
        """The block whose weight is shared, None for a mean."""
        return {FIRST: self.first, LAST: self.first + self.size - 1}.get(self.base)

    def __str__(self) -> str:
        return "+".join(map(str, self.blocks))


class Ties:
    """The weights of a model's blocks, and what they are in groups that share them.

    rank     of the factors of a linear whose weight is not the shared one; where a mean is shared, every block of the
             group has factors, of a rank so much smaller that all choices of a base take the same bytes
    linears  of each block by their names inside it
    factors  by group, block and name, the way round that the file keeps the weight; empty until `fit`
    """

    def __init__(self, skeleton: Skeleton, trace: ModelTrace, *, rank: int = 0, size: int = 2) -> None:
        """Raises InputError where a block has matrices that no linear has as its weight."""
        self.skeleton, self.rank = skeleton, rank
        self._trace = trace
        self.linears = tuple({local_name(info, linear): linear for linear in info.linears} for info in trace.blocks)
        self.factors: dict[tuple[Group, int, str], Factors] = {}
        self._stored = lru_cache(maxsize=2 * size)(self._read)
        for index, known in enumerate(self.linears):
            traced = {linear.tensor for linear in known.values()} - skeleton.names.converted
            for name in skeleton.block_tensors(index):
                if len(skeleton.files.tensors[name].shape) > 1 and name not in traced:
                    family = skeleton.config.model_type
                    raise InputError(f"blocks of a {family} model cannot be tied: {name} is no linear's weight", ADVICE)

    def _read(self, index: int) -> dict[str, Tensor]:
        """The weights of a block as they are stored, by name."""
        entries = self.skeleton.files.tensors
        return {name: read_tensor(entries[linear.tensor]) for name, linear in self.linears[index].items()}

    def alike(self, blocks: Collection[int]) -> bool:
        """Whether linears of some blocks have the same names, shapes and dtypes."""
        entries = self.skeleton.files.tensors
        kinds = [
            {n: (entries[x.tensor].dtype, entries[x.tensor].shape) for n, x in self.linears[b].items()} for b in blocks
        ]
        return all(left == right for left, right in pairwise(kinds))

    def shared(self, group: Group, name: str) -> Tensor:
        """The weight that a group shares, as it will be stored."""
        if group.own is not None:
            return self._stored(group.own)[name]
        weights = [self._stored(index)[name] for index in group.blocks]
        return torch.stack([weight.float() for weight in weights]).mean(0).to(weights[0].dtype)

    def weight(self, group: Group, index: int, name: str) -> Tensor:
        """What a linear of a tied block multiplies with, float32, the way round that the file keeps it."""
        shared, factors = self.shared(group, name), self.factors.get((group, index, name))
        return shared.float() if factors is None else corrected(shared, *factors)

    def rank_in(self, group: Group, linear: LinearInfo) -> int:
        """Rank of the factors in one linear."""
        rank = self.rank * (group.size - 1) // group.size if group.own is None else self.rank
        return min(rank, linear.rows, linear.columns)

    def saved_bytes(self, group: Group) -> int:
        """Bytes of the file that a group takes less than its blocks do apart."""
        saved, entries = 0, self.skeleton.files.tensors
        with_factors = group.size if group.own is None else group.size - 1
        for linear in self.linears[group.first].values():
            item = TORCH_DTYPES[entries[linear.tensor].dtype].itemsize
            factors = self.rank_in(group, linear) * (linear.rows + linear.columns)
            saved += item * (linear.weights * (group.size - 1) - factors * with_factors)
        return saved

    def fit(self, groups: Sequence[Group], batches: Sequence[Tensor]) -> None:
        """Fit the factors of every group to what its linears read in the whole model. Keeps one block's Hessians.

        batches  token batches, int64 `(batch, tokens)`
        """
        stream = BlockStream(self.skeleton)
        with torch.no_grad():
            hidden, calls = stream.start(batches)
        for index, info in enumerate(self._trace.blocks):
            block = self.skeleton.load_block(index)
            runs = [partial(stream.run_block, index, h, call[index]) for h, call in zip(hidden, calls, strict=True)]
            some = [group for group in groups if index in group.blocks and group.own != index]
            if some:
                seen = collect_hessians(block, info, runs)
                hessians = {number: found.hessian for number, found in seen.items()}
                for group in some:
                    self._fit_block(group, info, hessians)
            with torch.no_grad():
                hidden = [stream.keep(run()) for run in runs]
            self.skeleton.free(block)
        self.skeleton.free_rest()

    def _fit_block(self, group: Group, info: BlockTrace, hessians: Mapping[int, Tensor]) -> None:
        for name, linear in self.linears[info.index].items():
            rank = self.rank_in(group, linear)
            if not rank:
                continue
            own = self._stored(info.index)[name]
            error = own.float() - self.shared(group, name).float()
            error = error.T if linear.transposed else error
            hessian = hessians[linear.shared_input].cpu()
            if not torch.isfinite(hessian).all():
                raise InputError(f"{linear.name}: its inputs are not finite on calibration text", "use other text")
            up, down = factors_of(error, hessian, rank, own.dtype)
            pair = (down.T.contiguous(), up.T.contiguous()) if linear.transposed else (up, down)
            self.factors[group, info.index, name] = pair


class Tied:
    """A variant of the model: some groups of its blocks share their weights."""

    def __init__(self, ties: Ties, groups: Collection[Group]) -> None:
        self.ties, self.groups = ties, tuple(sorted(groups))
        self._group_of = {index: group for group in self.groups for index in group.blocks}

    def changes(self, index: int) -> bool:
        """Whether a block has another weight than its own."""
        return index in self._group_of and self._group_of[index].own != index

    def passes_over(self, index: int) -> bool:
        """No block: all are computed."""
        return False

    @contextmanager
    def changed(self, skeleton: Skeleton, index: int) -> Iterator[None]:
        """While inside, the loaded block has the weights that it shares."""
        if not self.changes(index):
            yield
            return
        modules: dict[str, Any] = dict(linear_modules(skeleton.blocks[index]))
        kept = {name: modules[name].weight.data for name in self.ties.linears[index]}
        try:
            for name, weight in kept.items():
                modules[name].weight.data = self.ties.weight(self._group_of[index], index, name).to(weight.device)
            yield
        finally:
            for name, weight in kept.items():
                modules[name].weight.data = weight
