"""Products with packed weights on a GPU: time, part of the physical limit, error, beside other libraries.

    python bench/kernels_gpu.py [--json OUT] [--shapes 4096x4096,...] [--tokens 1,4,16,...] [--only ours,cuBLAS]

One process: ceilings, then every way, shape and number of tokens, then the first way again (drift). A time is that of
one call in a captured graph of calls on distinct copies of the weight, more bytes in all than four times the cache: it
comes from memory, and the gaps between launches are in it. The limit is the larger of bytes over the copy bandwidth and
operations over the rate of a large bfloat16 product, both measured here. Peers are measured where they are installed.
"""

import argparse
import json
import math
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from gpu_backends import Made, makers
from torch import Tensor

from llmcompress.kernels.triton.trial import copies_for, graph_timer

SHAPES = "4096x4096,11008x4096,4096x11008,22016x4096,8192x8192,10240x8192,28672x8192,8192x28672"
TOKENS = "1,4,16,64,512,2048"
LARGE = 8192
NODES = 200
WARM = 50  # products before anything is measured, so that clocks are up
CHECKED_ROWS = 512


@dataclass(frozen=True)
class Ceilings:
    """Bytes a second of a copy (both directions counted) and of a sum, operations a second, seconds a graph node."""

    copy: float
    read: float
    product: float
    node: float


@dataclass(frozen=True)
class Cell:
    """One way, shape and number of tokens; `floor` is the part of the physical limit that was reached."""

    way: str
    rows: int
    columns: int
    tokens: int
    microseconds: float
    bytes_per_second: float
    floor: float
    error: float


def ceilings(device: torch.device) -> Ceilings:
    """What this GPU can do, measured."""
    source = torch.randn(1 << 28, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    square = torch.randn((LARGE, LARGE), dtype=torch.bfloat16, device=device)
    small = torch.zeros(1, device=device)
    for _ in range(WARM):
        square @ square
    bytes_ = source.numel() * source.element_size()

    def seconds(work: Callable[[int], object], count: int = 1) -> float:
        return graph_timer(work, count) / 1e6

    return Ceilings(
        copy=2 * bytes_ / seconds(lambda _: torch.neg(source, out=target)),  # a graph would give a copy to an engine
        read=bytes_ / seconds(lambda _: source.sum()),
        product=2 * LARGE**3 / seconds(lambda _: square @ square, 4),
        node=seconds(lambda _: small.add_(1), NODES),
    )


def error_of(made: Made, x: Tensor) -> float:
    """Relative to the product in float64 with the weight that is really stored, over some of the rows."""
    found = made.call(x)[:, :CHECKED_ROWS].double()
    wanted = x.double() @ made.weight[:CHECKED_ROWS].double().T
    return float((found - wanted).norm() / wanted.norm())


def measure(
    way: str, make: Callable[[Tensor], Made], weight: Tensor, what: tuple[list[int], Ceilings]
) -> Iterator[Cell]:
    """Every number of tokens, on copies of one weight."""
    tokens, limits = what
    made = make(weight)
    rows, columns = weight.shape
    count = copies_for(made.tensors, torch.cuda.get_device_properties(weight.device).L2_cache_size)
    calls = [made.call, *(make(weight).call for _ in range(count - 1))]
    for number in tokens:
        x = torch.randn((number, columns), device=weight.device).to(made.dtype)
        micros = graph_timer(lambda copy, x=x: calls[copy](x), count)
        moved = made.size + 2 * number * (rows + columns)
        least = max(moved / limits.copy, 2 * number * rows * columns / limits.product)
        yield Cell(way, rows, columns, number, micros, moved / micros * 1e6, least / micros * 1e6, error_of(made, x))


def show(cell: Cell) -> None:
    """One line."""
    print(
        f"{cell.way:<18} {cell.rows:>5}x{cell.columns:<5} {cell.tokens:>4} tokens {cell.microseconds:9.2f} us  "
        f"{cell.bytes_per_second / 1e9:7.0f} GB/s  {cell.floor:6.1%} of the limit  error {cell.error:.1e}",
        flush=True,
    )


def means(cells: list[Cell]) -> dict[str, dict[int, dict[str, float]]]:
    """Way -> tokens -> geometric means over shapes: part of the limit, speed against cuBLAS in bfloat16."""
    base = {(c.rows, c.columns, c.tokens): c.microseconds for c in cells if c.way == "cuBLAS bf16"}
    table: dict[str, dict[int, dict[str, float]]] = {}
    for way in dict.fromkeys(c.way for c in cells):
        for tokens in dict.fromkeys(c.tokens for c in cells):
            mine = [c for c in cells if c.way == way and c.tokens == tokens]
            speeds = [base[key] / c.microseconds for c in mine if (key := (c.rows, c.columns, c.tokens)) in base]
            if mine and speeds:
                found = {"floor": _mean([c.floor for c in mine]), "speed": _mean(speeds)}
                table.setdefault(way, {})[tokens] = found
    return table


def _mean(values: list[float]) -> float:
    return math.exp(sum(math.log(v) for v in values) / len(values))


def clocks() -> str:
    """What nvidia-smi says about clocks, untouched."""
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,temperature.gpu", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return "unknown"


def main() -> None:
    """Print the table as it grows, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--shapes", default=SHAPES)
    parser.add_argument("--tokens", default=TOKENS)
    parser.add_argument("--only", default="", help="ways that begin with one of these, by commas")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU that PyTorch can use")
    device = torch.device("cuda")
    begin, limits = clocks(), ceilings(device)
    print(f"{torch.cuda.get_device_name(device)}: {asdict(limits)}")
    ways = {k: v for k, v in makers().items() if k.startswith(tuple(options.only.split(",")))}
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")]
    tokens = [int(number) for number in options.tokens.split(",")]
    facts = {"gpu": torch.cuda.get_device_name(device), "torch": torch.__version__, "triton": triton.__version__}
    facts |= {"clocks": [begin], "ceilings": asdict(limits)}
    cells: list[Cell] = []
    failures: list[dict[str, object]] = []
    for shape in shapes:
        weight = torch.randn(shape, device=device) * shape[1] ** -0.5
        for way, make in [*ways.items(), *list(ways.items())[:1]]:
            try:
                for cell in measure(way, make, weight, (tokens, limits)):
                    cells.append(cell)
                    show(cell)
            except (RuntimeError, ValueError, TypeError, ImportError) as error:  # a peer that cannot: said, not hidden
                failures.append({"way": way, "shape": shape, "error": str(error)[:300]})
                print(f"{way} {shape}: {error}"[:200], flush=True)
        if options.json:
            found = {**facts, "means": means(cells), "failures": failures, "cells": [asdict(c) for c in cells]}
            options.json.write_text(json.dumps(found, indent=1) + "\n")
    for way, row in means(cells).items():
        print(f"{way:<18}", *(f"{n}: {v['floor']:.0%} {v['speed']:.2f}x" for n, v in row.items()), sep="  ")
    print(clocks())


if __name__ == "__main__":
    main()
