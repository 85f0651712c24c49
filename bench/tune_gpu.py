"""Time of the kernels with different tiles, for the formats and shapes of usual models.

    python bench/tune_gpu.py --json OUT [--shapes 4096x4096,...] [--tokens 1,2,4,8,16,512,2048] [--formats int4,nf4]
        [--keep]

Fewer than `llmcompress tune` tries; `kernels/triton/tuning.json` is made from this. With --keep the best go into the
table of this GPU in the user's cache, where kernels look first.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import gpu_formats
import torch
import triton

from llmcompress.kernels.triton.layout import Packing
from llmcompress.kernels.triton.tune import Search, Tuned, candidates, tune
from llmcompress.kernels.triton.tuning import BUCKETS, FEW, Choice, Config, Lean, keep, read_own
from llmcompress.spec import LinearSpec

FORMATS = {**gpu_formats.FORMATS, "codebook3": LinearSpec(bits=3, group_size=0, kind="codebook")}


def trials(packing: Packing, most: int, lean: bool) -> Iterator[Choice]:
    """What has a chance."""
    if most > BUCKETS[-1] or most in FEW:
        yield from candidates(packing, most, lean)
        return
    if lean and most <= 16:
        yield from (config for config in candidates(packing, most, lean) if isinstance(config, Lean))
    if most == 16:
        yield from (Config(rows, 16, split, warps, 3) for rows, warps in ((64, 4), (128, 8)) for split in (1, 2, 4))
        yield from (Config(32, 16, split, 2, 2) for split in (2, 4))
    elif most > 16:
        for tile in {min(most, 64), most}:
            for split in (1, 2, 4) if tile <= 64 else (1, 2):
                yield Config(128, tile, split, 8, 3)
                if tile <= 64:
                    yield Config(64, tile, split, 4, 3)


def row(tuned: Tuned) -> dict[str, object]:
    """As JSON: the best first."""
    tried = sorted(tuned.tried.items(), key=lambda pair: pair[1])
    print(
        f"{tuned.key:<22} {tuned.tokens:>4}: {tuned.before:8.2f} -> {tuned.microseconds:8.2f} us {tuned.config}",
        flush=True,
    )
    return {"key": tuned.key, "tokens": tuned.tokens, "before": tuned.before,
            "tried": [[*config, round(time, 3)] for config, time in tried if time < float("inf")],
            "wrong": [list(config) for config in tuned.wrong],
            "fatal": [[*config, how] for config, how in tuned.fatal.items()]}  # fmt: skip


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--shapes", default="4096x4096,11008x4096,4096x11008,28672x8192")
    parser.add_argument("--tokens", default="1,2,4,8,16")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU that PyTorch can use")
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")]
    linears = [(FORMATS[name], *shape) for name in options.formats.split(",") for shape in shapes]
    search = Search(tuple(int(number) for number in options.tokens.split(",")), trials)
    device, rows = torch.device("cuda"), []
    facts = {"gpu": torch.cuda.get_device_name(device), "torch": torch.__version__, "triton": triton.__version__}
    table = read_own(facts["gpu"]) if options.keep else {}
    for tuned in tune(linears, torch.bfloat16, device, search=search):
        rows.append(row(tuned))
        options.json.write_text(json.dumps({**facts, "linears": rows}) + "\n")
        if options.keep:
            keep(facts["gpu"], table, tuned.key, most=tuned.tokens, config=tuned.config)


if __name__ == "__main__":
    main()
