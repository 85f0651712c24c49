"""Measure tile sizes on the GPU at hand, for the linears of one checkpoint.

Compiling takes far longer than measuring, so kernels are compiled by several processes first; Triton's cache on disk
hands them over. What gives another product than torch with the weights that were packed is refused, however fast.
"""

import functools
import math
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
from llmcompress.kernels import fourbit
from llmcompress.kernels.codes import Codes
from llmcompress.kernels.nvrtc import many
from llmcompress.kernels.nvrtc import small as nvrtc
from llmcompress.kernels.triton import large
from llmcompress.kernels.triton.layout import COUNTERS, NO_TABLE, ONE_TABLE, Packing, packing_of, planar_words
from llmcompress.kernels.triton.small import multiply
from llmcompress.kernels.triton.tuning import BUCKETS, MANY, Choice, Config, Fused, Lean, Strips, choose, choose_many
from llmcompress.spec import LinearSpec

CACHES = 4  # copies of a weight take this many times the cache, so that it comes from memory
MOST_COPIES, REPLAYS = 64, 20
WRONG = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}  # ten times what rounding explains
MANY_TILES = ((64, 4), (128, 8))  # rows and warps
Work = Callable[[int], Tensor]
Job = tuple[Packing, int, int, Choice, torch.dtype, torch.device]
Trials = Callable[[Packing, int, bool], Iterable[Choice]]
Timer = Callable[[Work, int], float]


@dataclass(frozen=True)
class Tuned:
    """The fastest of the configurations tried for one linear and up to `tokens` tokens, in microseconds a product.

    `before` is the time of what would have been used otherwise, `tried` has the times of all, infinite where one cannot
    run here, `wrong` those that gave wrong products.
    """

    key: str
    tokens: int
    config: Choice
    microseconds: float
    before: float
    tried: Mapping[Choice, float]
    wrong: tuple[Choice, ...] = ()


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
        found["scale"] = torch.rand(shape, device=device).to(kind) / columns**0.5
    if packing.zero:
        found["zero"] = torch.randint(256, shape, dtype=torch.uint8, device=device)
    if packing.table:
        tables = 1 if packing.table == ONE_TABLE else rows
        found["table"] = torch.rand((tables, 1 << packing.bits), device=device)
    return found


def random_linear(spec: LinearSpec, rows: int, columns: int, device: torch.device) -> tuple[dict[str, Tensor], Tensor]:
    """The same, of codes that are known, and the float32 weight they stand for, `(rows, columns)`."""
    packing = packing_of(spec, columns)
    weight = random_weight(packing, rows, device)
    codes = torch.randint(1 << spec.bits, (rows, columns), dtype=torch.uint8, device=device)
    if packing.planar is not None:
        weight["words"] = planar_words(codes, packing.planar)
    scale = weight["scale"].T.contiguous() if "scale" in weight else torch.empty((rows, 0), device=device)
    zero, book = weight.get("zero"), None
    if packing.table == ONE_TABLE:
        weight["table"] = fourbit.table_of(spec.kind)[None, :].to(device)
        scale = scale.flatten()
    elif packing.table:
        book = weight["table"].half()
        weight["table"] = book.float()
    known = Codes(codes, scale, spec, zero=None if zero is None else zero.T.contiguous(), codebook=book)
    return weight, known.dequantize()


