"""The time of one way to multiply, in a process that may die of it.

What a kernel's fault leaves behind, no program can mend but by ending, and one that waits for ever is not even a fault.
"""

import contextlib
import functools
import math
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Self

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from llmcompress.errors import MachineError
from llmcompress.kernels.nvrtc import many
from llmcompress.kernels.nvrtc import small as nvrtc
from llmcompress.kernels.triton.trial import (
    Case,
    Timer,
    checking,
    copies_for,
    graph_timer,
    random_inputs,
    random_linear,
    random_weight,
)
from llmcompress.kernels.triton.tuning import Choice, Fused, Lean
from llmcompress.kernels.triton.ways import product

PATIENCE = 180.0  # seconds for one configuration, compiling and making weights included
FAULT = 70  # exit code of a process whose GPU no longer answers
Measure = Callable[[Case, Choice], float]
Weights = list[dict[str, Tensor]]


class Died(Exception):
    """The process that measured is no more; the message says how it ended."""


@functools.lru_cache(maxsize=1)
def _weights(case: Case) -> tuple[Weights, Tensor]:
    first, dense = random_linear(case)
    cache = torch.cuda.get_device_properties(case.device).L2_cache_size if case.device.type == "cuda" else 0
    return [first, *(random_weight(case) for _ in range(copies_for(first, cache) - 1))], dense


@functools.lru_cache(maxsize=1)
def _inputs(case: Case) -> tuple[Weights, Tensor, Tensor]:
    weights, dense = _weights(replace(case, tokens=0))
    x = random_inputs(case)
    return weights, x, x.float() @ dense.T


def measured(case: Case, config: Choice, timer: Timer = graph_timer) -> float:
    """Microseconds of a product; infinite where `config` cannot run here, not a number where its product is wrong."""
    weights, x, wanted = _inputs(case)
    try:
        return checking(timer, wanted)(
            lambda copy: product(x, weights[copy], case.packing, case.rows, config), len(weights)
        )
    except (OutOfResources, MachineError):
        return math.inf


def compiled(job: tuple[Case, Choice]) -> None:
    """Have one configuration compiled: those in CUDA C++ do not run for it, others do, once."""
    case, config = job
    weight, x = _kept(replace(case, tokens=0)), torch.zeros((case.tokens, case.columns), device=case.device)
    given = (x.to(case.dtype), weight, case.packing, case.rows)
    with contextlib.suppress(OutOfResources, MachineError):
        if isinstance(config, Lean):
            nvrtc.ready(*given, config)
        elif isinstance(config, Fused):
            many.ready(*given, config)
        else:
            product(*given, config)


_kept = functools.lru_cache(maxsize=1)(random_weight)


def _serve(pipe: Connection, measure: Measure) -> None:
    """Say that it is there, then answer with times until the other end is closed; end where the GPU does not answer."""
    pipe.send(None)
    while True:
        try:
            case, config = pipe.recv()
        except EOFError:
            return
        try:
            time = measure(case, config)
            if case.device.type == "cuda":
                torch.cuda.synchronize(case.device)
        except torch.AcceleratorError:
            os._exit(FAULT)
        pipe.send(time)


class Apart:
    """`measure` in a process of its own, which is replaced when it died or took longer than `patience` seconds."""

    def __init__(self, measure: Measure = measured, patience: float = PATIENCE) -> None:
        self._measure, self._patience = measure, patience
        self._process: multiprocessing.process.BaseProcess | None = None
        self._pipe: Connection | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._end()

    def __call__(self, case: Case, config: Choice) -> float:
        """What `measure` gives. Raises Died where that ended the process, or did not end."""
        try:
            pipe = self._pipe or self._begin()
            pipe.send((case, config))
            if not pipe.poll(self._patience):
                raise Died(f"no answer in {self._patience:.0f} s")
            found: float = pipe.recv()
        except (EOFError, OSError):
            raise Died(f"its process ended with {self._end()}") from None
        except Died:
            self._end()
            raise
        return found

    def _begin(self) -> Connection:
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, self._measure), daemon=True)
        self._process.start()
        other.close()
        self._pipe.recv()
        return self._pipe

    def _end(self) -> int | None:
        """End the process; the code it ended with by itself."""
        process, self._process = self._process, None
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None
        if process is None:
            return None
        process.join(1)
        if process.exitcode is None:
            process.kill()
            process.join()
        return process.exitcode
