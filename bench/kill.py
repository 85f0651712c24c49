"""kill -9 at random moments of a run: the output must be absent or complete, and a rerun bit-identical.

python bench/kill.py demo --times 30 [more words for quantize]
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def digest(folder: Path) -> str:
    """sha256 over the names and bytes of a directory."""
    state = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        state.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return state.hexdigest()


def main() -> None:
    """Run once undisturbed, then kill and rerun."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--times", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    options, extra = parser.parse_known_args()  # what is not known here goes to quantize
    source = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        out, state = folder / "out", folder / ".out.llmcompress"
        words = [
            sys.executable,
            "-m",
            "llmcompress",
            "quantize",
            options.model,
            "--budget",
            "3.5bits",
            "-o",
            "out",
            "-q",
        ]
        words += extra
        began = time.monotonic()
        subprocess.run(words, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        whole, expected = time.monotonic() - began, digest(out)
        counts = {"killed before publishing": 0, "already complete": 0, "resumed blocks": 0}
        for place in range(options.times):
            shutil.rmtree(out)
            running = subprocess.Popen(words, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            moment = source.uniform(0.1, 1.05) * whole
            time.sleep(moment)
            os.kill(running.pid, signal.SIGKILL)
            running.wait()
            kept = len(list(state.glob("commit-*.json"))) if state.exists() else 0
            if out.exists():
                counts["already complete"] += 1
                if digest(out) != expected:
                    raise SystemExit(f"kill {place}: the output exists and differs")
            else:
                counts["killed before publishing"] += 1
                counts["resumed blocks"] += max(kept - 1, 0)
            if not out.exists() or (state / "run.json").exists():
                subprocess.run(words, cwd=folder, check=True, stdout=subprocess.DEVNULL)
            if digest(out) != expected or sorted(p.name for p in folder.iterdir()) != ["out"]:
                raise SystemExit(f"kill {place}: the rerun differs")
            print(
                f"kill {place + 1} at {moment:.2f} s of {whole:.2f}: {kept} steps kept, rerun bit-identical", flush=True
            )
        print(f"{options.times} of {options.times} bit-identical; {counts}")


if __name__ == "__main__":
    main()
