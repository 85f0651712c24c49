"""Every tile size that `llmcompress tune` tries, for the formats and shapes of usual models, with its time.

    python bench/tune_gpu.py --json OUT [--shapes 4096x4096,...] [--tokens 8,16] [--formats int4,nf4]

`kernels/triton/tuning.json` is made from this.
"""

import argparse
import json
from pathlib import Path

import torch
import triton

from llmcompress.kernels.triton.tune import Tuned, tune
from llmcompress.spec import LinearSpec

FORMATS = {
    **{f"int{bits}": LinearSpec(bits=bits, group_size=128) for bits in (2, 3, 4, 8)},
    **{f"int{bits}z": LinearSpec(bits=bits, group_size=128, kind="asymmetric") for bits in (2, 3, 4, 8)},
    "nf4": LinearSpec(bits=4, group_size=64, kind="nf4"),
    "codebook3": LinearSpec(bits=3, group_size=0, kind="codebook"),
}


def row(tuned: Tuned) -> dict[str, object]:
    """As JSON: the best first."""
    tried = sorted(tuned.tried.items(), key=lambda pair: pair[1])
    print(
        f"{tuned.key:<22} {tuned.tokens:>3}: {tuned.before:8.2f} -> {tuned.microseconds:8.2f} us {tuned.config}",
        flush=True,
    )
    return {"key": tuned.key, "tokens": tuned.tokens, "before": tuned.before,
            "tried": [[*config, round(time, 3)] for config, time in tried if time < float("inf")]}  # fmt: skip


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--shapes", default="4096x4096,11008x4096,4096x11008,28672x8192")
    parser.add_argument("--tokens", default="8,16")
    parser.add_argument("--formats", default=",".join(FORMATS))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU that PyTorch can use")
    shapes = [tuple(map(int, shape.split("x"))) for shape in options.shapes.split(",")]
    linears = [(FORMATS[name], *shape) for name in options.formats.split(",") for shape in shapes]
    tokens = [int(number) for number in options.tokens.split(",")]
    device = torch.device("cuda")
    rows = [row(tuned) for tuned in tune(linears, torch.bfloat16, device, most_tokens=tokens)]
    facts = {"gpu": torch.cuda.get_device_name(device), "torch": torch.__version__, "triton": triton.__version__}
    options.json.write_text(json.dumps({**facts, "linears": rows}) + "\n")


if __name__ == "__main__":
    main()
