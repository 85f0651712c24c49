"""Is the budget kept? Quantize to several sizes and recount bits per weight from the files.

    python bench/budgets.py demo --output DIR [more words for quantize]

Leaves each checkpoint in DIR, and beside it the logits our dequantized reference gives for fixed tokens, which
`bench/plain.py` compares with those of plain transformers.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import BlockStream
from llmcompress.runtime.packed import PackedReader

BUDGETS = (2.5, 3.0, 3.5, 4.5)


def recount(folder: Path) -> float:
    """Bits per weight of the packed linears, from the files alone."""
    bits = weights = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118 - not a dict
                tensor = shard.get_tensor(name)
                if name.rpartition(".")[2] in ("weight_packed", "weight_scale", "weight_shape"):
                    bits += tensor.numel() * tensor.element_size() * 8
                if name.endswith("weight_shape"):
                    weights += int(tensor[0] * tensor[1])
    return bits / weights


def main() -> None:
    """Print one row per budget; exit with 1 if any is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--output", type=Path, required=True)
    options, extra = parser.parse_known_args()  # what is not known here goes to quantize
    options.output.mkdir(parents=True, exist_ok=True)
    over = False
    for budget in BUDGETS:
        name = f"{Path(options.model).name}-{budget}bits"
        folder = options.output / name
        words = [
            sys.executable,
            "-m",
            "llmcompress",
            "quantize",
            options.model,
            "--budget",
            f"{budget}bits",
            "-o",
            str(folder),
        ]
        words += ["--force", "--restart", "-q", "--json", *extra]
        dry = json.loads(subprocess.run([*words, "--dry-run"], check=True, capture_output=True).stdout)
        answer = json.loads(subprocess.run(words, check=True, capture_output=True).stdout)
        record = json.loads((folder / "llmcompress.json").read_text())
        found = recount(folder)
        over |= found > budget
        reason = record["plan"]["allocation"]["under_budget_reason"]
        under = f"{1 - found / budget:.2%} under" + (f" ({reason})" if reason else "")
        error = dry["output_bytes"] / answer["shard_bytes"] - 1
        print(f"{name:<32} {found:.4f} bits per weight, {under}; {answer['shard_bytes']:,} bytes, ", end="")
        print(f"dry run {error:+.2%}; {len(answer['kept'])} linears kept", flush=True)
        skeleton = Skeleton.open(folder, decode=PackedReader)
        tokens = torch.arange(96)[None] * 7 % int(skeleton.config.get_text_config().vocab_size)
        logits = next(iter(BlockStream(skeleton).logits([tokens])))
        save_file({"tokens": tokens, "logits": logits}, options.output / f"{name}.logits.safetensors")
    raise SystemExit(over)


if __name__ == "__main__":
    main()
