"""Linears on CPU: every format and backend against torch and bitsandbytes, in turn, in one run.

    python bench/kernels.py --threads 2 --json bench/results/kernels-cpu.json

Prints, for each shape and number of tokens, the fastest tenth and the median of the times, bytes of weights per
second, and the error against float64 arithmetic on the weights that each really stores. Ours asks the system for huge
pages under its weights; others, which do not, are timed as they come and with such pages lent to them. `--realtime`
keeps other programs of the machine from running in between (needs the right to do so); caches have forgotten the
weights of one call before its next turn.
`--level avx2` measures on a machine with AVX-512 what those without it do: ours, torch and oneDNN keep to AVX2, and
bitsandbytes to its way without AVX512-BF16, which dequantizes the weight at each call.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from llmcompress.kernels import backends, ops, stored
from llmcompress.kernels.backends import native_cpu
from llmcompress.kernels.pages import in_huge_pages
from llmcompress.kernels.samples import random_codes
from llmcompress.runtime.timing import Contender, dense, packed, race, read_gigabytes_per_second
from llmcompress.spec import LinearSpec

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
FORGOTTEN = 160 << 20  # bytes that pass before a copy has its turn again
NF4 = LinearSpec(bits=4, group_size=64, kind="nf4")
OURS: dict[str, tuple[LinearSpec, tuple[str, ...]]] = {
    **{f"int{b}": (LinearSpec(bits=b, group_size=128), ("native_cpu", "torch_cpu")) for b in (4, 3, 2, 8)},
    "asymmetric4": (LinearSpec(bits=4, group_size=128, kind="asymmetric"), ("native_cpu",)),
    "nf4": (NF4, ("native_cpu",)),
    "nf4 double": (LinearSpec(bits=4, group_size=64, kind="nf4", double=True), ("native_cpu",)),
    "codebook4": (LinearSpec(bits=4, group_size=0, kind="codebook"), ("native_cpu",)),
    "int2+2": (LinearSpec(bits=2, group_size=128, high_share=0.1), ("native_cpu",)),
}
# what the others are told where ours are to keep to a level
WITH_AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
WITHOUT_AVX = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"}
OTHERS = {"scalar": WITHOUT_AVX, "avx2": WITH_AVX2, "avx2_vnni": WITH_AVX2}


def keep_to(level: str) -> None:
    """Begin again with everyone told which instructions to use: libraries ask once, when they are loaded."""
    wanted = {native_cpu.VARIABLE: level, **OTHERS.get(level, {})}
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})
    if level in OTHERS:
        functional = importlib.import_module("bitsandbytes.functional")
        functional.has_avx512bf16 = lambda: False  # type: ignore[attr-defined]


def copies_of(spec: LinearSpec, size: tuple[int, int]) -> list[dict[str, Tensor]]:
    """One random linear as often as the caches need to forget it."""
    tensors = stored.tensors_of("", random_codes(spec, *size))
    count = max(2, FORGOTTEN // sum(t.numel() * t.element_size() for t in tensors.values()))
    return [{name: tensor.clone() for name, tensor in tensors.items()} for _ in range(count)]


def forced(name: str, contender: Contender) -> Contender:
    """The same with one backend, whatever else could do it."""

    def call(inner: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            os.environ[backends.VARIABLE] = name
            return inner(x)

        return run

    return Contender(contender.label, tuple(map(call, contender.calls)), contender.weight_bytes, contender.error)


PLAIN, LENT = "", ", huge pages"


def huge(tensor: Tensor, pages: str = LENT) -> Tensor:
    """The same tensor, with what our backend asks of the system for its own, where they are lent."""
    if pages == LENT:
        in_huge_pages(tensor)
    return tensor


def int4pack(size: tuple[int, int], x: Tensor, pages: str) -> Contender:
    """torch's own 4-bit kernel in groups of 128, bfloat16."""
    rows, columns = size
    codes = torch.randint(16, size, dtype=torch.int32)
    scale = torch.rand(columns // 128, rows, dtype=torch.float32).bfloat16()
    both = torch.stack([scale, torch.zeros_like(scale)], dim=2).contiguous()
    base = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 2)
    every = [huge(base.clone(), pages) for _ in range(max(2, FORGOTTEN // base.numel()))]
    run = torch.ops.aten._weight_int4pack_mm_for_cpu
    calls = tuple((lambda x, w=w: run(x, w, 128, both)) for w in every)
    weight = (codes.float() - 8) * scale.float().T.repeat_interleave(128, dim=1)
    exact = x.double() @ weight.double().T
    error = float((calls[0](x).double() - exact).norm() / exact.norm())
    return Contender(f"torch int4pack{pages}", calls, base.numel() + both.numel() * 2, error)


def bitsandbytes(size: tuple[int, int], x: Tensor, pages: str) -> Contender:
    """bitsandbytes' packed kernel for nf4, bfloat16."""
    copies, bnb, form = copies_of(NF4, size), backends.named("bnb"), NF4.model_dump_json()
    with backends.use("bnb"):
        found = packed(f"bitsandbytes nf4{pages}", NF4, copies[:1], x)
    every = [{name: huge(tensor, pages) for name, tensor in bnb.prepare(copy, NF4).items()} for copy in copies]
    names = ops.names_of("bnb", tuple(every[0]))
    weights = [list(copy.values()) for copy in every]
    calls = tuple((lambda x, w=w: ops.run(x, w, names, form, size)) for w in weights)
    return Contender(found.label, calls, found.weight_bytes, found.error)


def contenders(size: tuple[int, int], tokens: int, labels: list[str]) -> list[Contender]:
    """Everything that is to be timed at one shape and number of tokens."""
    x = torch.randn(tokens, size[1]).bfloat16()
    found = []
    for label in labels:
        spec, names = OURS[label]
        for name in names:
            if name == "torch_cpu" and (tokens > 16 or label == "int8"):
                continue
            with backends.use(name):
                ours = packed(f"{label} {name}", spec, copies_of(spec, size), x)
            found.append(forced(name, ours))
    weight = [torch.randn(size) for _ in range(2)]
    for pages in (PLAIN, LENT):
        for dtype in (torch.float32, torch.bfloat16):
            copies = [huge(w.to(dtype, copy=True), pages) for w in weight]
            found.append(dense(f"F.linear {str(dtype)[6:]}{pages}", copies, x))
        found += [int4pack(size, x, pages), bitsandbytes(size, x, pages)]
    return found


def main() -> None:
    """Run and print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 128])
    parser.add_argument("--formats", nargs="+", choices=list(OURS), default=list(OURS))
    parser.add_argument("--shapes", type=int, default=2, help="how many of the shapes")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--realtime", action="store_true")
    parser.add_argument("--level", choices=list(native_cpu.LEVELS), default="best")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    keep_to(options.level)
    torch.set_num_threads(options.threads)
    rows = []
    if options.realtime:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    for size in SHAPES[: options.shapes]:
        for tokens in options.tokens:
            x = torch.randn(tokens, size[1]).bfloat16()
            print(f"\n{size[0]} x {size[1]}, {tokens} token(s)\n{'':32} µs  median   GB/s  error", flush=True)
            for t in race(contenders(size, tokens, options.formats), x, options.seconds):
                print(f"{t.label:28} {t.low:8.0f} {t.microseconds:7.0f} {t.gigabytes_per_second:6.1f}  {t.error:.1e}")
                rows.append({"rows": size[0], "columns": size[1], "tokens": tokens, **asdict(t)})
            os.environ.pop(backends.VARIABLE, None)
    if options.json:
        facts = {name: importlib.metadata.version(name) for name in ("torch", "bitsandbytes")}
        facts |= {
            "threads": options.threads,
            "level": options.level,
            "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        }
        facts["read_gigabytes_per_second"] = read_gigabytes_per_second()
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**facts, "cells": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
