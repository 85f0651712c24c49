"""Everything that is tested and measured on a GPU, in the order in which it counts, within a time.

    python bench/on_gpu.py --out DIR [--minutes 9]

Tests of the kernels, tiles for few and for many tokens (kept in this user's cache, and copied), all products beside
other libraries, whole models, rounding. What takes longer than its share is stopped; what it wrote so far stays. DIR
gets the JSON of each, what each said, and a summary.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from llmcompress.kernels.triton.tuning import user_table

ROOT = Path(__file__).resolve().parents[1]
TESTS = tuple(f"tests/kernels/test_{name}.py" for name in ("nvrtc", "twoterm", "prefill", "triton"))
SHAPES = "4096x4096,11008x4096,28672x8192"


@dataclass(frozen=True)
class Step:
    """A command, the share of the time that it may take, and the JSON that it writes, where it does."""

    name: str
    share: float
    command: tuple[str, ...]
    writes: str = ""


def steps() -> list[Step]:
    """In their order."""
    few, many = ("--tokens", "1,8,16", "--keep"), ("--tokens", "512,2048", "--keep", "--formats", "int4,nf4,int8")
    products = ("--shapes", SHAPES, "--tokens", "1,4,16,64,512")
    workers = ("-n", str(min(os.cpu_count() or 1, 14)))
    return [
        Step("tests", 0.3, ("-m", "pytest", "-q", "-p", "no:benchmark", "-p", "no:cacheprovider", *workers, *TESTS)),
        Step("tiles", 0.35, ("bench/tune_gpu.py", "--shapes", SHAPES, *few), "tiles.json"),
        Step("tiles of many tokens", 0.25, ("bench/tune_gpu.py", "--shapes", SHAPES, *many), "tiles-many.json"),
        Step("products", 0.35, ("bench/kernels_gpu.py", *products), "kernels.json"),
        Step("models", 0.3, ("bench/decode_gpu.py", "--formats", "bf16,int4,nf4,int8,int3,int2"), "decode.json"),
        Step("rounding", 0.15, ("bench/columns.py", "--device", "cuda"), "columns.json"),
    ]


@dataclass(frozen=True)
class Outcome:
    """What became of a step; no exit code where it was stopped."""

    name: str
    seconds: float
    exit_code: int | None


def run(step: Step, out: Path, seconds: float) -> Outcome:
    """Run a step for so long at most; what it says goes to `DIR/NAME.log`, its last lines to the terminal too."""
    command = [sys.executable, *step.command, *(("--json", str(out / step.writes)) if step.writes else ())]
    log, began = out / f"{step.name.replace(' ', '-')}.log", time.monotonic()
    paths = os.pathsep.join([str(ROOT), str(ROOT / "bench"), os.environ.get("PYTHONPATH", "")])
    code: int | None = None
    with log.open("w") as said:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        try:
            code = process.wait(max(seconds, 1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()
    found = Outcome(step.name, round(time.monotonic() - began, 1), code)
    print(f"== {found}", *log.read_text(errors="replace").splitlines()[-12:], sep="\n", flush=True)
    return found


def all_of(chosen: Sequence[Step], out: Path, minutes: float) -> list[Outcome]:
    """Run them in turn until the time is up; time that a step leaves goes to those that follow."""
    end, found = time.monotonic() + 60 * minutes, []
    for step in chosen:
        left = end - time.monotonic()
        if left < 1:
            break
        found.append(run(step, out, min(left, step.share * 60 * minutes)))
        (out / "summary.json").write_text(json.dumps([asdict(outcome) for outcome in found], indent=1) + "\n")
    return found


def main() -> None:
    """Run everything, and copy the table that was made."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=9.0)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU that PyTorch can use")
    options.out.mkdir(parents=True, exist_ok=True)
    outcomes = all_of(steps(), options.out, options.minutes)
    table = user_table(torch.cuda.get_device_name())
    if table.is_file():
        shutil.copy(table, options.out)
    raise SystemExit(any(outcome.exit_code != 0 for outcome in outcomes))


if __name__ == "__main__":
    main()
