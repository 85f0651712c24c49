"""Whether dropping blocks ever pays: the best plans with and without, at several sizes, carried out on the same text.

    python bench/joint.py demo --json bench/results/joint-demo.json

What `quantize --set plan.voids=true` decides by, before it writes anything. Bits per weight are over the original's
linears, KL is from the original model, nats per token with its standard error over sequences.
"""

import argparse
from pathlib import Path

from common import publish

from llmcompress.compress.allocate.budget import parse_budget
from llmcompress.compress.joint import decide_dropping
from llmcompress.compress.pipeline import calibration, open_model, score
from llmcompress.errors import InputError
from llmcompress.hub.source import resolve
from llmcompress.recipes import load_recipe


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--budgets", default="1.8,2,2.2,2.5,3,3.5")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--json", type=Path, help="also write the table here")
    options = parser.parse_args()
    sizes = {"samples": options.samples, "sequence_length": options.length, "score_samples": options.samples // 2}
    recipe = load_recipe("balanced", tuple(f"calibration.{key}={value}" for key, value in sizes.items()))
    source = resolve(options.model)
    opened = open_model(source, recipe, "cpu")
    batches = calibration(opened, recipe)
    scores = score(opened, recipe, batches, opened.digest())
    rows = []
    for bits in options.budgets.split(","):
        try:
            found = decide_dropping(opened, recipe, batches, scores, parse_budget(f"{bits}bits"))
        except InputError as error:
            print(f"{bits} bits: {error.what}")
            continue
        for trial in found.trials:
            taken = "  taken" if trial.dropped == found.dropped else ""
            print(
                f"{bits:>4} bits  without {list(trial.dropped)!s:<8} {trial.bits_per_weight:.4f} bits  expected "
                f"{trial.expected_damage:.4f}  measured {trial.measured_kld:.4f} ± {trial.standard_error:.4f}{taken}"
            )
        rows.append({"budget": float(bits), **found.model_dump(mode="json")})
    publish(options.json, {"model": source.name, **sizes, "seed": recipe.seed, "rows": rows})


if __name__ == "__main__":
    main()
