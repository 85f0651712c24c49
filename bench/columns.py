"""Rounding with feedback and descent: the loops in torch against the C library, or Triton's kernels on a GPU.

    python bench/columns.py --json bench/results/columns-cpu.json
    python bench/columns.py --device cuda --json bench/results/columns-gpu.json

A random weight of as many rows as columns, inputs that are correlated, the options of `balanced`; nanoseconds a weight,
of the processor on the CPU and of the clock on a GPU, the factor of the Hessian not included. The losses are
`tr(dW H dW^T)`, of the last over the first.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from common import publish

from llmcompress.compress import descent, feedback
from llmcompress.compress.grid import Codes, proxy_loss
from llmcompress.compress.rounding import Request, Seen
from llmcompress.compress.sequential import _Work, _work_of
from llmcompress.kernels import triton
from llmcompress.types import LinearSpec, QuantizerOptions

OPTIONS = QuantizerOptions(order="group", sweeps=2)


def timed(run: Callable[[], list[Codes]], device: str) -> tuple[Codes, float]:
    """What it gives, and the least seconds of three."""
    found, seconds = run(), []
    clock = time.perf_counter if device == "cuda" else time.process_time
    for _ in range(3):
        if device == "cuda":
            torch.cuda.synchronize()
        began = clock()
        found = run()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(clock() - began)
    return found[0], min(seconds)


def ways(work: _Work, request: Request, device: str) -> Iterator[tuple[str, Callable[[], list[Codes]]]]:
    """The loops, slowest first."""

    def loops(fused: bool) -> list[Codes]:
        feedback.rounds_columns = descent.rounds_columns = lambda where: fused and triton.rounds_columns(where)
        return work.round_plainly([request])

    yield "torch", lambda: loops(False)
    yield ("triton", lambda: loops(True)) if device == "cuda" else ("C", lambda: work.round([request]))


def rows(sizes: list[int], group_size: int, device: str) -> Iterator[dict[str, object]]:
    """One for each width of matrix and number of bits."""
    for size in sizes:
        generator = torch.Generator().manual_seed(size)
        mixing = torch.randn(size, size, generator=generator) / size**0.5 + torch.eye(size)
        inputs = (
            torch.randn(4 * size, size, generator=generator) @ mixing * (torch.rand(size, generator=generator) + 0.1)
        )
        hessian = (inputs.T @ inputs / len(inputs)).to(device)
        weight = torch.randn(size, size, generator=generator).to(device)
        work, _ = _work_of(Seen(hessian), group_size, OPTIONS, torch.bfloat16)
        if work is None:
            raise SystemExit("the Hessian is singular")
        for bits in (2, 4):
            request, losses, row = Request(weight, LinearSpec(bits=bits, group_size=group_size)), [], {}
            for name, run in ways(work, request, device):
                codes, seconds = timed(run, device)
                losses.append(proxy_loss(weight, codes.dequantize(), hessian.double()))
                row[f"{name}, ns a weight"] = round(seconds / weight.numel() * 1e9, 1)
            found = {"size": size, "bits": bits, **row, "losses": round(losses[1] / losses[0], 5)}
            print(found, flush=True)
            yield found


def main() -> None:
    """Parse, measure, publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="384,1280")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    sizes = [int(size) for size in options.sizes.split(",")]
    document = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "group_size": options.group_size,
        "rows": list(rows(sizes, options.group_size, options.device)),
    }
    publish(options.json, document)


if __name__ == "__main__":
    main()
