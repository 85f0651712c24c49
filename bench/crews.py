"""`quantize` by one, two and more processes: seconds, the work of the busiest process, and whether the bytes agree.

    python bench/crews.py random --sizes 1,2 --json bench/results/crews.json
    python bench/crews.py demo --sizes 1,2 [more words for quantize]

`random` is a generated Llama of `--blocks` blocks of hidden size `--width`; its text is 32 x 256 tokens, half of it for
scores.

A process that waits for another does no work, so the work of the busiest is what a run takes where every process has a
core of its own; seconds are those of this machine, and whatever else it does.
"""

import argparse
import hashlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import publish
from memory import generate

TEXT = ("calibration.samples=32", "calibration.sequence_length=256", "calibration.score_samples=16")
BATCH = "calibration.batch_size=2"


def port() -> int:
    """A port that is free."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def digest(folder: Path) -> str:
    """sha256 over the names and bytes of a directory."""
    state = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        state.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return state.hexdigest()


def run(words: list[str], folder: Path, size: int) -> dict[str, object]:
    """One run by so many processes, one thread each."""
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port()), "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    pids = [
        subprocess.Popen(words, cwd=folder, env=os.environ | shared | {"RANK": str(rank)}).pid for rank in range(size)
    ]
    used = []
    for pid in pids:
        _, status, usage = os.wait4(pid, 0)
        if status:
            raise SystemExit(f"a process of {size} ended with status {status}")
        used.append(usage)
    work = [one.ru_utime + one.ru_stime for one in used]
    return {
        "processes": size,
        "seconds": round(time.monotonic() - began, 1),
        "busiest_cpu_seconds": round(max(work), 1),
        "all_cpu_seconds": round(sum(work), 1),
        "largest_resident_bytes": max(one.ru_maxrss for one in used) * 1024,
    }


def main() -> None:
    """Run each size in a folder of its own, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--sizes", default="1,2")
    parser.add_argument("--blocks", type=int, default=2, help="of the random model")
    parser.add_argument("--width", type=int, default=384, help="of the random model")
    parser.add_argument("--json", type=Path, help="also write the table here")
    options, extra = parser.parse_known_args()  # what is not known here goes to quantize
    rows: list[dict[str, object]] = []
    digests = set()
    with tempfile.TemporaryDirectory() as scratch:
        model = options.model
        if model == "random":
            model = str(generate(Path(scratch) / "model", options.blocks, options.width))
            extra = [*extra, *(word for change in (*TEXT, BATCH) for word in ("--set", change))]
        for size in map(int, options.sizes.split(",")):
            words = [sys.executable, "-m", "llmcompress", "quantize", model, "--budget", "3.5bits", "-o", "out"]
            row = run([*words, "-q", *extra], Path(scratch), size)
            digests.add(digest(Path(scratch) / "out"))
            shutil.rmtree(Path(scratch) / "out")
            rows.append(row | {"same_bytes": len(digests) == 1})
            print(rows[-1], flush=True)
    publish(options.json, {"model": Path(options.model).name, "words": extra, "rows": rows})


if __name__ == "__main__":
    main()
