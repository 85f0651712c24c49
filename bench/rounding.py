"""What each way of rounding is worth: the same widths and groups, so the same bytes, for every row.

    python bench/rounding.py MODEL --bits 2 3 4 --group-size 64 --json OUT.json

Every block linear gets one width. KL divergence on held-out text, nats per token, of the model as it would be stored.
"""

import json
import platform
import time
from pathlib import Path

import torch
from common import rounding_parser

from llmcompress.compress.group import Method
from llmcompress.compress.measuring import MeasureJob, Text
from llmcompress.compress.pipeline import QUANTIZERS, Opened, open_model
from llmcompress.compress.trial import measure_allocations
from llmcompress.hub.source import resolve
from llmcompress.model.checkpoint import TORCH_DTYPES
from llmcompress.model.text import TextRequest, token_batches
from llmcompress.plugins import find
from llmcompress.recipes import load_recipe
from llmcompress.types import Assigned, BitAllocation, QuantizerOptions

PLAIN = QuantizerOptions(target="layer", order="act", sweeps=0)
OURS = QuantizerOptions(order="group", sweeps=2)
ROWS: tuple[tuple[str, str, QuantizerOptions], ...] = (
    ("rounding", "rtn", PLAIN),
    ("GPTQ", "gptq", PLAIN),
    ("GPTQ, all inputs seen at once", "gptq", PLAIN.model_copy(update={"true_sequential": False})),
    ("GPTQ, sweeps", "gptq", PLAIN.model_copy(update={"sweeps": 2})),
    ("FOEM 0.2", "gptq", PLAIN.model_copy(update={"pull": 0.2})),
    ("GPTAQ", "gptq", PLAIN.model_copy(update={"target": "gptaq"})),
    ("asymmetric target", "gptq", PLAIN.model_copy(update={"target": "asymmetric"})),
    ("residual target", "gptq", PLAIN.model_copy(update={"target": "residual"})),
    ("residual target, alpha 0.5", "gptq", PLAIN.model_copy(update={"target": "residual", "alpha": 0.5})),
    ("residual target, alpha 1", "gptq", PLAIN.model_copy(update={"target": "residual", "alpha": 1.0})),
    ("residual target, sweeps", "gptq", PLAIN.model_copy(update={"target": "residual", "sweeps": 2})),
    ("residual target, group order, sweeps (balanced)", "gptq", OURS),
    ("balanced, output-side feedback, 16 rows", "gptq", OURS.model_copy(update={"output_feedback": 16})),
    ("balanced, output-side feedback, 64 rows", "gptq", OURS.model_copy(update={"output_feedback": 64})),
    ("AdaRound from there, 200 steps", "adaround", OURS),
    ("SignRound from there, twice 100 steps (best)", "signround", OURS.model_copy(update={"iterations": 100})),
)


class LearningJob(MeasureJob):
    """A trial in which blocks are learned, as they are when a plan is carried out for good."""

    @property
    def method(self) -> Method:
        """How this job rounds."""
        return Method(self.quantizer, self.options, self.dtype, learns=True)


def allocation(opened: Opened, bits: int, wide: tuple[str, ...] = ()) -> BitAllocation:
    """Every linear that has it at one width; those whose last name is in `wide` one bit more."""
    assigned = tuple(
        Assigned(linear=x.name, spec=spec)
        for x in opened.trace.linears
        for spec in opened.candidates.get(x.name, ())
        if spec.bits == bits + (x.name.rpartition(".")[2] in wide)
    )
    sizes = {x.name: x for x in opened.trace.linears}
    stored = sum(a.spec.storage_bits(sizes[a.linear].rows, sizes[a.linear].columns) for a in assigned)
    weights = sum(sizes[a.linear].weights for a in assigned)
    return BitAllocation(
        assigned=assigned,
        kept=(),
        fallbacks=(),
        budget=f"{bits} bits",
        budget_bits=stored,
        storage_bits=stored,
        bits_per_weight=stored / weights,
        file_bytes=opened.shards.file_bytes({a.linear: a.spec for a in assigned}),
        file_bits_per_weight=8
        * opened.shards.file_bytes({a.linear: a.spec for a in assigned})
        / opened.trace.parameters,
        expected_damage=0.0,
        lower_bound=0.0,
        status="optimal",
    )


def main() -> None:
    """Print the table and write it."""
    parser = rounding_parser(__doc__, 512)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rows", nargs="+", help="only the rows whose label begins with one of these")
    options = parser.parse_args()
    recipe = load_recipe("balanced", (f"plan.group_size={options.group_size}",))
    source = resolve(options.model)
    opened = open_model(source, recipe, "cpu")
    length = min(options.sequence_length, opened.context_tokens or options.sequence_length)
    request = TextRequest(options.calibration, options.calibration_samples, length, 0, "calibration")
    calibration = token_batches(request, source.path).tokens
    judging = token_batches(TextRequest(options.data, options.samples, length, 0, "evaluation"), source.path).tokens
    text = Text(*(list(torch.split(part, options.batch_size)) for part in (calibration, judging)))
    allocations = [allocation(opened, bits) for bits in options.bits]
    rows = []
    for label, quantizer, told in ROWS:
        if options.rows and not label.startswith(tuple(options.rows)):
            continue
        dtype = TORCH_DTYPES[opened.shards.scale_dtype]
        job = LearningJob(opened.skeleton, opened.trace, find(QUANTIZERS, quantizer), told, dtype)
        began = time.process_time()
        klds = measure_allocations(job, allocations, text).kld
        found = {str(bits): float(kld.mean()) for bits, kld in zip(options.bits, klds, strict=True)}
        rows.append({"label": label, "kld": found, "cpu_seconds": time.process_time() - began})
        print(f"{label:<50} " + "  ".join(f"{bits} bits {kld:.5f}" for bits, kld in found.items()), flush=True)
    if options.json is not None:
        facts = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
        facts |= {key: Path(facts[key]).name for key in ("model", "calibration", "data", "json")}
        facts |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
        options.json.write_text(json.dumps({**facts, "seed": 0, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
