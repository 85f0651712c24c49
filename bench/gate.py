"""Does the gate keep its promises? Monte Carlo of its rules, with the truth known.

    python bench/gate.py --json bench/results/gate.json      (216 s of one core)

Text is simulated as the gate meets it: a sequence has a mean KL divergence of its own, lognormal with a coefficient
of variation of 0.53 (`typical`) or 0.95 (`mixed`), and its 256 tokens vary around that, lognormal with one of 2.
Answers to tasks: the original is right on 75 %, 8 % of the answers flip. Exits with 1 where a bar is missed.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy

from llmcompress.eval.statistics import bootstrap_t, cluster_t
from llmcompress.gate.rules import Floats, Levels, holm, kl_rule, mean_rule, paired_rule, ratio_rule

ALPHA = 0.05
LEVELS = Levels(ALPHA, ALPHA)
SPREADS = {"typical": 0.5, "mixed": 0.8}  # standard deviations of the logarithm of a sequence's mean
TOKENS, TOKEN_SPREAD = 256, math.sqrt(math.log(5.0))
COUNTS = (16, 32, 64, 128)
RIGHT, FLIPS, MARGIN = 0.75, 0.08, 0.02
Generator = numpy.random.Generator


def lognormal(source: Generator, spread: float, shape: tuple[int, ...]) -> Floats:
    """Values of mean 1."""
    return numpy.exp(spread * source.standard_normal(shape) - spread**2 / 2)


def sequences(source: Generator, spread: float, count: int) -> tuple[Floats, Floats]:
    """Each sequence's mean and variance over its tokens; the true mean is 1."""
    tokens = lognormal(source, TOKEN_SPREAD, (count, TOKENS)) * lognormal(source, spread, (count, 1))
    return tokens.mean(1), tokens.var(1)


def coverage(source: Generator, draws: int) -> Iterator[dict[str, Any]]:
    """How often one-sided 95 % upper bounds of the mean KL lie above the truth, and how often a true limit passes."""
    for kind, spread in SPREADS.items():
        hits: dict[tuple[str, int], int] = {}
        for _ in range(draws):
            means, variances = sequences(source, spread, max(COUNTS))
            for count in COUNTS:
                for name, held in bounds(means[:count], variances[:count]).items():
                    hits[name, count] = hits.get((name, count), 0) + held
        for name in ("tokens as units", "cluster t", "bootstrap-t", "passes at the limit", "fails at the limit"):
            yield {"text": kind, "what": name, **{f"n={count}": hits[name, count] / draws for count in COUNTS}}


def bounds(values: Floats, variances: Floats) -> dict[str, bool]:
    """Whether each upper bound covers the true mean of 1, and what the gate says when that is its limit."""
    mean, level = float(values.mean()), 1 - 2 * ALPHA
    naive = math.sqrt(float((variances + (values - mean) ** 2).mean()) / (len(values) * TOKENS))
    clustered, resampled = cluster_t(values, level), bootstrap_t(values, level)
    found = kl_rule(values, 1.0, LEVELS)
    return {
        "tokens as units": mean + 1.645 * naive >= 1,
        "cluster t": clustered is not None and clustered[1] >= 1,
        "bootstrap-t": resampled is not None and resampled[1] >= 1,
        "passes at the limit": found.high <= 1,
        "fails at the limit": found.p_above <= ALPHA,
    }


def answers(source: Generator, count: int, drop: float) -> tuple[int, int, int]:
    """Documents that only the candidate gets right, only the original, and both."""
    lost, gained = (FLIPS + drop) / 2, (FLIPS - drop) / 2
    both = RIGHT - lost
    found = source.multinomial(count, [gained, lost, both, 1 - gained - lost - both])
    return int(found[0]), int(found[1]), int(found[2])


def tasks(source: Generator, draws: int) -> Iterator[dict[str, Any]]:
    """Passes and fails by the true drop, and what a fixed tolerance (95 % of the score, two digits) would say."""
    for drop in (0.0, 0.02, 0.04, 0.08):
        for count in (100, 400, 1000, 4000):
            tally = {"pass": 0, "fail": 0, "tolerance passes": 0}
            for _ in range(draws):
                gained, lost, both = answers(source, count, drop)
                found = paired_rule(gained, lost, count, MARGIN, LEVELS)
                tally["pass"] += found.high <= MARGIN
                tally["fail"] += found.p_above <= ALPHA
                tally["tolerance passes"] += round((both + gained) / (both + lost), 2) >= 0.95
            yield {"drop": drop, "n": count, **{name: hits / draws for name, hits in tally.items()}}


