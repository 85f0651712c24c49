"""What the kernel for many tokens costs in instructions, from its machine code: no GPU needed, and no speed measured.

    python bench/prefill_static.py [--json OUT]

Compiles every tile that `llmcompress tune` tries, for compute capability 9.0, and counts the instructions of the inner
loop. The matrix units of an H100 or H200 take 64 cycles for one instruction of 64 rows, 128 tokens and 16 columns
(2048 products a cycle), during which a scheduler can issue 64 instructions, and half as many integer ones; `issue` and
`integer` are the parts of these that the loop takes, and above 1 the matrix units would wait. `early` counts writes to
registers that a matrix instruction may still be reading.
"""

import argparse
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from gpu_formats import FORMATS
from sass import Compiled, read

from llmcompress.kernels.nvrtc import compiler, many
from llmcompress.kernels.triton.layout import packing_of
from llmcompress.kernels.triton.tuning import Fused
from llmcompress.spec import LinearSpec

ARCHITECTURE, COLUMNS, CYCLES = "sm_90a", 4096, 64
REGISTERS, WARP = 65536, 32
HALF_RATE = ("LOP3", "SHF", "PRMT", "IADD3", "ISETP", "SEL", "LEA", "F2FP", "VIADD", "IMNMX", "VIMNMX", "I2F")


@dataclass(frozen=True)
class Row:
    """One compiled tile."""

    format: str
    config: tuple[int, ...]
    registers: int
    stack: int
    shared: int
    per_weight: float
    per_product: float
    issue: float
    integer: float
    early: int


def compile_prefill(spec: LinearSpec, columns: int, dtype: torch.dtype, config: Fused) -> Compiled:
    """The kernel as `many.multiply` would have it compiled, for scales in the usual dtype of files."""
    nvrtc = compiler.library()
    if nvrtc is None:
        raise SystemExit("NVRTC is not there: pip install nvidia-cuda-nvrtc")
    packing = packing_of(spec, columns)
    scale = torch.float32 if packing.table else torch.bfloat16
    made = dict(many.definitions(packing, dtype, scale, config))
    code = compiler.compiled(compiler.source_of("prefill"), made, ARCHITECTURE, nvrtc)
    return read(code, many.shared_bytes(packing, config))


def registers_of(line: str) -> set[int]:
    """What an instruction writes, or more."""
    found = re.match(r"(?:@!?U?P\w+\s+)?(\S+)\s+R(\d+)\b", line)
    if found is None or found[1].startswith(("ST", "LDGSTS", "HGMMA", "RED", "BAR")):
        return set()
    wide = 4 if re.search(r"M88\.4|\.128", found[1]) else 2 if re.search(r"WIDE|\.64|\.X2", found[1]) else 1
    return set(range(int(found[2]), int(found[2]) + wide))


def early_writes(loop: tuple[str, ...]) -> int:
    """Writes to registers of a matrix instruction before the second wait after it, twice around the loop."""
    early, reading = 0, []
    for line in (*loop, *loop):
        if found := re.search(r"HGMMA\S*\s+R(\d+), R(\d+), gdesc", line):
            weights, sums = (range(int(found[n]), int(found[n]) + size) for n, size in ((2, 4), (1, 64)))
            reading.append([set(weights), set(sums), 0])
        elif "WARPGROUP.DEPBAR" in line:
            reading = [[weights, sums, waits + 1] for weights, sums, waits in reading if waits == 0]
        else:
            written = registers_of(line)
            early += any(written & (weights | sums) for weights, sums, _ in reading)
    return early


def counted(label: str, config: Fused, found: Compiled) -> Row:
    """What came out for one tile."""
    order = packing_of(FORMATS[label], COLUMNS).planar
    products, block = found.count("HGMMA"), order.block if order else 0
    integer = sum(found.count(name) for name in HALF_RATE)
    return Row(
        label, tuple(config), found.registers, found.stack, found.shared, len(found.loop) * WARP / (16 * block),
        len(found.loop) / products, len(found.loop) / products / CYCLES, 2 * integer / products / CYCLES,
        early_writes(found.loop),
    )  # fmt: skip


def rows() -> Iterator[Row]:
    """Every format and tile."""
    for label, spec in FORMATS.items():
        for config in many.candidates(packing_of(spec, COLUMNS)):
            yield counted(label, config, compile_prefill(spec, COLUMNS, torch.bfloat16, config))


def main() -> None:
    """Print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = []
    for row in rows():
        found.append(row)
        print(
            f"{row.format:<6} {row.config!s:<14} {row.registers:>3} registers  stack {row.stack:>3}  "
            f"{row.shared:>6} bytes shared  {row.per_weight:5.2f} per weight  {row.per_product:5.1f} per product  "
            f"issue {row.issue:.2f}  integer {row.integer:.2f}  early {row.early}",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps({"columns": COLUMNS, "rows": [asdict(r) for r in found]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
