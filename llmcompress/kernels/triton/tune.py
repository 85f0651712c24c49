"""Measure tile sizes on the GPU at hand, for the linears of one checkpoint.

Compiling takes far longer than measuring, so kernels are compiled by several processes first; Triton's cache on disk
hands them over. What gives another product than torch with the weights that were packed is refused, however fast.
"""

import math
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace

import torch

from llmcompress.errors import MachineError
from llmcompress.kernels.nvrtc import many
from llmcompress.kernels.nvrtc import small as nvrtc
from llmcompress.kernels.triton.layout import Packing
from llmcompress.kernels.triton.measure import Apart, Died, Measure, compiled
from llmcompress.kernels.triton.trial import Case
from llmcompress.kernels.triton.tuning import BUCKETS, FEW, MANY, Choice, Config, Lean, Strips, choose, choose_many
from llmcompress.spec import LinearSpec

MANY_TILES = ((64, 4), (128, 8))  # rows and warps
Trials = Callable[[Packing, int, bool], Iterable[Choice]]


@dataclass(frozen=True)
class Tuned:
    """The fastest of the configurations tried for one linear and up to `tokens` tokens, in microseconds a product.

    `before` is the time of what would have been used otherwise, `tried` has the times of all, infinite where one cannot
    run here, `wrong` those that gave wrong products, `fatal` how those ended that took their process with them.
    """

    key: str
    tokens: int
    config: Choice
    microseconds: float
    before: float
    tried: Mapping[Choice, float]
    wrong: tuple[Choice, ...] = ()
    fatal: Mapping[Choice, str] = field(default_factory=dict)


def candidates(packing: Packing, most: int, lean: bool = False) -> Iterator[Choice]:
    """What is worth trying for up to `most` tokens: tiles, parts, warps and stages; `lean` with those in CUDA C++."""
    if most > BUCKETS[-1]:
        yield Strips()
        yield from (Config(rows, BUCKETS[-1], 1, warps, 3) for rows, warps in MANY_TILES)
        yield from many.candidates(packing) if lean else ()
        return
    if lean and most <= nvrtc.MOST_TOKENS:
        for terms in (1, 2) if nvrtc.takes_terms(packing, most) else (1,):
            yield from (Lean(warps, 2, early, terms) for warps in (4, 8, 16) for early in (0, 1))
            yield from (Lean(warps, 3, 1, terms) for warps in (4, 8))
    if most in FEW:
        return
    for rows, warps in ((32, 2), (64, 4), (128, 4), (128, 8)):
        for split in (1, 2, 4, 8):
            if split <= packing.blocks and (most <= 32 or split <= 2):
                yield from (Config(rows, most, split, warps, stages) for stages in (2, 3))


@dataclass(frozen=True)
class Search:
    """The numbers of tokens to tune for, and what is tried for each."""

    tokens: tuple[int, ...]
    trials: Trials


def tune(
    linears: Iterable[tuple[LinearSpec, int, int]], dtype: torch.dtype, device: torch.device, *,
    measure: Measure | None = None, workers: int | None = None, search: Search | None = None,
) -> Iterator[Tuned]:  # fmt: skip
    """The best configuration of each `(spec, rows, columns)` and number of tokens; those that cannot run lose.

    Linears whose codes have no planar order are passed over: they are multiplied in strips. `workers` processes
    compile beforehand: as many as there are processors, where it is None; 0 for none. `measure` takes the place of a
    process that may die of a kernel.
    """
    search = search or Search((*FEW, *BUCKETS, *MANY), candidates)
    whole = {(c.packing, c.rows): c for c in (Case(*linear, 0, dtype, device) for linear in linears)}
    planar = [case for case in whole.values() if case.packing.planar is not None]
    cases = [replace(case, tokens=most) for case in planar for most in search.tokens]
    compile_ahead(
        [(case, config) for case in cases for config in _possible(case, search.trials)],
        (os.cpu_count() or 1) if workers is None else workers,
    )
    with nullcontext(measure) if measure else Apart() as measuring:
        for case in cases:
            if trials := [*_possible(case, search.trials)]:
                yield _best(measuring, case, trials)


def _possible(case: Case, trials: Trials) -> Iterator[Choice]:
    """What is worth trying, and has room on the device."""
    for config in trials(case.packing, case.tokens, _lean(case)):
        if not isinstance(config, Lean) or nvrtc.possible(config, case.packing, case.tokens, case.device) == config:
            yield config


def _lean(case: Case) -> bool:
    """Whether a kernel in CUDA C++ can multiply so many tokens."""
    fits = many.fits if case.tokens > BUCKETS[-1] else nvrtc.fits
    return fits(case.packing, case.dtype, case.device)


def _best(measure: Measure, case: Case, trials: Iterable[Choice]) -> Tuned:
    """The fastest of those that are right."""
    lean, most = _lean(case), case.tokens
    usual = (choose_many if most > BUCKETS[-1] else choose)(case.packing, case.rows, most, case.device, lean)
    times: dict[Choice, float] = {}
    wrong: list[Choice] = []
    fatal: dict[Choice, str] = {}
    for config in dict.fromkeys((usual, *trials)):
        try:
            times[config] = measure(case, config)
        except Died as how:
            times[config], fatal[config] = math.inf, str(how)
        if math.isnan(times[config]):
            wrong.append(config)
            times[config] = math.inf
    best = min(times, key=times.__getitem__)
    if math.isinf(times[best]):
        said = f" ({next(iter(fatal.values()))})" if fatal else ""
        raise MachineError(
            f"{case.label}, {most} tokens: no kernel gives the right product{said}", "report it with the GPU's name"
        )
    return Tuned(case.label, most, best, times[best], times[usual], times, tuple(wrong), fatal)


def compile_ahead(jobs: Iterable[tuple[Case, Choice]], workers: int) -> None:
    """Compile what will be tried, in so many processes; kernels know the columns of a weight, not its rows."""
    needed = {(case.packing, case.tokens, config): (case, config) for case, config in jobs}
    if not workers or not needed:
        return
    with (
        suppress(BrokenProcessPool),  # what could not be compiled now is when it is measured
        ProcessPoolExecutor(min(workers, len(needed)), multiprocessing.get_context("spawn")) as pool,
    ):
        list(pool.map(compiled, needed.values(), chunksize=4))
