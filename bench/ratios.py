"""What the ratio program gains over one share of wide columns for all, at the same true bits.

    python bench/ratios.py MODEL --shares 0.0625 0.125 0.25 --json OUT.json

`twotier` from 2 bits. For each share, the bits it takes are the budget of the ratio program, with measured interactions
between units and without. KL divergence on held-out text, nats per token, of the model as it would be stored.
"""

from pathlib import Path

import torch
from common import publish, rounding_parser

from llmcompress.compress.allocate.budget import parse_budget
from llmcompress.compress.measuring import Text
from llmcompress.compress.pipeline import calibration, open_model, score
from llmcompress.compress.planning import Planner
from llmcompress.compress.ratios import fixed_ratios
from llmcompress.compress.statistics import standard_error
from llmcompress.compress.trial import measure_allocations
from llmcompress.hub.source import resolve
from llmcompress.model.text import TextRequest, token_batches
from llmcompress.recipes import load_recipe


def main() -> None:
    """Print the table and write it."""
    parser = rounding_parser(__doc__, 256)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.0625, 0.125, 0.25])
    options = parser.parse_args()
    sets = (
        "quantizer=twotier", "plan.program=ratio", "plan.bits=[2]", f"plan.group_size={options.group_size}",
        f"calibration.source={options.calibration}", f"calibration.samples={options.calibration_samples}",
        f"calibration.sequence_length={options.sequence_length}",
    )  # fmt: skip
    recipe, source = load_recipe("balanced", sets), resolve(options.model)
    opened = open_model(source, recipe, "cpu")
    batches = calibration(opened, recipe)
    planner = Planner(opened, recipe, batches, score(opened, recipe, batches, ""))
    fixed = {float(label.rpartition(" ")[2]): scores for label, scores in fixed_ratios(planner.scores)}
    request = TextRequest(options.data, options.samples, batches.tokens.shape[1], 0, "evaluation")
    judging = token_batches(request, source.path).tokens
    text = Text(*(list(torch.split(part, 8)) for part in (batches.tokens, judging)))
    program, rows = planner.program(), []
    for share in options.shares:
        uniform = planner.allocate(fixed[share], parse_budget("8bits"))
        budget = parse_budget(f"{uniform.bits_per_weight:.6f}bits")
        ways = {
            f"share {share:g} for all": uniform,
            "ratio program": planner.allocate(planner.scores, budget, program),
            "without interactions": planner.allocate(planner.scores, budget),
        }
        for (label, allocation), kld in zip(
            ways.items(), measure_allocations(planner.job(), list(ways.values()), text).kld, strict=True
        ):
            error = standard_error(kld.tolist())
            row = {"label": label, "bits_per_weight": allocation.bits_per_weight, "kld": float(kld.mean())}
            rows.append(row | {"standard_error": error, "share": share})
            print(f"{label:<24} {allocation.bits_per_weight:.4f} bits  KL {row['kld']:.5f} ± {error:.5f}", flush=True)
    facts = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    facts |= {key: Path(str(facts[key])).name for key in ("model", "calibration", "data", "json")}
    publish(options.json, {**facts, "rows": rows})


if __name__ == "__main__":
    main()
