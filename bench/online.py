"""What a Hadamard matrix on the inputs of `down` (R4) is worth, with rotations of the stream and without, on outliers.

    python bench/online.py MODEL --json OUT.json

A share of the channels of every norm, with `--up` also of what `up` gives to `down`, is made 30 to 100 times larger and
the columns that read it smaller, so that the model computes what it did. Weights get 4 bits in groups, what linears
read 4 or 8.
KL divergence on held-out text, nats per token.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import torch
from common import publish
from outliers import blocks_of, inject
from torch import nn
from transformers import AutoModelForCausalLM

from llmcompress.compress.allocate.budget import parse_budget
from llmcompress.compress.run import QuantizeRequest, quantize
from llmcompress.eval.run import EvalRequest, run_eval
from llmcompress.hub.source import Source, resolve
from llmcompress.model.text import TextRequest, token_batches
from llmcompress.recipes import load_recipe

INPUTS = ("int4", "int4-token", "int8")
WAYS: dict[str, tuple[str, ...]] = {
    "as it is": (),
    "R4": ("quantize.online_hadamard=true",),
    "rotated": ("rewrite.methods=[rotate]",),
    "rotated, R4": ("rewrite.methods=[rotate]", "quantize.online_hadamard=true"),
}


@torch.no_grad()
def inject_up(model: nn.Module, *, share: float, low: float, high: float, seed: int) -> None:
    """Give a share of the rows of every `up` outliers, and take them off again in the columns of `down`."""
    generator = torch.Generator().manual_seed(seed)
    for block in blocks_of(model):
        up, down = block.mlp.up_proj, block.mlp.down_proj
        count = max(round(up.out_features * share), 1)
        chosen = torch.randperm(up.out_features, generator=generator)[:count]
        factor = low + (high - low) * torch.rand(count, generator=generator)
        up.weight[chosen] *= factor[:, None]
        down.weight[:, chosen] /= factor


def with_outliers(source: Source, folder: Path, options: argparse.Namespace) -> Source:
    """A copy of the model in `folder` that computes the same, with outliers."""
    shutil.copytree(source.path, folder)
    for shard in folder.glob("*.safetensors*"):
        shard.unlink()
    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32).eval().requires_grad_(False)
    sizes = {"share": options.share, "low": options.low, "high": options.high, "seed": options.seed}
    tokens = token_batches(TextRequest(options.calibration, 8, 128, options.seed, "calibration"), source.path).tokens
    inject(model, tokens, **sizes)
    if options.up:
        inject_up(model, **sizes)
    model.save_pretrained(folder)
    return Source(folder, source.name)


def measured(source: Source, inputs: str, changes: tuple[str, ...], options: argparse.Namespace) -> dict[str, object]:
    """Quantize and evaluate one way."""
    sets = (
        f"plan.bits=[{options.bits}]", f"plan.group_size={options.group_size}", f"quantize.inputs={inputs}",
        f"calibration.source={options.calibration}", f"calibration.samples={options.calibration_samples}",
        f"calibration.sequence_length={options.length}", *changes,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        output, began = Path(scratch) / "out", time.process_time()
        recipe = load_recipe("balanced", sets)
        *_, last = quantize(QuantizeRequest(source, output, recipe, parse_budget("9bits"), "cpu", "bench"))
        seconds = time.process_time() - began
        text = TextRequest(options.data, options.samples, options.length, 0, "evaluation")
        found = run_eval(EvalRequest(resolve(str(output)), source, text, 8, "cpu", "bench")).summary.kld
    return {
        "inputs": inputs, "kld": found.mean, "low": found.low, "high": found.high, "cpu_seconds": seconds,
        "bits_per_weight": last.plan.allocation.bits_per_weight,
    }  # fmt: skip


def main() -> None:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--data", default="builtin")
    parser.add_argument("--calibration-samples", type=int, default=32)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--share", type=float, default=0.03)
    parser.add_argument("--low", type=float, default=30.0)
    parser.add_argument("--high", type=float, default=100.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--up", action="store_true", help="outliers in what down reads, too")
    parser.add_argument("--plain", action="store_true", help="the model as it is, without outliers")
    parser.add_argument("--inputs", nargs="+", default=list(INPUTS))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        source = resolve(options.model)
        source = source if options.plain else with_outliers(source, Path(scratch) / "model", options)
        for inputs in options.inputs:
            for label in options.ways:
                row = {"label": label, **measured(source, inputs, WAYS[label], options)}
                rows.append(row)
                print(f"{inputs:<12} {label:<14} KL {row['kld']:.5f} [{row['low']:.5f}, {row['high']:.5f}]", flush=True)
    facts = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    facts |= {key: Path(str(facts[key])).name for key in ("model", "calibration", "data", "json")}
    publish(options.json, {**facts, "rows": rows})


if __name__ == "__main__":
    main()
