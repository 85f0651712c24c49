"""Exponents of weight spectra: ours beside those of the libraries weightwatcher and powerlaw.

The libraries are no dependencies of ours: pip install weightwatcher==0.7.7 powerlaw==2.0.0
"""

import argparse
import importlib
import json
import logging
import os
import platform
import time
import warnings
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from llmcompress.compress.observe import weight_of
from llmcompress.compress.scorers.htsr import FEWEST, above_cut, eigenvalues_of, erg_start, find_tail
from llmcompress.hub.source import resolve
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.trace import trace

EVERY_ALPHA = {"alpha": [0, None]}  # powerlaw 2 looks no further than 3 unless told
PEERS = {"weightwatcher": "0.7.7", "powerlaw": "2.0.0"}


@dataclass(frozen=True)
class Row:
    """One linear: exponent, where the tail starts, and how many top eigenvalues the determinant condition takes.

    WeightWatcher counts the eigenvalue that first brings the product below 1, we stop before it.
    """

    linear: str
    eigenvalues: int
    alpha: float
    alpha_weightwatcher: float
    alpha_powerlaw: float
    start: float
    start_weightwatcher: float
    start_powerlaw: float
    erg_count: int
    erg_count_weightwatcher: int


def peer(name: str) -> Any:
    """A library to compare with, imported only here. Exits with the command that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        wanted = " ".join(f"{package}=={version}" for package, version in PEERS.items())
        raise SystemExit(f"{error}; pip install {wanted}") from None


def watched(folder: Path, library: Any) -> tuple[dict[str, Any], float]:
    """What WeightWatcher says of every linear of a model, by name, and the seconds it took."""
    logging.disable(logging.WARNING)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    began = time.monotonic()
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        table = library.WeightWatcher(model=model).analyze(min_evals=FEWEST, detX=True)
    return {str(row.longname): row for row in table.itertuples()}, time.monotonic() - began


def spectra(folder: Path) -> dict[str, torch.Tensor]:
    """The eigenvalues of every traced linear, by name."""
    skeleton, found = Skeleton.open(folder), {}
    for info in trace(skeleton).blocks:
        block = skeleton.load_block(info.index)
        found |= {linear.name: eigenvalues_of(weight_of(block, info, linear)) for linear in info.linears}
        skeleton.free(block)
    return found


def compare(folder: Path) -> tuple[list[Row], dict[str, float]]:
    """A row for each linear, and the seconds each library took (fits only for ours and powerlaw)."""
    watcher, powerlaw = peer("weightwatcher"), peer("powerlaw")
    theirs, watcher_seconds = watched(folder, watcher)
    rows, seconds = [], {"ours": 0.0, "powerlaw": 0.0, "weightwatcher, with its own SVD": watcher_seconds}
    for name, eigenvalues in spectra(folder).items():
        if name not in theirs:
            print(f"{name}: weightwatcher leaves it out")
            continue
        began = time.monotonic()
        kept = above_cut(eigenvalues)
        ours = find_tail(kept)
        middle = time.monotonic()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit = powerlaw.Fit(kept.numpy(), parameter_ranges=EVERY_ALPHA, verbose=0)
            alpha, start = float(fit.power_law.alpha), float(fit.xmin)
        seconds["ours"] += middle - began
        seconds["powerlaw"] += time.monotonic() - middle
        other = theirs[name]
        rows.append(
            Row(
                linear=name,
                eigenvalues=len(kept),
                alpha=ours.alpha,
                alpha_weightwatcher=float(other.alpha),
                alpha_powerlaw=alpha,
                start=ours.start,
                start_weightwatcher=float(other.xmin),
                start_powerlaw=start,
                erg_count=int((eigenvalues >= erg_start(eigenvalues) * eigenvalues.mean() * (1 - 1e-9)).sum()),
                erg_count_weightwatcher=int(other.detX_num),
            )
        )
    return rows, seconds


def main() -> None:
    """Print the table and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--json", type=Path, help="also write the table here")
    options = parser.parse_args()
    rows, seconds = compare(resolve(options.model).path)
    print(f"{'linear':<40} {'n':>5} {'ours':>9} {'weightw.':>9} {'powerlaw':>9} {'ERG':>8} {'weightw.':>8}")
    for row in rows:
        print(
            f"{row.linear:<40} {row.eigenvalues:>5} {row.alpha:>9.4f} {row.alpha_weightwatcher:>9.4f} "
            f"{row.alpha_powerlaw:>9.4f} {row.erg_count:>8} {row.erg_count_weightwatcher:>8}"
        )
    furthest = {
        "alpha, weightwatcher": max(abs(row.alpha - row.alpha_weightwatcher) for row in rows),
        "alpha, powerlaw": max(abs(row.alpha - row.alpha_powerlaw) for row in rows),
        "determinant condition less one, weightwatcher": max(
            abs(row.erg_count + 1 - row.erg_count_weightwatcher) for row in rows
        ),
    }
    for what, distance in furthest.items():
        print(f"largest difference in {what}: {distance:.3g}")
    print("seconds: " + ", ".join(f"{name} {taken:.2f}" for name, taken in seconds.items()))
    if options.json is not None:
        document = {
            "model": Path(options.model).name,
            "torch": torch.__version__,
            "peers": PEERS,
            "threads": torch.get_num_threads(),
            "machine": f"{platform.machine()}, CPU",
            "largest_difference": furthest,
            "seconds": seconds,
            "rows": [asdict(row) for row in rows],
        }
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
