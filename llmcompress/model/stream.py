"""Run a model a block at a time, with the very arguments the whole model would pass.

The model's own forward is run with its blocks replaced: at the start to learn what each block is
given (masks, positions, rotary tables; they differ between blocks in sliding-window models), at the
end to turn the last hidden states into logits. Nothing here knows a model family.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.errors import InputError
from llmcompress.experts import Experts
from llmcompress.model.products import Quick
from llmcompress.model.shelf import Tray
from llmcompress.model.skeleton import Skeleton

Forward = Callable[..., Any]


@dataclass(frozen=True)
class BlockCall:
    """How the model calls one block: everything but the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def hidden_of(output: Any) -> Tensor:
    """The hidden states a block returned, whether bare or first of a tuple."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.shape == right.shape and left.dtype == right.dtype and bool(torch.equal(left, right))
    if isinstance(left, (tuple, list)) and isinstance(right, (tuple, list)):
        return len(left) == len(right) and all(map(_same, left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    return left is right or (not isinstance(left, Tensor) and bool(left == right))


class _Stop(Exception):
    """Leaves the model's forward once the last block was reached."""


def call_block(block: nn.Module, hidden: Tensor, call: BlockCall) -> Tensor:
    """Hidden states leaving a block."""
    with Quick():
        return hidden_of(block(hidden, *call.args, **call.kwargs))


