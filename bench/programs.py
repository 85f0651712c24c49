"""The allocation programs on made-up instances of real shape: time, proof, and what noise on interactions costs.

    python bench/programs.py --json bench/results/programs.json

Integer: 80 blocks x 7 linears of a 70B model, 6 widths, true storage bits, both directions and the whole hull.
Quadratic: 224 linears of an 8B model, 4 widths, a dense matrix of 896 x 896; "within" says how much of the
direction of an error differs between the widths of one linear. Noise: the matrix is measured with that much noise
on the correlations between linears, cleaned in three ways, and the choice judged under the true matrix. Where
pyscipopt is installed, SCIP gets 60 seconds on the first weak and the first strong instance.
"""

import argparse
import importlib.util
import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy
import scipy

from llmcompress.compress.allocate.integer import Choices, cheapest, frontier, solve
from llmcompress.compress.allocate.quadratic import minimise, objective, psd, shrink

LARGE = ((8192, 8192), (1024, 8192), (1024, 8192), (8192, 8192), (28672, 8192), (28672, 8192), (8192, 28672))
SMALL = ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336))
COUPLINGS = {"none": (6, 0.0), "weak": (40, 0.15), "strong": (6, 0.7)}  # rank, share of the coupled part


@dataclass(frozen=True)
class Row:
    """One line of a table. Objectives are relative to the optimum that ignores interactions."""

    program: str
    label: str
    seed: int
    wall_seconds: float
    cpu_seconds: float
    optimal: bool | None = None
    gap: float | None = None
    over_separable: float | None = None
    unspent: float | None = None


