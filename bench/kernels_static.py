"""What the kernels of few tokens cost in instructions, from their machine code: no GPU needed, and no speed measured.

    python bench/kernels_static.py [--json OUT]

Compiles every configuration that ships, for compute capability 8.0 and 9.0, those of the rule for 8.9 and 9.0, and
those in CUDA C++, and counts the instructions of the inner loop per weight. `budget` is how many an
H200 (132 processors of 128 lanes at 1.98 GHz) can issue while its memory delivers one weight with its share of scales
at 4.3 TB/s: above, that is out of reach.
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from sass import Compiled, compiled, disassembled, loop_with

from llmcompress.kernels.nvrtc import compiler
from llmcompress.kernels.nvrtc import small as nvrtc
from llmcompress.kernels.triton import small
from llmcompress.kernels.triton.jit.decode import decode
from llmcompress.kernels.triton.layout import Packing, packing_of
from llmcompress.kernels.triton.tuning import BUCKETS, Config, Lean, read_shipped, rule
from llmcompress.spec import LinearSpec

LANES_PER_SECOND, BYTES_PER_SECOND = 132 * 128 * 1.98e9, 4.3e12
COLUMNS = 4096
SMALLEST, GROUP = 89, 128
SHARED_BYTES = {80: 163 << 10, SMALLEST: 99 << 10, 90: 227 << 10}  # of one program at most
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Row:
    """One compiled configuration."""

    format: str
    dtype: str
    capability: int
    config: tuple[int, ...]
    per_weight: float
    budget: float
    registers: int
    stack: int
    shared: int
    matrix: str


def spec_of(label: str, group: int) -> LinearSpec:
    """A format by its name in the tuning table."""
    bits = int(label.rstrip("z")[-1])
    kind = "codebook" if label.startswith("codebook") else "nf4" if label.startswith("table") else "int"
    kind = "asymmetric" if label.endswith("z") else kind
    size = {"codebook": 0, "nf4": 64}.get(kind, group)
    return LinearSpec.model_validate({"bits": bits, "group_size": size, "kind": kind})


def compile_decode(packing: Packing, config: Config, dtype: torch.dtype, capability: int) -> Compiled:
    """The kernel of few tokens, as `small.multiply` would have it compiled."""
    name = NAMES[dtype]
    types = {"x": f"*{name}", "words": "*i16", "scale": "*bf16", "zero": "*u8", "table": "*fp32", "out": f"*{name}"}
    types |= {"partials": "*fp32", "counters": "*i32"} | dict.fromkeys(("M", "N", "K", "stride"), "i32")
    constants = small.constants(packing, config, dtype, True)
    return compiled(decode, types, constants, (capability, config.warps, config.stages))


def measure(label: str, group: int, config: Config, dtype: torch.dtype, capability: int) -> Row:
    """Compile one configuration and count."""
    spec = spec_of(label, group)
    packing = packing_of(spec, COLUMNS)
    if packing.planar is None:
        raise SystemExit(f"{label} in groups of {group}: no planar order")
    found = compile_decode(packing, config, dtype, capability)
    weights = config.rows * packing.planar.block / (32 * config.warps)
    return _row(label, found, (NAMES[dtype], capability, tuple(config)), spec, weights)


def _row(label: str, found: Compiled, what: tuple[str, int, tuple[int, ...]], spec: LinearSpec, weights: float) -> Row:
    matrix = next((name for name in found.operations if "MMA" in name), "none")
    bits = spec.storage_bits(COLUMNS, COLUMNS) / COLUMNS**2
    return Row(
        label, *what, len(found.loop) / weights, bits / 8 * LANES_PER_SECOND / BYTES_PER_SECOND,
        found.registers, found.stack, found.shared, matrix,
    )  # fmt: skip


def compile_lean(spec: LinearSpec, config: Lean, capability: int, tokens: int) -> Compiled:
    """The kernel in CUDA C++, as `nvrtc.small.multiply` would have it compiled for bfloat16 inputs."""
    library = compiler.library()
    if library is None:
        raise SystemExit("NVRTC is not there: pip install nvidia-cuda-nvrtc")
    packing = packing_of(spec, COLUMNS)
    scale = torch.float32 if packing.table else torch.bfloat16
    made = nvrtc.definitions(packing, torch.bfloat16, scale, tokens=tokens, config=config, whole=True)
    source = compiler.source_of("twoterm" if config.terms == 2 else "decode")
    text, uses = disassembled(compiler.compiled(source, dict(made), f"sm_{capability}", library))
    shared = uses["SHARED"] + nvrtc.shared_bytes(packing, scale, tokens=tokens, config=config, whole=True)
    return Compiled(uses["REG"], uses["STACK"], shared, loop_with(text, "MMA"))


def lean_row(found: Compiled, spec: LinearSpec, config: Lean, capability: int) -> Row:
    """What it counts."""
    packing = packing_of(spec, COLUMNS)
    if packing.planar is None:
        raise SystemExit(f"{spec.label}: no planar order")
    what = ("bf16", capability, tuple(config))
    return _row(packing.label, found, what, spec, nvrtc.ROWS * packing.planar.block / 32)


def configurations() -> Iterator[tuple[str, Config, int]]:
    """What a linear is, tile sizes and capability: all that ship, and those of the rule, for GPUs not in the table."""
    shipped = read_shipped()
    for device, table in shipped.items():
        for label, configs in table.items():
            tiles = (config for config in configs.values() if isinstance(config, Config))
            if " " not in label:  # those of one shape are of the same kernels
                yield from ((label, config, int(device.removeprefix("sm_"))) for config in tiles)
    for label in next(iter(shipped.values())):
        packing = packing_of(spec_of(label, GROUP), COLUMNS)
        yield from ((label, rule(packing, most), capability) for capability in (SMALLEST, 90) for most in BUCKETS)


def rows() -> Iterator[Row]:
    """Each of them compiled for bfloat16 inputs, those of few tokens also for float16 and float32."""
    for label, config, capability in configurations():
        fixed = config._replace(split=config.split or 2)
        yield measure(label, GROUP, fixed, torch.bfloat16, capability)
        if config.tokens == BUCKETS[0]:
            yield measure(label, GROUP, fixed, torch.float16, capability)
            yield measure(label, GROUP, small.for_dtype(fixed, torch.float32), torch.float32, capability)


def lean_rows() -> Iterator[Row]:
    """Those in CUDA C++, inputs as they are and as two bytes."""
    for label in ("int2", "int3", "int4", "int8", "int2z", "int3z", "int4z", "int8z", "table4"):
        for terms in (1,) if label == "table4" else (1, 2):
            for capability in (80, 90):
                spec, config = spec_of(label, GROUP), Lean(8, 2, terms=terms)
                found = compile_lean(spec, config, capability, 1)
                yield lean_row(found, spec, config, capability)


def main() -> None:
    """Print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = []
    for row in itertools.chain(rows(), lean_rows()):
        found.append(row)
        print(
            f"{row.format:<10} {row.dtype} sm_{row.capability} {row.config!s:<22} {row.per_weight:5.2f} per weight, "
            f"budget {row.budget:.2f}  {row.registers:>3} registers  stack {row.stack:>3}  "
            f"{row.shared:>6} bytes shared{' TOO MANY' * (row.shared > SHARED_BYTES[row.capability])}  {row.matrix}",
            flush=True,
        )
    if options.json:
        document = {
            "triton": triton.__version__,
            "columns": COLUMNS,
            "group": GROUP,
            "rows": [asdict(r) for r in found],
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
