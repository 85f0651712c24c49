"""How long linears take on this machine: contenders in turn, on weights that the caches have forgotten."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor

from llmcompress.kernels import ops, stored
from llmcompress.spec import LinearSpec

LEAST_ROUNDS = 9

Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Contender:
    """One way to do a linear: a call for each of its copies, the bytes that one reads, and its error.

    error  norm of what is wrong over the norm of the exact outputs of the weights it really stores
    """

    label: str
    calls: tuple[Call, ...]
    weight_bytes: int
    error: float | None = None


@dataclass(frozen=True)
class Timing:
    """Time of one call in microseconds: the middle of all, and the tenths at either end."""

    label: str
    microseconds: float
    low: float
    high: float
    gigabytes_per_second: float
    error: float | None


def race(contenders: Sequence[Contender], x: Tensor, seconds: float) -> list[Timing]:
    """Time all in turn for `seconds` altogether; speeds are those of the fastest tenth, when nothing else ran."""
    taken: list[list[float]] = [[] for _ in contenders]
    turns = [cycle(contender.calls) for contender in contenders]
    for contender in contenders:
        for call in contender.calls:
            call(x)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(taken[0]) < LEAST_ROUNDS:
        for times, turn in zip(taken, turns, strict=True):
            next(turn)(x)  # threads are awake and code is there, as in a model
            call = next(turn)
            begin = time.perf_counter()
            call(x)
            times.append(time.perf_counter() - begin)
    return [_timing(contender, sorted(times)) for contender, times in zip(contenders, taken, strict=True)]


def _timing(contender: Contender, times: list[float]) -> Timing:
    low, middle, high = (times[len(times) * tenth // 10] for tenth in (1, 5, 9))
    speed = contender.weight_bytes / low / 1e9
    return Timing(contender.label, middle * 1e6, low * 1e6, high * 1e6, speed, contender.error)


def packed(label: str, spec: LinearSpec, copies: Sequence[Mapping[str, Tensor]], x: Tensor) -> Contender:
    """The packed linear whose tensors `copies` are, by the ends of their names, with the backend that is in force."""
    first = copies[0]
    codes = stored.codes_of("", spec, lambda name: first[name])
    names, size, form = ops.names_of(ops.FILE, tuple(first)), codes.codes.shape, spec.model_dump_json()

    def call(tensors: list[Tensor]) -> Call:
        return lambda x: ops.run(x, tensors, names, form, size)

    calls = tuple(call(list(copy.values())) for copy in copies)
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in first.values())
    return Contender(label, calls, nbytes, _error(calls[0](x), x, codes.dequantize()))


def dense(label: str, weights: Sequence[Tensor], x: Tensor) -> Contender:
    """`F.linear` with weights of some dtype, to which inputs are cast."""
    dtype = weights[0].dtype

    def call(weight: Tensor) -> Call:
        return lambda x: torch.nn.functional.linear(x.to(dtype), weight)

    calls = tuple(call(weight) for weight in weights)
    nbytes = weights[0].numel() * weights[0].element_size()
    return Contender(label, calls, nbytes, _error(calls[0](x), x, weights[0]))


def _error(found: Tensor, x: Tensor, weight: Tensor) -> float:
    exact = x.double() @ weight.double().T
    return float((found.double() - exact).norm() / exact.norm())


def read_gigabytes_per_second(seconds: float = 0.5) -> float:
    """The most that this machine reads from memory with torch's threads: sums of a quarter of a gigabyte."""
    block = torch.ones(1 << 26)
    contender = Contender("read", (lambda x: block.sum(),), block.numel() * block.element_size())
    return race([contender], block[:1], seconds)[0].gigabytes_per_second