class BlockStream:
    """Streams token batches through a skeleton.

    `calls(i)` holds the arguments of block i. Token batches are int64 `(batch, tokens)`, hidden
    states float32 `(batch, tokens, hidden)`, logits float32 `(batch, tokens, vocabulary)`.
    """

    def __init__(self, skeleton: Skeleton) -> None:
        self.skeleton = skeleton
        self._calls: dict[tuple[int, ...], list[list[BlockCall]]] = {}
        self._returns_tuple: bool | None = None

    @contextmanager
    def _blocks_replaced(self, make: Callable[[int], Forward]) -> Iterator[None]:
        blocks = list(self.skeleton.blocks)
        try:
            for index, block in enumerate(blocks):
                block.forward = make(index)
            yield
        finally:
            for block in blocks:
                del block.forward  # the instance attribute; the class's own forward shows again

    def _run(self, tokens: Tensor) -> Any:
        return self.skeleton.model(input_ids=tokens.to(self.skeleton.device), use_cache=False)

    def _wrap(self, hidden: Tensor) -> Any:
        return (hidden,) if self._returns_tuple else hidden

    @torch.no_grad()
    def enter(self, tokens: Tensor) -> tuple[Tensor, list[BlockCall]]:
        """Hidden states entering block 0 and the arguments of every block.

        Needs the entrance and block 0 loaded: block 0 is run once to learn what blocks return.
        """
        first = self.skeleton.blocks[0]
        genuine = type(first).forward
        entering: list[Tensor] = []
        calls: list[BlockCall] = []

        def make(index: int) -> Forward:
            def record(*args: Any, **kwargs: Any) -> Any:
                hidden, call = _split(args, kwargs)
                calls.append(call)
                if index == 0:
                    entering.append(hidden)
                    if self._returns_tuple is None:
                        output = genuine(first, *args, **kwargs)
                        self._returns_tuple = isinstance(output, tuple)
                if index == len(self.skeleton.blocks) - 1:
                    raise _Stop
                return self._wrap(hidden)

            return record

        with self._blocks_replaced(make), suppress(_Stop):
            self._run(tokens)
        if len(calls) != len(self.skeleton.blocks):
            raise InputError("the model does not run its blocks one after the other", "report this model family")
        return entering[0], self._shared(tuple(tokens.shape), calls)

    def _shared(self, shape: tuple[int, ...], calls: list[BlockCall]) -> list[BlockCall]:
        """Keep one copy of arguments that are equal for every batch of a shape; most models' are."""
        known = self._calls.setdefault(shape, [])
        for seen in known:
            if all(_same(a.args, b.args) and _same(a.kwargs, b.kwargs) for a, b in zip(seen, calls, strict=True)):
                return seen
        known.append(calls)
        return calls

    def run_block(self, index: int, hidden: Tensor, call: BlockCall) -> Tensor:
        """Hidden states leaving block `index`, which must be loaded, by this package's own products."""
        return call_block(self.skeleton.blocks[index], hidden, call)

    @torch.no_grad()
    def leave(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """Logits from the hidden states that left the last block; loads the exit where it is not there."""
        return self.logits_of(tokens, hidden)

    def logits_of(self, tokens: Tensor, hidden: Tensor) -> Tensor:
        """`leave` with gradients where the caller has them enabled."""
        last = len(self.skeleton.blocks) - 1

        def make(index: int) -> Forward:
            def passing(*args: Any, **kwargs: Any) -> Any:
                return self._wrap(hidden if index == last else _split(args, kwargs)[0])

            return passing

        self.skeleton.load_exit()
        with self._blocks_replaced(make), self._embedding_spared():
            logits: Tensor = self._run(tokens).logits
        return logits.float()

    @contextmanager
    def _embedding_spared(self) -> Iterator[None]:
        """Where the embedding is not loaded: nothing depends on what it says once the blocks were passed."""
        embedding = self.skeleton.model.get_input_embeddings()
        weight = embedding.weight
        if not weight.is_meta:
            yield
            return
        zero = torch.zeros((), device=self.skeleton.device)
        embedding.forward = lambda ids, *_, **__: zero.expand(*ids.shape, weight.shape[-1])
        try:
            yield
        finally:
            del embedding.forward

    @torch.no_grad()
    def logits(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Logits of each batch, every block loaded once and freed again."""
        hidden, calls = self.start(batches)
        self.skeleton.free_rest()
        for index in range(len(self.skeleton.blocks)):
            self.pass_block(index, hidden, calls)
        for place, tokens in enumerate(batches):
            yield self.leave(tokens, hidden[place])
            hidden[place] = torch.empty(0)
        self.skeleton.free_rest()

    @torch.no_grad()
    def pass_block(self, index: int, hidden: list[Tensor], calls: Sequence[Sequence[BlockCall]]) -> None:
        """Load block `index`, put what leaves it in the place of every batch's hidden states, and free it.

        To the bit what the model itself computes.
        """
        block = self.skeleton.load_block(index)
        for place, calls_of in enumerate(calls):
            call = calls_of[index]
            hidden[place] = self.keep(hidden_of(block(hidden[place], *call.args, **call.kwargs)))
        self.skeleton.free(block)

    def keep(self, hidden: Tensor) -> Tensor:
        """Hidden states that wait for the next block, in memory or not as the skeleton's shelf has it."""
        return self.skeleton.shelf.keep(hidden)

    def start(self, batches: Sequence[Tensor]) -> tuple[list[Tensor], list[list[BlockCall]]]:
        """Enter every batch. The entrance and block 0 stay loaded."""
        self.skeleton.load_entrance()
        self.skeleton.load_block(0)
        entered = [self.enter(tokens) for tokens in batches]
        tray = Tray(self.keep)
        return [tray(hidden) for hidden, _ in entered], [call for _, call in entered]


def _split(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, BlockCall]:
    """Separate the hidden states from the other arguments of a block."""
    if args:
        return args[0], BlockCall(args[1:], kwargs)
    others = {key: value for key, value in kwargs.items() if key != "hidden_states"}
    return kwargs["hidden_states"], BlockCall((), others)


def linear_modules(block: nn.Module) -> dict[str, nn.Module]:
    """The linears of a block by their name inside it: `nn.Linear` and GPT-2's `Conv1D`."""
    return {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }


def steady_linears(block: nn.Module) -> dict[str, nn.Module]:
    """The linears of a block that read every token, by name inside it: not those of experts.

    What an expert reads changes with the router's choice, so that nothing can be followed through it.
    """
    inside = {id(part) for module in block.modules() if isinstance(module, Experts) for part in module.modules()}
    return {name: module for name, module in linear_modules(block).items() if id(module) not in inside}