def regressions(source: Generator, draws: int) -> Iterator[dict[str, Any]]:
    """A rise of the KL of exactly 10 % over the last release, each sequence's own rise varying by 30 %."""
    for count in COUNTS:
        tally = {"fieller": 0, "limit from the mean": 0}
        for _ in range(draws):
            before, _ = sequences(source, SPREADS["typical"], count)
            now = before * 1.1 * lognormal(source, 0.3, (count,))
            tally["fieller"] += ratio_rule(now, before, 0.1, LEVELS).high <= 0.1
            bound = cluster_t(now - before, 1 - 2 * ALPHA)
            tally["limit from the mean"] += bound is not None and bound[1] <= 0.1 * before.mean()
        yield {"n": count, **{name: hits / draws for name, hits in tally.items()}}


def together(source: Generator, draws: int) -> Iterator[dict[str, Any]]:
    """Wrong answers of whole verdicts with everything at its limit: three criteria at once, and three looks."""
    passed = failed = looked = 0
    third = Levels(ALPHA / 3, ALPHA / 3)
    for _ in range(draws):
        values, _ = sequences(source, SPREADS["typical"], 128)
        shifts = source.standard_normal(32) * 0.05 + 0.03
        gained, lost, _ = answers(source, 400, MARGIN)
        found = [
            (kl_rule(values[:32], 1.0, LEVELS), 1.0),
            (mean_rule(shifts, 0.03, LEVELS), 0.03),
            (paired_rule(gained, lost, 400, MARGIN, LEVELS), MARGIN),
        ]
        passed += all(one.high <= limit for one, limit in found)
        failed += any(holm([one.p_above for one, _ in found], ALPHA))
        looked += any(kl_rule(values[:count], 1.0, third).high <= 1 for count in (32, 64, 128))
    yield {"what": "three criteria at their limits pass", "share": passed / draws}
    yield {"what": "three criteria at their limits fail", "share": failed / draws}
    yield {"what": "one of three looks (32, 64, 128) passes", "share": looked / draws}


def bars(tables: dict[str, list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """Every promise beside what was found."""
    text = {row["what"]: row for row in tables["coverage"] if row["text"] == "typical"}
    for count in (16, 32, 128):
        yield bar(f"KL at the limit passes, n={count}", text["passes at the limit"][f"n={count}"], most=0.06)
    for count in COUNTS:
        least = 0.91 if count == 16 else 0.92
        yield bar(f"bootstrap-t covers, n={count}", text["bootstrap-t"][f"n={count}"], least=least)
    found = {(row["drop"], row["n"]): row for row in tables["tasks"]}
    for count in (100, 400, 1000):
        yield bar(f"task at the limit passes, n={count}", found[MARGIN, count]["pass"], most=0.06)
    yield bar("task 4 points down passes, n=400", found[0.04, 400]["pass"], most=0.01)
    yield bar("task 4 points down fails, n=400", found[0.04, 400]["fail"], least=0.40)


def bar(name: str, found: float, *, most: float = 1.0, least: float = 0.0) -> dict[str, Any]:
    """One promise."""
    wanted = f"at most {most}" if most < 1 else f"at least {least}"
    return {"bar": name, "wanted": wanted, "found": found, "kept": least <= found <= most}


TABLES: dict[str, Callable[[Generator, int], Iterator[dict[str, Any]]]] = {
    "coverage": coverage,
    "tasks": tasks,
    "regressions": regressions,
    "together": together,
}


def main() -> None:
    """Print every table; exit with 1 where a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    for place, (name, table) in enumerate(TABLES.items()):
        found[name] = list(table(numpy.random.default_rng([options.seed, place]), options.draws))
    found["bars"] = list(bars(found))
    for name, rows in found.items():
        print(f"\n{name}")
        for row in rows:
            print("  " + "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    if options.json is not None:
        document = {"draws": options.draws, "seed": options.seed, **found}
        options.json.write_text(json.dumps(document, indent=2) + "\n")
    raise SystemExit(not all(row["kept"] for row in found["bars"]))


if __name__ == "__main__":
    main()
