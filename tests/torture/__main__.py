"""Torture of everything that publishes; prints a table, and ends with 1 where a rule was broken.

scripts/torture                          all of it, about an hour on two processors
scripts/torture --only kills faults --jobs prune export --share 1/3
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.torture.starts import NoStraceError, need_strace, prepare, quiet_environment

DRAWN = ("kills", "polite", "faults", "rooms", "races", "hostile", "mutations")  # disturb the jobs that were asked for


def main() -> int:
    """Run the parts that were asked for."""
    options = _options()
    os.environ.update(quiet_environment())
    from tests.torture.parts import PARTS, Settings

    prepare()
    from tests.torture.jobs import JOBS, Bench, make_inputs

    unknown = [name for name in options.jobs or () if name not in JOBS]
    if unknown:
        sys.exit(f"error: no job {unknown[0]!r}; there are {', '.join(JOBS)}")
    jobs = [JOBS[name] for name in options.jobs] if options.jobs else [*JOBS.values()]
    settings = Settings(jobs, options.times, options.seed, options.share, tuple(options.faults))
    broken, rows = 0, []
    with tempfile.TemporaryDirectory(prefix="torture-", dir=options.folder) as place:
        bench = Bench(Path(place))
        parts = options.only or [*PARTS]
        if set(parts) - {"hostile", "mutations"}:
            make_inputs(bench.scratch, jobs if set(parts) <= {*DRAWN} else [*JOBS.values()])
        for name in parts:
            row = _part(name, PARTS[name], bench, settings)
            broken += row["violations"]
            rows.append(row)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print(f"\n{broken} violations")
    return int(broken > 0)


def _part(name: str, part: Callable[..., object], bench: object, settings: object) -> dict[str, object]:
    began = time.monotonic()
    try:
        if name in ("faults", "hostile"):
            need_strace()
        tally = part(bench, settings)
    except NoStraceError as error:
        print(f"{name:<10} skipped: {error}", flush=True)
        return {"part": name, "skipped": str(error), "violations": 0}
    counts = ", ".join(f"{count} {word}" for word, count in sorted(tally.counts.items()))
    print(f"{name:<10} {tally.part}: {counts}; {len(tally.violations)} violations; {time.monotonic() - began:.0f} s")
    for text in tally.violations:
        print(f"  VIOLATION {text}")
    sys.stdout.flush()
    return {"part": name, "counts": tally.counts, "violations": len(tally.violations)}


def _share(text: str) -> tuple[int, int]:
    first, _, count = text.partition("/")
    return int(first), int(count or 1)


def _options() -> argparse.Namespace:
    names = ("kills", "whole", "polite", "faults", "rooms", "races", "changes", "flips", "hostile", "mutations")
    parser = argparse.ArgumentParser(prog="scripts/torture", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=names, help="parts; default: all")
    parser.add_argument("--jobs", nargs="+", metavar="JOB", help="commands that are disturbed; default: all")
    parser.add_argument("--faults", nargs="+", choices=("KILL", "EIO", "ENOSPC"), default=["KILL", "EIO", "ENOSPC"])
    parser.add_argument("--times", type=int, help="how many of each part that draws; default: what each part says")
    parser.add_argument("--share", type=_share, default=(1, 1), metavar="K/N", help="the K-th of N shares of faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where scratch files go")
    parser.add_argument("--json", type=Path, help="write the counts here")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
