"""Watch the inputs of a block's linears while calibration runs through it.

Where a linear's output is to be brought close to the full-precision model's, two copies of the block run side by
side: one as it will be stored, fed with what the stored model gives it, and one as it was.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.compress.rounding import Seen
from llmcompress.model.products import inner, turned
from llmcompress.model.shares import OrderedSums, Share
from llmcompress.model.stream import linear_modules
from llmcompress.types import BlockTrace, LinearInfo

STRIPE = 128  # rows of a Hessian added at a time, up to its diagonal: it is symmetric
TOKENS, HESSIAN, DRIFT, TERM = "tokens", "hessian ", "drift", "term "  # names of sums


def local_name(block: BlockTrace, linear: LinearInfo) -> str:
    """Name of a linear inside its block."""
    return linear.name.removeprefix(block.name + ".")


def module_of(block: nn.Module, info: BlockTrace, linear: LinearInfo) -> nn.Module:
    """The module of a traced linear."""
    return linear_modules(block)[local_name(info, linear)]


def weight_of(block: nn.Module, info: BlockTrace, linear: LinearInfo) -> Tensor:
    """The weight of a traced linear as `(rows, columns)`, whatever way round the module keeps it."""
    weight: Tensor = module_of(block, info, linear).weight  # type: ignore[assignment]
    return weight.detach().T if linear.transposed else weight.detach()


@torch.no_grad()
def install_weight(block: nn.Module, info: BlockTrace, linear: LinearInfo, weight: Tensor) -> None:
    """Put a `(rows, columns)` weight into the module of a traced linear."""
    target: Tensor = module_of(block, info, linear).weight  # type: ignore[assignment]
    target.copy_(weight.T if linear.transposed else weight)


def groups_of(info: BlockTrace) -> dict[int, list[LinearInfo]]:
    """The linears of a block by the tensor they read, in call order."""
    groups: dict[int, list[LinearInfo]] = {}
    for linear in info.linears:
        groups.setdefault(linear.shared_input, []).append(linear)
    return groups


@contextmanager
def watching_inputs(block: nn.Module, info: BlockTrace, see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call `see(group, inputs)` with the input `(tokens, columns)` of each shared-input group as it is read."""
    handles = []
    for number, members in groups_of(info).items():

        def before(_: nn.Module, args: tuple[Any, ...], number: int = number) -> None:
            see(number, args[0].detach().flatten(0, -2))

        handles.append(module_of(block, info, members[0]).register_forward_pre_hook(before))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Enough(Exception):  # not an error: it ends a forward early
    """Leaves a block's forward once what was looked for has been read."""


Run = Callable[[], Tensor]  # a block on the hidden states that enter it


@dataclass
class Reading:
    """What one forward showed: the input of a group `(tokens, columns)`, and the stream each writer adds to.

    `streams` holds what there is after the writers have added to it where the watch is `whole`, and before otherwise;
    `leaving` are the hidden states that left the block, where it was run to its end.
    """

    inputs: Tensor
    streams: dict[str, Tensor]
    leaving: Tensor | None = None


class GroupWatch:
    """Reads the input of one shared-input group and what its linears' outputs are added to, and no further.

    `until`: the `input` has been read (and what is written, where the watch is `whole`), the `child` of the block
    that holds the group has finished, or the `end`. A watch is whole, if that is allowed, where all linears of the
    group write to streams and have fewer rows than columns: their drift is then cheaper to sum up where it arrives.
    """

    def __init__(self, info: BlockTrace, members: Sequence[LinearInfo], *, whole: bool) -> None:
        self._info = info
        self._first, self._last = local_name(info, members[0]), local_name(info, members[-1])
        names = {local_name(info, linear): linear.name for linear in members}
        self._writers = [(names[w.linear], w) for w in info.writers if w.linear in names]
        narrow = sum(linear.rows for linear in members) < members[0].columns
        self.whole = whole and narrow and len(self._writers) == len(members)

    @torch.no_grad()
    def read(self, block: nn.Module, hidden: Tensor, run: Run, *, until: str = "input") -> Reading:
        """Run a block on `hidden` as far as need be."""
        seen: dict[str, Tensor] = {"": hidden}
        found: list[Tensor] = []
        leaving = None
        with self._hooks(block, seen, found, until), suppress(Enough):
            leaving = run()
        parts = {name: (*w.after, *([w.linear] if self.whole else [])) for name, w in self._writers}
        streams = {name: seen[w.norm] + sum(seen[n] for n in parts[name]) for name, w in self._writers}
        flat = {name: stream.flatten(0, -2).float() for name, stream in streams.items()}
        return Reading(found[0].flatten(0, -2).float(), flat, leaving)

    @contextmanager
    def _hooks(self, block: nn.Module, seen: dict[str, Tensor], found: list[Tensor], until: str) -> Iterator[None]:
        def reads(name: str) -> Callable[..., None]:
            return lambda _, args: seen.update({name: args[0]})

        def wrote(name: str) -> Callable[..., None]:
            return lambda _, __, output: seen.update({name: output})

        def enough(*_: Any) -> None:
            raise Enough

        module = block.get_submodule
        norms = {w.norm for _, w in self._writers if w.norm}
        parts = {name for _, w in self._writers for name in (*w.after, *([w.linear] if self.whole else []))}
        handles = [module(name).register_forward_pre_hook(reads(name)) for name in norms]
        handles += [module(name).register_forward_hook(wrote(name)) for name in parts]
        first = module(self._first)
        handles.append(first.register_forward_pre_hook(lambda _, args: found.append(args[0])))
        if until == "input" and self.whole:
            handles.append(module(self._last).register_forward_hook(enough))
        elif until == "input":
            handles.append(first.register_forward_pre_hook(enough))
        elif until == "child":
            handles.append(module(self._first.partition(".")[0]).register_forward_hook(enough))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class InputSums:
    """Running sums over tokens of everything that is asked about one group; `whole` as in its watch."""

    def __init__(self, share: Share | None = None, *, whole: bool = False) -> None:
        self.whole, self._sums = whole, OrderedSums(share or Share(0))

    def add(self, stored: Reading, full: Reading | None = None) -> None:
        """One batch, in the stored model and, where it is run, in the full-precision one."""
        x = turned(stored.inputs)
        _put_inputs(self._sums, "", x)
        if full is not None:
            if not self.whole:
                self._sums.put(DRIFT, inner(turned(full.inputs - stored.inputs), x))
            for name, stream in stored.streams.items():
                self._sums.put(TERM + name, inner(turned(full.streams[name] - stream), x))
        self._sums.close_batch()

    def means(self) -> tuple[Seen, dict[str, Tensor]]:
        """What was seen, and for every linear that writes to a stream its term `(rows, columns)`, see `Targets.of`.

        Both are taken out of here, and are the same on every process that shares the text.
        """
        totals = self._sums.take()
        seen = _seen(totals, "")
        count = max(seen.tokens, 1)
        drift = None if DRIFT not in totals else totals.pop(DRIFT).div_(count)
        terms = {name: total.div_(count) for name, total in _taken(totals, TERM).items()}
        return replace(seen, drift=drift), terms


