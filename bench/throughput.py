"""How fast `quantize --recipe fast` goes through a checkpoint, beside reading and hashing the same files.

    python bench/throughput.py --json bench/results/throughput-fast.json

The model is the generated Llama of `bench/memory.py large` (1.47 GB in bfloat16), or `--model DIRECTORY`. For each
number of threads, in turn: how long its shards take to be read and hashed (dropped from the cache as far as the system
does, then again), then the command, by the clock and in processor time, and importing what the command imports, which
every run pays whatever the size of its model. A share is reading and hashing from the cache over the command; that
of processor time hardly depends on what else the machine does.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import publish
from memory import LARGE, LARGE_BLOCKS, LARGE_WIDTH, generate, reading_seconds

IMPORTS = "import llmcompress.compress.run"


def timed(words: list[str], threads: int, folder: Path) -> dict[str, float]:
    """Seconds by the clock and of the processor that a program takes."""
    began = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    running = subprocess.Popen(words, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(running.pid, 0)
    running.returncode = os.waitstatus_to_exitcode(status)
    if running.returncode:
        raise SystemExit(f"{' '.join(words)}: exit code {running.returncode}")
    return {
        "seconds": round(time.monotonic() - began, 2),
        "user": round(used.ru_utime, 2),
        "system": round(used.ru_stime, 2),
    }


def row(model: Path, threads: int, folder: Path) -> dict[str, Any]:
    """One number of threads."""
    began = time.process_time()
    cold, warm = reading_seconds(model)
    reading = (time.process_time() - began) / 2
    words = [sys.executable, "-m", "llmcompress", "quantize", str(model), "--budget", "4bits", "-o", "fast"]
    found = timed([*words, "--recipe", "fast"], threads, folder)
    shutil.rmtree(folder / "fast")
    imports = timed([sys.executable, "-c", IMPORTS], threads, folder)
    work = {key: found[key] - imports[key] for key in found}
    print(f"{threads} threads: read and hash {warm} s ({cold} s cold, {reading:.2f} s of the processor); fast {found}; "
          f"of that imports {imports}", flush=True)  # fmt: skip
    used = found["user"] + found["system"]
    return {
        "threads": threads,
        "reading": {"seconds": warm, "cold": cold, "processor": round(reading, 2)},
        "fast": found,
        "imports": imports,
        "share": round(warm / found["seconds"], 3),
        "share_of_processor_time": round(reading / used, 3),
        "the_same_without_imports": round(reading / (work["user"] + work["system"]), 3),
    }


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a directory in place of the generated model")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--repeat", type=int, default=1, help="the fastest of so many is kept")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = options.model or generate(folder / "large", LARGE_BLOCKS, LARGE_WIDTH, **LARGE)
        size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
        rows = []
        for threads in map(int, options.threads.split(",")):
            tried = [row(model.absolute(), threads, folder) for _ in range(options.repeat)]
            rows.append(min(tried, key=lambda one: one["fast"]["seconds"]))
    publish(options.json, {"bytes": size, "generated": options.model is None, "rows": rows})


if __name__ == "__main__":
    main()
