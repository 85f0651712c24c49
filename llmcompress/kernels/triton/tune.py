"""Measure tile sizes on the GPU at hand, for the linears of one checkpoint.

Compiling takes far longer than measuring, so kernels are compiled by several processes first; Triton's cache on disk
hands them over.
"""

import functools
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from llmcompress.errors import InputError, MachineError
from llmcompress.kernels.nvrtc import small as nvrtc
from llmcompress.kernels.triton.layout import COUNTERS, NO_TABLE, ONE_TABLE, Packing, packing_of
from llmcompress.kernels.triton.small import multiply
from llmcompress.kernels.triton.tuning import BUCKETS, Config, Lean, choose
from llmcompress.spec import LinearSpec

CACHES = 4  # copies of a weight take this many times the cache, so that it comes from memory
MOST_COPIES, REPLAYS = 64, 20
Work = Callable[[int], object]
Job = tuple[Packing, int, int, Config | Lean, torch.dtype, torch.device]
Trials = Callable[[Packing, int, bool], Iterable[Config | Lean]]
Timer = Callable[[Work, int], float]


@dataclass(frozen=True)
class Tuned:
    """The fastest of the configurations tried for one linear and up to `tokens` tokens, in microseconds a product.

    `before` is the time of what would have been used otherwise, `tried` has the times of all.
    """

    key: str
    tokens: int
    config: Config | Lean
    microseconds: float
    before: float
    tried: Mapping[Config | Lean, float]


def random_weight(packing: Packing, rows: int, device: torch.device) -> dict[str, Tensor]:
    """Tensors as `layout.prepare` makes them, with random contents; `packing` has a planar order."""
    if packing.planar is None:
        raise InputError(f"{packing.label}: no planar order", "there is nothing to tune")
    order, columns = packing.planar, packing.columns
    width = order.blocks(columns) * order.planes * order.words
    found = {
        "words": torch.randint(-(1 << 15), 1 << 15, (rows, width), dtype=torch.int16, device=device),
        "counters": torch.zeros(COUNTERS, dtype=torch.int32, device=device),
    }
    shape = (columns // packing.group if packing.group else 1, rows)
    if packing.table in (NO_TABLE, ONE_TABLE):
        kind = torch.float32 if packing.table else torch.bfloat16
        found["scale"] = torch.rand(shape, device=device).to(kind) / columns
    if packing.zero:
        found["zero"] = torch.randint(256, shape, dtype=torch.uint8, device=device)
    if packing.table:
        tables = 1 if packing.table == ONE_TABLE else rows
        found["table"] = torch.rand((tables, 1 << packing.bits), device=device)
    return found


def candidates(packing: Packing, most: int, lean: bool = False) -> Iterator[Config | Lean]:
    """What is worth trying for up to `most` tokens: tiles, parts, warps and stages; `lean` with the other kernel."""
    if lean and most <= nvrtc.MOST_TOKENS:
        yield from (Lean(warps, 2, early) for warps in (4, 8, 16) for early in (0, 1))
        yield from (Lean(warps, 3, 1) for warps in (4, 8))
    for rows, warps in ((32, 2), (64, 4), (128, 4), (128, 8)):
        for split in (1, 2, 4, 8):
            if split <= packing.blocks and (most <= 32 or split <= 2):
                yield from (Config(rows, most, split, warps, stages) for stages in (2, 3))


def graph_timer(work: Work, copies: int) -> float:
    """Microseconds of one call of `work(copy)`, as it runs in a captured graph: median of 20 replays of all copies."""
    for copy in range(copies):
        work(copy)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for copy in range(copies):
            work(copy)
    times: list[float] = []
    for _ in range(REPLAYS):
        begin, end = _event(), _event()
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / copies)
    return statistics.median(times)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def copies_for(weight: Mapping[str, Tensor], cache: int) -> int:
    """How many copies of a weight the cache cannot hold."""
    size = sum(tensor.numel() * tensor.element_size() for name, tensor in weight.items() if name != "counters")
    return min(-(-CACHES * cache // size), MOST_COPIES)


@dataclass(frozen=True)
class Search:
    """The numbers of tokens to tune for, and what is tried for each."""

    tokens: tuple[int, ...]
    trials: Trials


def tune(
    linears: Iterable[tuple[LinearSpec, int, int]], dtype: torch.dtype, device: torch.device, *,
    timer: Timer = graph_timer, workers: int | None = None, search: Search | None = None,
) -> Iterator[Tuned]:  # fmt: skip
    """The best configuration of each `(spec, rows, columns)` and number of tokens; those that cannot run lose.

    Linears whose codes have no planar order are passed over: they are multiplied in strips. `workers` processes
    compile beforehand: as many as there are processors, where it is None; 0 for none.
    """
    packings = dict.fromkeys((packing_of(spec, columns), rows) for spec, rows, columns in linears)
    search = search or Search(BUCKETS, candidates)
    trials = search.trials
    planar, buckets = [pair for pair in packings if pair[0].planar is not None], search.tokens
    jobs = [
        (*pair, most, config, dtype, device)
        for pair in planar
        for most in buckets
        for config in trials(pair[0], most, nvrtc.fits(pair[0], dtype, device))
    ]
    compile_ahead(jobs, (os.cpu_count() or 1) if workers is None else workers)
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    for packing, rows in planar:
        first = random_weight(packing, rows, device)
        weights = [first, *(random_weight(packing, rows, device) for _ in range(copies_for(first, cache) - 1))]
        for most in buckets:
            x = torch.randn((most, packing.columns), device=device).to(dtype)
            lean = nvrtc.fits(packing, dtype, device)
            usual = choose(packing, rows, most, device, lean)
            configs = dict.fromkeys((usual, *trials(packing, most, lean)))
            times = {config: _time(timer, weights, x, (packing, rows, config)) for config in configs}
            best = min(times, key=times.__getitem__)
            key = f"{packing.label} {rows}x{packing.columns}"
            yield Tuned(key, most, best, times[best], times[usual], times)


def compile_ahead(jobs: Iterable[Job], workers: int) -> None:
    """Compile what will be tried, in so many processes; kernels know the columns of a weight, not its rows."""
    needed = {(job[0], *job[2:4]): job for job in jobs}
    if workers and needed:
        with ProcessPoolExecutor(min(workers, len(needed)), multiprocessing.get_context("spawn")) as pool:
            list(pool.map(_compile, needed.values(), chunksize=4))


_kept = functools.lru_cache(maxsize=1)(random_weight)


def _compile(job: Job) -> None:
    """Run one configuration once."""
    packing, rows, most, config, dtype, device = job
    x = torch.zeros((most, packing.columns), device=device).to(dtype)
    _time(_once, [_kept(packing, rows, device)], x, (packing, rows, config))


def _once(work: Work, copies: int) -> float:
    for copy in range(copies):
        work(copy)
    return 0.0


def _time(timer: Timer, weights: list[dict[str, Tensor]], x: Tensor, what: tuple[Packing, int, Config | Lean]) -> float:
    packing, rows, config = what

    def work(copy: int) -> Tensor:
        if isinstance(config, Lean):
            return nvrtc.multiply(x, weights[copy], packing, rows, config)
        return multiply(x, weights[copy], packing, rows, config)

    try:
        return timer(work, len(weights))
    except (OutOfResources, MachineError):
        return float("inf")
