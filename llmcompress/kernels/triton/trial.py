"""A way to multiply with a packed weight on trial: random weights, whether its product is right, how long it takes."""

import functools
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.errors import InputError
from llmcompress.kernels import fourbit
from llmcompress.kernels.codes import Codes
from llmcompress.kernels.triton.layout import COUNTERS, NO_TABLE, ONE_TABLE, Packing, packing_of, planar_words
from llmcompress.spec import LinearSpec

CACHES = 4  # copies of a weight take this many times the cache, so that it comes from memory
MOST_COPIES, REPLAYS = 64, 20
WRONG = {torch.float32: 1e-4, torch.float16: 3e-3, torch.bfloat16: 2e-2}  # ten times what rounding explains
Work = Callable[[int], Tensor]
Timer = Callable[[Work, int], float]


@dataclass(frozen=True)
class Case:
    """What is multiplied: the format, rows and columns of a weight, and the inputs' number, dtype and device.

    scale   dtype of the scales; None: as files usually have them
    """

    spec: LinearSpec
    rows: int
    columns: int
    tokens: int
    dtype: torch.dtype
    device: torch.device
    scale: torch.dtype | None = None

    @functools.cached_property
    def packing(self) -> Packing:
        """How the weight lies in memory."""
        return packing_of(self.spec, self.columns)

    @property
    def label(self) -> str:
        """The weight, as tables name it."""
        return f"{self.packing.label} {self.rows}x{self.columns}"


def random_weight(case: Case, generator: torch.Generator | None = None) -> dict[str, Tensor]:
    """Tensors as `layout.prepare` makes them, with random contents, for codes that have a planar order."""
    packing, rows, columns, on = case.packing, case.rows, case.columns, case.device
    if packing.planar is None:
        raise InputError(f"{packing.label}: no planar order", "there is nothing to try")
    width = packing.blocks * packing.planar.planes * packing.planar.words
    shape = (columns // packing.group if packing.group else 1, rows)

    def whole(end: int, size: tuple[int, ...], dtype: torch.dtype, begin: int = 0) -> Tensor:
        return torch.randint(begin, end, size, dtype=dtype, device=on, generator=generator)

    found = {
        "words": whole(1 << 15, (rows, width), torch.int16, -(1 << 15)),
        "counters": torch.zeros(COUNTERS, dtype=torch.int32, device=on),
    }
    if packing.table in (NO_TABLE, ONE_TABLE):
        kind = case.scale or (torch.float32 if packing.table else torch.bfloat16)
        size = 0.5 + torch.rand(shape, device=on, generator=generator)  # no row so small that its errors do not show
        found["scale"] = (size / columns**0.5).to(kind)
    if packing.zero:
        found["zero"] = whole(256, shape, torch.uint8)
    if packing.table:
        tables = 1 if packing.table == ONE_TABLE else rows
        found["table"] = torch.rand((tables, 1 << packing.bits), device=on, generator=generator)
    return found


def random_linear(case: Case, generator: torch.Generator | None = None) -> tuple[dict[str, Tensor], Tensor]:
    """The same, of codes that are known, and the float32 weight they stand for, `(rows, columns)`."""
    packing, spec, size = case.packing, case.spec, (case.rows, case.columns)
    weight = random_weight(case, generator)
    codes = torch.randint(1 << spec.bits, size, dtype=torch.uint8, device=case.device, generator=generator)
    if packing.planar is not None:
        weight["words"] = planar_words(codes, packing.planar)
    scale = weight["scale"].T.contiguous() if "scale" in weight else torch.empty((case.rows, 0), device=case.device)
    zero, book = weight.get("zero"), None
    if packing.table == ONE_TABLE:
        weight["table"] = fourbit.table_of(spec.kind)[None, :].to(case.device)
        scale = scale.flatten()
    elif packing.table:
        book = weight["table"].half()
        weight["table"] = book.float()
    known = Codes(codes, scale, spec, zero=None if zero is None else zero.T.contiguous(), codebook=book)
    return weight, known.dequantize()


def random_inputs(case: Case, generator: torch.Generator | None = None) -> Tensor:
    """`(tokens, columns)`."""
    return torch.randn((case.tokens, case.columns), device=case.device, generator=generator).to(case.dtype)


def is_right(work: Work, wanted: Tensor) -> bool:
    """Whether every row and every token of `work(0)` is `wanted`, float32 `(tokens, rows)`, but for rounding.

    What is written nowhere shows: the memory that is free then holds no numbers.
    """
    dtype = work(0).dtype
    torch.full(wanted.shape, float("nan"), dtype=dtype, device=wanted.device)
    error = work(0).float() - wanted
    for dim in (0, 1):
        size = wanted.norm(dim=dim)
        if not (error.norm(dim=dim) / size.clamp(min=size.mean())).max() <= WRONG[dtype]:  # also what is no number
            return False
    return True


def checking(timer: Timer, wanted: Tensor) -> Timer:
    """`timer` for those whose product with the first weight is `wanted`, not a number for others."""

    def timed(work: Work, copies: int) -> float:
        return timer(work, copies) if is_right(work, wanted) else math.nan

    return timed


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
