"""What scores that only watch cost: one pass with all of them against the same pass with none.

    python bench/score_cost.py demo
    python bench/score_cost.py DIR --calibration text.txt --repetitions 5

Both passes stream the same blocks over the same calibration tokens; repetitions alternate between them, and the ratio
is that of the medians. The bar is 1.3. Times are of the processor, which other programs disturb less, unless --wall.
Each scorer alone is listed too; the sum of their extras may differ from the extra of all together.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
import transformers
from common import write

from llmcompress.compress.pipeline import calibration, open_model, score_job
from llmcompress.compress.scoring import ScoreJob, run_scorers
from llmcompress.hub.source import resolve
from llmcompress.recipes import load_recipe

SCORERS = ("lim", "zd", "rdp", "voids", "kurtosis")
BAR = 1.3


@dataclass(frozen=True)
class Cost:
    """Seconds of one kind of pass, and the ratio of its median to that of the bare pass."""

    label: str
    median_seconds: float
    least_seconds: float
    most_seconds: float
    over_bare: float


def bare(job: ScoreJob) -> None:
    """The pass alone: every block loaded, run over every batch, freed."""
    stream, tokens = job.stream()
    hidden, calls = stream.start(tokens)
    job.skeleton.free_rest()
    for info in job.trace.blocks:
        block = job.skeleton.load_block(info.index)
        with torch.no_grad():
            for place, call in enumerate(calls):
                hidden[place] = stream.run_block(info.index, hidden[place], call[info.index])
        job.skeleton.free(block)


def main() -> None:
    """Time the passes in turn, print a table, write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--alone", action="store_true", help="also time each scorer alone")
    parser.add_argument("--wall", action="store_true", help="time by the clock on the wall")
    parser.add_argument("--json", type=Path, help="also write the table here")
    options = parser.parse_args()
    options.data = options.calibration
    clock = time.perf_counter if options.wall else time.process_time
    changes = (f"calibration.source={options.calibration}", f"calibration.samples={options.samples}",
               f"calibration.score_samples={options.samples}")  # fmt: skip
    recipe = load_recipe("balanced", changes)
    opened = open_model(resolve(options.model), recipe, "cpu")
    job = score_job(opened, recipe, calibration(opened, recipe))

    passes: dict[str, Callable[[], object]] = {"bare pass": lambda: bare(job)}
    passes["+".join(SCORERS)] = lambda: run_scorers(SCORERS, job)
    if options.alone:
        passes |= {name: lambda name=name: run_scorers((name,), job) for name in SCORERS}
    seconds: dict[str, list[float]] = {label: [] for label in passes}
    for repetition in range(options.repetitions + 1):
        for label, run in passes.items():
            began = clock()
            run()
            if repetition:  # the first of each warms up
                seconds[label].append(clock() - began)

    base = statistics.median(seconds["bare pass"])
    rows = []
    for label, found in seconds.items():
        median = statistics.median(found)
        rows.append(Cost(label, median, min(found), max(found), median / base))
        print(f"{label:<32} {median:7.3f} s  [{min(found):.3f}, {max(found):.3f}]  {median / base:.3f}", flush=True)
    ratio = rows[1].over_bare
    print(f"all scores / bare pass: {ratio:.3f} (bar {BAR})")
    samples, length = job.batches.tokens.shape
    facts = {"tokens": f"{samples} x {length}", "repetitions": options.repetitions, "bar": BAR, "ratio": ratio,
             "clock": "wall" if options.wall else "processor", "transformers": transformers.__version__,
             "numpy": numpy.__version__, "python": sys.version.split()[0]}  # fmt: skip
    write(options, rows, **facts)


if __name__ == "__main__":
    main()
