"""What a low-rank correction of the rounding error is worth, against the same bits spent on codes and scales.

    python bench/lowrank.py MODEL --bits 2 --group-size 64 --json OUT.json

True bits per weight, factors counted, and KL divergence on held-out text, nats per token; GPTQ as in `balanced`.
"First" takes the leading part out of the weight, rounds what is left, and fits the correction to the error then. "Wide"
are plans with one bit more for some linears.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch
from common import publish
from rounding import LearningJob, allocation

from llmcompress.compress.lowrank import factors_of
from llmcompress.compress.measuring import Text
from llmcompress.compress.pipeline import Opened, open_model
from llmcompress.compress.quantizers import gptq
from llmcompress.compress.rounding import Quantized, Request, Seen
from llmcompress.compress.trial import measure_allocations
from llmcompress.hub.source import resolve
from llmcompress.model.checkpoint import TORCH_DTYPES
from llmcompress.model.text import TextRequest, token_batches
from llmcompress.recipes import load_recipe
from llmcompress.types import BitAllocation, QuantizerOptions

WIDE = (("down_proj",), ("down_proj", "v_proj", "o_proj"))


class Remainder(ModuleType):
    """GPTQ of what is left of a weight once its leading part is out, the rank being that of the format."""

    NEEDS_HESSIAN = True

    @staticmethod
    def quantize(
        requests: Sequence[Request], seen: Seen | None, *, options: QuantizerOptions, dtype: torch.dtype
    ) -> list[Quantized]:
        """As any quantizer's; the correction is fitted afterwards, by whoever asked."""
        left = []
        for request in requests:
            rank = request.spec.rank_of(*request.weight.shape)
            up, down = factors_of(request.weight, None if seen is None else seen.hessian, rank, dtype)
            left.append(replace(request, weight=request.weight - up.float() @ down.float()))
        return gptq.quantize(left, seen, options=options, dtype=dtype)


def main() -> None:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--calibration-samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    source = resolve(options.model)

    def opened(group_size: int, rank: int = 0) -> Opened:
        changes = (f"plan.group_size={group_size}", f"quantize.correction_rank={rank}")
        return open_model(source, load_recipe("balanced", changes), "cpu")

    base = opened(options.group_size)
    half, bits = opened(options.group_size // 2), options.bits
    ranked = {rank: allocation(opened(options.group_size, rank), bits) for rank in options.ranks}
    plans = {f"{bits} bits": allocation(base, bits), f"{bits} bits, half the group": allocation(half, bits)}
    plans |= {f"{bits} bits, wide {' '.join(names)}": allocation(base, bits, names) for names in WIDE}
    plans |= {f"{bits + 1} bits": allocation(base, bits + 1)}
    plans |= {f"{bits} bits, rank {rank}": found for rank, found in ranked.items()}
    first = {f"{bits} bits, rank {rank}, first": found for rank, found in ranked.items()}
    length = min(options.sequence_length, base.context_tokens or options.sequence_length)
    request = TextRequest("builtin", options.calibration_samples, length, 0, "calibration")
    calibration = token_batches(request, source.path).tokens
    judging = token_batches(TextRequest("builtin", options.samples, length, 0, "evaluation"), source.path).tokens
    text = Text(*(list(torch.split(part, 8)) for part in (calibration, judging)))
    rows = [*measured(base, gptq, plans, text), *measured(base, Remainder("remainder"), first, text)]
    facts = {key: value for key, value in vars(options).items() if key not in ("model", "json")}
    publish(options.json, {"model": Path(options.model).name, **facts, "seed": 0, "rows": rows})


def measured(
    opened: Opened, quantizer: ModuleType, plans: dict[str, BitAllocation], text: Text
) -> list[dict[str, str | float]]:
    """Carry plans out in one pass over the model, and print a row for each."""
    told = load_recipe("balanced", ()).quantize
    job = LearningJob(opened.skeleton, opened.trace, quantizer, told, TORCH_DTYPES[opened.shards.scale_dtype])
    rows: list[dict[str, str | float]] = []
    for (label, plan), kld in zip(plans.items(), measure_allocations(job, list(plans.values()), text).kld, strict=True):
        error = float(kld.std() / len(kld) ** 0.5)
        rows.append({"label": label, "bits_per_weight": plan.bits_per_weight, "kld": float(kld.mean()), "error": error})
        print(f"{label:<45} {plan.bits_per_weight:.4f} bits  {float(kld.mean()):.5f} +- {error:.5f}", flush=True)
    return rows


if __name__ == "__main__":
    main()