class GroupSums:
    """The same for all shared-input groups of a block at once, or for some, of what they read alone."""

    def __init__(self, share: Share | None = None, only: Collection[int] | None = None) -> None:
        self._sums, self._only = OrderedSums(share or Share(0)), only

    def see(self, number: int, inputs: Tensor) -> None:
        """The input `(tokens, columns)` of a group; for `watching_inputs`."""
        if self._only is None or number in self._only:
            _put_inputs(self._sums, f"{number} ", turned(inputs.float()))

    def close_batch(self) -> None:
        """All groups have been seen for a batch; an expert that no token reached may not have been."""
        self._sums.close_batch()

    def means(self) -> dict[int, Seen]:
        """What was seen, by group; taken out of here, and the same on every process that shares the text."""
        totals = self._sums.take()
        numbers = [int(name.partition(" ")[0]) for name in totals if name.endswith(f" {TOKENS}")]
        return {number: _seen(totals, f"{number} ") for number in numbers}


def _put_inputs(sums: OrderedSums, prefix: str, x: Tensor) -> None:
    """Add `x x^T` of inputs `(columns, tokens)` up to its diagonal, in stripes, and the number of tokens."""
    sums.put(prefix + TOKENS, torch.tensor([x.shape[1]]))
    for start in range(0, len(x), STRIPE):
        stop = start + STRIPE
        sums.put(f"{prefix}{HESSIAN}{start}", inner(x[start:stop], x[:stop]))


def _seen(totals: dict[str, Tensor], prefix: str) -> Seen:
    """The mean of what sums hold, which is taken out of them: of a wide input nothing in a run is larger."""
    if prefix + TOKENS not in totals:
        raise ValueError("nothing was added")
    tokens = int(totals.pop(prefix + TOKENS))
    stripes = {int(start): total for start, total in _taken(totals, prefix + HESSIAN).items()}
    columns = max(start + len(total) for start, total in stripes.items())
    found = stripes[0].new_empty(columns, columns)
    for start in sorted(stripes, reverse=True):  # the longest first: each is gone before all rows are there
        total = stripes.pop(start)
        found[start : start + len(total), : total.shape[1]] = total
        del total
    for start in range(0, columns, STRIPE):
        stop = start + STRIPE
        found[start:stop, start:stop] = _mirrored(found[start:stop, start:stop])
        found[start:stop, stop:] = found[stop:, start:stop].T
    return Seen(found.div_(max(tokens, 1)), tokens)


def _mirrored(square: Tensor) -> Tensor:
    """A matrix with what is below its diagonal also above it."""
    lower = square.tril()
    return lower + lower.tril(-1).T


def _taken(totals: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    names = [name for name in totals if name.startswith(prefix)]
    return {name.removeprefix(prefix): totals.pop(name) for name in names}


def seen_by(found: Seen, linear: LinearInfo) -> Seen:
    """What was seen of the input of a linear; of an expert's, which has a share of the tokens, steadied."""
    return found if linear.expert is None else found.steadied()


def collect_hessians(
    block: nn.Module,
    info: BlockTrace,
    runs: Sequence[Callable[[], Any]],
    share: Share | None = None,
    *,
    only: Collection[int] | None = None,
) -> dict[int, Seen]:
    """Mean of `x x^T` over all tokens for each shared-input group, or for some; `runs` run the block, a batch each.

    With a `share`, `runs` are those of this process's batches, and the means are over all of them.
    """
    sums = GroupSums(share, only)
    with torch.no_grad(), watching_inputs(block, info, sums.see):
        for run in runs:
            run()
            sums.close_batch()
    groups = groups_of(info)
    return {number: seen_by(found, groups[number][0]) for number, found in sums.means().items()}