def candidates(packing: Packing, most: int, lean: bool = False) -> Iterator[Choice]:
    """What is worth trying for up to `most` tokens: tiles, parts, warps and stages; `lean` with those in CUDA C++."""
    if most > BUCKETS[-1]:
        yield Strips()
        yield from (Config(rows, BUCKETS[-1], 1, warps, 3) for rows, warps in MANY_TILES)
        yield from many.candidates(packing) if lean else ()
        return
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
    found = {(packing_of(spec, columns), rows): spec for spec, rows, columns in linears}
    planar = {pair: spec for pair, spec in found.items() if pair[0].planar is not None}
    search = search or Search((*BUCKETS, *MANY), candidates)
    jobs = [
        (*pair, most, config, dtype, device)
        for pair in planar
        for most in search.tokens
        for config in search.trials(pair[0], most, _lean(pair[0], most, dtype, device))
    ]
    compile_ahead(jobs, (os.cpu_count() or 1) if workers is None else workers)
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    for (packing, rows), spec in planar.items():
        first, dense = random_linear(spec, rows, packing.columns, device)
        weights = [first, *(random_weight(packing, rows, device) for _ in range(copies_for(first, cache) - 1))]
        for most in search.tokens:
            x = torch.randn((most, packing.columns), device=device).to(dtype)
            yield _best(timer, weights, (x, x.float() @ dense.T), (packing, rows, search.trials))


def _lean(packing: Packing, most: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a kernel in CUDA C++ can multiply so many tokens."""
    fits = many.fits if most > BUCKETS[-1] else nvrtc.fits
    return fits(packing, dtype, device)


def _best(
    timer: Timer, weights: list[dict[str, Tensor]], given: tuple[Tensor, Tensor], what: tuple[Packing, int, Trials]
) -> Tuned:
    """The fastest of those that are right; `given` are inputs and what the first weight makes of them."""
    (x, wanted), (packing, rows, trials) = given, what
    key, most = f"{packing.label} {rows}x{packing.columns}", len(x)
    lean = _lean(packing, most, x.dtype, x.device)
    usual = (choose_many if most > BUCKETS[-1] else choose)(packing, rows, most, x.device, lean)
    times: dict[Choice, float] = {}
    wrong: list[Choice] = []
    for config in dict.fromkeys((usual, *trials(packing, most, lean))):
        times[config] = _time(_checking(timer, wanted), weights, x, (packing, rows, config))
        if math.isnan(times[config]):
            wrong.append(config)
            times[config] = float("inf")
    best = min(times, key=times.__getitem__)
    if math.isinf(times[best]):
        raise MachineError(f"{key}, {most} tokens: no kernel gives the right product", "report it with the GPU's name")
    return Tuned(key, most, best, times[best], times[usual], times, tuple(wrong))


def _checking(timer: Timer, wanted: Tensor) -> Timer:
    """`timer` for those whose product with the first weight is `wanted`, not a number for others."""

    def timed(work: Work, copies: int) -> float:
        return timer(work, copies) if is_right(work, wanted) else float("nan")

    return timed


def is_right(work: Work, wanted: Tensor) -> bool:
    """Whether every row and every token of `work(0)` is `wanted`, float32 `(tokens, rows)`, but for rounding.

    What is written nowhere shows: the memory that is free then holds no numbers.
    """
    dtype = work(0).dtype
    torch.full(wanted.shape, float("nan"), dtype=dtype, device=wanted.device)
    error = work(0).float() - wanted
    worst = [error.norm(dim=dim).max() / wanted.norm(dim=dim).mean() for dim in (0, 1)]
    return bool(all(part <= WRONG[dtype] for part in worst))


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


def _time(timer: Timer, weights: list[dict[str, Tensor]], x: Tensor, what: tuple[Packing, int, Choice]) -> float:
    try:
        return timer(lambda copy: product(x, weights[copy], what), len(weights))
    except (OutOfResources, MachineError):
        return float("inf")


def product(x: Tensor, weight: Mapping[str, Tensor], what: tuple[Packing, int, Choice]) -> Tensor:
    """`x` times the transposed weight of so many rows, in one certain way."""
    packing, rows, config = what
    if isinstance(config, Lean):
        return nvrtc.multiply(x, weight, packing, rows, config)
    if isinstance(config, Fused):
        return many.multiply(x, weight, packing, rows, config)
    if isinstance(config, Strips):
        return large.multiply(x, weight, packing, rows)
    return multiply(x, weight, packing, rows, config)
