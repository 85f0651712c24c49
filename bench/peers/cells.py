"""A cell of the table: one width and group size, a row for everyone who ran in it."""

import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

NOT_RUN = "not in the cache"
PATHS = re.compile(r"(?:/[\w.+-]+){2,}")


@dataclass
class Row:
    """What one way of quantizing gave. KL in nats per token; `_error` is a standard error over sequences.

    bits_per_weight        true bits on disk over the linears that were quantized
    block_bits_per_weight  over all linears of the blocks, those left as they were included
    seconds, wall_seconds  of quantizing: without imports, and of the whole process; cpu_seconds of the whole process
    """

    label: str
    gptq: bool = False
    kld: float = math.inf
    kld_error: float = math.nan
    perplexity: float = math.inf
    perplexity_reference: float | None = None
    top1: float | None = None
    bits_per_weight: float = math.nan
    block_bits_per_weight: float = math.nan
    weight_file_bytes: int = 0
    left: list[str] = field(default_factory=list)
    seconds: float = math.nan
    wall_seconds: float = math.nan
    cpu_seconds: float = math.nan
    peak_mib: float = math.nan
    facts: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    ours: bool = False
    failed: str = ""
    asked: dict[str, Any] = field(default_factory=dict)


KINDS: dict[str, Callable[[Row], bool]] = {
    "best of symmetric GPTQ": lambda row: row.gptq and "asym" not in row.label.split(),
    "best of GPTQ": lambda row: row.gptq,
    "best of all": lambda row: True,
}


@dataclass
class Cell:
    """A width and a group size; a fractional width is a mix."""

    bits: float
    group_size: int
    rows: list[Row] = field(default_factory=list)

    @property
    def mix(self) -> bool:
        return self.bits != int(self.bits)

    @property
    def label(self) -> str:
        return f"{self.bits:g} bits, groups of {self.group_size}"

    def add(self, row: Row) -> Row:
        self.rows.append(row)
        return row

    def best(self, own: Row, kind: str) -> Row | None:
        """The peer of a kind with the least KL, among those that quantized the same linears."""
        rows = [r for r in self.rows if not r.ours and not r.failed and set(r.left) == set(own.left)]
        return min(filter(KINDS[kind], rows), key=lambda row: row.kld, default=None)

    def document(self) -> dict[str, Any]:
        """As strict JSON: a row that failed says why, without figures or paths; one that was not run is left out."""
        rows = []
        for row in self.rows:
            found = {k: v for k, v in asdict(row).items() if k not in ("asked", "gptq", "ours")}
            if row.failed == NOT_RUN:
                continue
            rows.append({"label": row.label, "failed": PATHS.sub("...", row.failed)} if row.failed else found)
        return {"bits": self.bits, "group_size": self.group_size, "rows": rows}


def tell(row: Row) -> None:
    """Print a row."""
    if row.failed:
        print(f"{row.label:<34} failed: {row.failed[-160:]}", flush=True)
        return
    left = f"  {len(row.left)} left" if row.left else ""
    size = f"{row.bits_per_weight:6.3f} / {row.block_bits_per_weight:6.3f} bpw"
    damage = f"KL {row.kld:.5f} +- {row.kld_error:.5f}  perplexity {row.perplexity:8.3f}"
    cost = f"{row.seconds:6.1f} s (CPU {row.cpu_seconds:.0f} s)  {row.peak_mib:5.0f} MiB"
    print(f"{row.label:<34} {size}  {damage}  {cost}{left}", flush=True)


def best_ratios(cells: list[Cell], labels: list[str]) -> dict[str, Any]:
    """Ours over the best peer of each kind, per cell, and their geometric means over the cells; below 1 is a win."""
    found: dict[str, Any] = {}
    for label in labels:
        per_cell: dict[str, dict[str, Any]] = {}
        for cell in cells:
            own = next((row for row in cell.rows if row.label == label and not row.failed), None)
            per_cell[cell.label] = {} if own is None else _ratios(cell, own)
        means = {}
        for kind in KINDS:
            values = [ratios[kind]["ratio"] for ratios in per_cell.values() if kind in ratios]
            if values:
                means[kind] = math.exp(sum(map(math.log, values)) / len(values))
                print(f"{label}, geometric mean over {len(values)} cells, {kind}: {means[kind]:.3f}")
        found[label] = {"cells": per_cell, "geometric_means": means}
    return found


def _ratios(cell: Cell, own: Row) -> dict[str, Any]:
    ratios: dict[str, Any] = {}
    for kind in KINDS:
        best = cell.best(own, kind)
        if best is not None:
            bits = best.block_bits_per_weight
            ratios[kind] = {"ratio": own.kld / best.kld, "best": best.label, "best_bits_per_weight": bits}
            sizes = f"{bits:.3f} bits to {own.block_bits_per_weight:.3f} of ours"
            print(f"{own.label}, {cell.label}, {kind}: {own.kld / best.kld:.3f} of {best.label}, {sizes}", flush=True)
    return ratios