class Clock:
    """Wall and processor seconds since it was made."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.monotonic(), time.process_time()

    def read(self) -> tuple[float, float]:
        """Both, in seconds."""
        return time.monotonic() - self.wall, time.process_time() - self.cpu


def instance(seed: int, shapes: Sequence[tuple[int, int]], blocks: int, bits: Sequence[int]) -> list[Choices]:
    """Candidates of every linear: sensitivities spread log-normally, larger towards both ends of the model."""
    source, units = numpy.random.default_rng(seed), []
    for block in range(blocks):
        ends = 1 + 4 * numpy.exp(-block / 14) + 2 * numpy.exp((block - blocks + 1) / 10)
        for rows, columns in shapes:
            scale = ends * source.lognormal(0, 1.2) * rows * columns / 1e8
            costs = tuple(rows * (-(-columns * b // 32) * 32 + columns // 64 * 16) + 128 for b in bits)
            noise = source.lognormal(0, 0.05, len(bits))
            units.append(Choices(costs, tuple(float(scale * 4.0**-b * n) for b, n in zip(bits, noise, strict=True))))
    return units


def budget_of(shapes: Sequence[tuple[int, int]], blocks: int, average: float) -> int:
    """Bits for an average per weight."""
    return int(average * blocks * sum(rows * columns for rows, columns in shapes))


def integer_rows(seeds: range) -> list[Row]:
    """Both directions, a minimum that binds, and the hull."""
    rows = []
    for seed in seeds:
        units = instance(seed, LARGE, 80, (2, 3, 4, 5, 6, 8))
        for average in (2.7, 3.5, 4.25):
            budget, clock = budget_of(LARGE, 80, average), Clock()
            best = solve(units, budget)
            spare = (budget - best.cost) / budget
            gap = (best.damage - best.bound) / best.damage
            rows.append(Row("solve", f"{average} bits", seed, *clock.read(), best.optimal, gap, unspent=spare))
            clock = Clock()
            back = cheapest(units, best.damage)
            rows.append(Row("cheapest", f"{average} bits", seed, *clock.read(), back.optimal, back.cost - back.bound))
        clock = Clock()
        points = frontier(units)
        rows.append(Row("frontier", f"{len(points)} points", seed, *clock.read()))
    return rows


def correlations(seed: int, coupling: str, linears: int) -> numpy.ndarray:
    """Unit diagonal, positive semidefinite, (linears, linears)."""
    rank, share = COUPLINGS[coupling]
    factors = numpy.random.default_rng(1000 + seed).normal(size=(linears, rank))
    factors /= numpy.linalg.norm(factors, axis=1, keepdims=True)
    return share * factors @ factors.T + (1 - share) * numpy.eye(linears)


def game(seed: int, bits: Sequence[int]) -> tuple[list[Choices], numpy.ndarray]:
    """An 8B model without linear part, and the size of the error of each candidate, (candidates,)."""
    units = instance(seed, SMALL, 32, bits)
    sizes = numpy.sqrt(2 * numpy.array([d for unit in units for d in unit.damages]))
    return [Choices(unit.costs, (0.0,) * len(bits)) for unit in units], sizes


def dense(correlation: numpy.ndarray, sizes: numpy.ndarray, bits: int) -> numpy.ndarray:
    """The matrix over candidates where all candidates of a linear err in one direction."""
    return sizes[:, None] * numpy.kron(correlation, numpy.ones((bits, bits))) * sizes[None, :]


def scattered(seed: int, coupling: str, sizes: numpy.ndarray, *, bits: int, within: float) -> numpy.ndarray:
    """The same where a share of the direction is each candidate's own."""
    rank, share = COUPLINGS[coupling]
    source = numpy.random.default_rng(1000 + seed)
    common, own = (source.normal(size=(len(sizes) // n, rank)) for n in (bits, 1))
    common, own = (v / numpy.linalg.norm(v, axis=1, keepdims=True) for v in (common, own))
    vectors = numpy.sqrt(1 - within) * numpy.repeat(common, bits, 0) + numpy.sqrt(within) * own
    vectors *= numpy.sqrt(share) / numpy.linalg.norm(vectors, axis=1, keepdims=True)
    return sizes[:, None] * (vectors @ vectors.T + (1 - share) * numpy.eye(len(sizes))) * sizes[None, :]


def quadratic_rows(seeds: range) -> list[Row]:
    """The bound and the objective against what ignores interactions."""
    bits, rows = (2, 3, 4, 6), []
    budget = budget_of(SMALL, 32, 4.0)
    for coupling, within in (("none", 0.0), ("weak", 0.0), ("strong", 0.0), ("weak", 0.05), ("strong", 0.05)):
        for seed in seeds:
            units, sizes = game(seed, bits)
            matrix = dense(correlations(seed, coupling, len(units)), sizes, len(bits))
            if within:
                matrix = scattered(seed, coupling, sizes, bits=len(bits), within=within)
            clock = Clock()
            found = minimise(units, matrix, budget)
            times, over = clock.read(), found.objective / found.separable
            spare, label = (budget - found.cost) / budget, f"{coupling}, within {within}"
            rows.append(Row("quadratic", label, seed, *times, None, found.gap, over, spare))
            if importlib.util.find_spec("pyscipopt") and seed == 0 and coupling != "none" and not within:
                rows.append(scip_row(units, matrix, budget, label=label, separable=found.separable))
    return rows


def noise_rows(seeds: range) -> list[Row]:
    """Measured correlations are noisy: optimise on them raw and cleaned, judge by the true ones."""
    bits, rows = (2, 3, 4, 6), []
    budget = budget_of(SMALL, 32, 4.0)
    for coupling in ("weak", "strong"):
        for noise in (0.02, 0.05, 0.1):
            for seed in seeds:
                units, sizes = game(seed, bits)
                true = correlations(seed, coupling, len(units))
                errors = numpy.random.default_rng(99 + seed).normal(0, noise, true.shape)
                numpy.fill_diagonal(errors, 0.0)
                measured = true + (errors + errors.T) / 2
                judge = dense(true, sizes, len(bits))
                alone = solve([Choices(u.costs, tuple(s**2 / 2)) for u, s in
                               zip(units, sizes.reshape(len(units), -1), strict=True)], budget).chosen  # fmt: skip
                cleaned = {"raw": measured, "PSD": psd(measured), "half-shrunk + PSD": psd(shrink(measured))}
                for name, correlation in {"true": true, **cleaned}.items():
                    clock = Clock()
                    found = minimise(units, dense(correlation, sizes, len(bits)), budget, tries=1)
                    over = objective(units, judge, found.chosen) / objective(units, judge, alone)
                    label = f"{coupling}, noise {noise:.2f}, {name}"
                    rows.append(Row("noise", label, seed, *clock.read(), None, found.gap, over))
    return rows


def scip_row(units: Sequence[Choices], matrix: numpy.ndarray, budget: int, *, label: str, separable: float) -> Row:
    """SCIP on the convex form of the same program."""
    import pyscipopt

    values, vectors = numpy.linalg.eigh(matrix)
    keep, clock = values > values.max() * 1e-9, Clock()
    model = pyscipopt.Model()
    model.hideOutput()
    model.setParam("limits/time", 60.0)
    places = [[model.addVar(vtype="B") for _ in unit.costs] for unit in units]
    flat, costs = [x for row in places for x in row], [c for unit in units for c in unit.costs]
    for row in places:
        model.addCons(pyscipopt.quicksum(row) == 1)
    model.addCons(pyscipopt.quicksum(c / 2**20 * x for c, x in zip(costs, flat, strict=True)) <= budget / 2**20)
    for value, vector in zip(values[keep], vectors.T[keep], strict=True):
        length, square = model.addVar(lb=None), model.addVar(obj=0.5 / separable)
        terms = (float(numpy.sqrt(value) * v) * x for v, x in zip(vector, flat, strict=True))
        model.addCons(length == pyscipopt.quicksum(terms))
        model.addCons(length * length <= square)
    model.optimize()
    over = model.getObjVal() if model.getNSols() else None
    return Row("quadratic, SCIP", label, 0, *clock.read(), model.getStatus() == "optimal", model.getGap(), over)


def show(rows: Sequence[Row]) -> None:
    """The mean over seeds of every line."""
    for program, label in dict.fromkeys((row.program, row.label) for row in rows):
        group = [row for row in rows if (row.program, row.label) == (program, label)]
        told = [f"{program:<16} {label:<38} {len(group)} seeds"]
        told.append(
            f"at most {max(r.cpu_seconds for r in group):.2f} s CPU, {max(r.wall_seconds for r in group):.2f} s wall"
        )
        if group[0].optimal is not None:
            told.append(f"proven {sum(bool(row.optimal) for row in group)}")
        if all(row.over_separable is not None for row in group):
            told.append(f"objective / separable {numpy.mean([row.over_separable or 0 for row in group]):.4f}")
        if group[0].gap is not None:
            told.append(f"gap {max(row.gap or 0 for row in group):.2e} at most")
        print("  ".join(told), flush=True)


def main() -> None:
    """Run, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the table here")
    parser.add_argument("--only", choices=("integer", "quadratic", "noise"), help="one of the three parts")
    options = parser.parse_args()
    parts = {"integer": lambda: integer_rows(range(5)), "quadratic": lambda: quadratic_rows(range(2)),
             "noise": lambda: noise_rows(range(2))}  # fmt: skip
    rows: list[Row] = []
    for name, part in parts.items():
        if options.only in (None, name):
            found = part()
            show(found)
            rows += found
    if options.json is not None:
        document = {
            "numpy": numpy.__version__,
            "scipy": scipy.__version__,
            "machine": f"{platform.machine()}, CPU",
            "rows": [{k: v for k, v in asdict(row).items() if v is not None} for row in rows],
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
