"""Quantize and evaluate one configuration, through the library, in a scratch folder."""

import argparse
import json
import platform
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers

import llmcompress
from llmcompress.compress.allocate.budget import parse_budget
from llmcompress.compress.run import Finished, QuantizeRequest, quantize
from llmcompress.eval.run import EvalRequest, run_eval
from llmcompress.hub.source import resolve
from llmcompress.model.text import TextRequest
from llmcompress.recipes import load_recipe


@dataclass(frozen=True)
class Result:
    """One row of a table."""

    label: str
    bits_per_weight: float
    shard_bytes: int
    kld: float
    kld_low: float | None
    kld_high: float | None
    perplexity_reference: float
    perplexity: float
    seconds: float


def arguments(about: str, budget: str | None = None, *, tables: tuple[str, ...] = ()) -> argparse.Namespace:
    """Options every benchmark takes, and --budget and --table where there is one to choose."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--data", default="builtin")
    if budget is not None:
        parser.add_argument("--budget", default=budget)
    if tables:
        parser.add_argument("--table", choices=tables, default=tables[0])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--json", type=Path, help="also write the table here")
    return parser.parse_args()


def rounding_parser(about: str, sequence_length: int) -> argparse.ArgumentParser:
    """Options of benchmarks that round within the library: what is rounded, and text to see and be judged by."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--data", default="builtin")
    parser.add_argument("--calibration-samples", type=int, default=128)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=sequence_length)
    parser.add_argument("--json", type=Path, help="also write the table here")
    return parser


def measure(options: argparse.Namespace, label: str, budget: str, **changes: str) -> Result:
    """Quantize with the default recipe and some changes, evaluate on held-out text, print a row."""
    sets = tuple(f"{key.replace('__', '.')}={value}" for key, value in changes.items())
    recipe = load_recipe("balanced", (*sets, f"calibration.source={options.calibration}"))
    source = resolve(options.model)
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "out"
        began = time.monotonic()
        request = QuantizeRequest(source, output, recipe, parse_budget(budget), "cpu", "bench")
        *_, last = quantize(request)
        seconds = time.monotonic() - began
        text = TextRequest(options.data, options.samples, 512, 0, "evaluation")
        report = run_eval(EvalRequest(resolve(str(output)), source, text, 8, "cpu", "bench"))
        shutil.rmtree(output)
    if not isinstance(last, Finished):
        raise SystemExit(f"{label}: the run did not finish")
    found, allocation = report.summary, last.plan.allocation
    result = Result(
        label=label,
        bits_per_weight=allocation.bits_per_weight,
        shard_bytes=allocation.file_bytes,
        kld=found.kld.mean if found.kld.mean is not None else float("inf"),
        kld_low=found.kld.low,
        kld_high=found.kld.high,
        perplexity_reference=found.perplexity_reference or float("inf"),
        perplexity=found.perplexity_candidate or float("inf"),
        seconds=seconds,
    )
    print(
        f"{result.label:<34} {result.bits_per_weight:.4f} bpw {result.shard_bytes:>9,} bytes  KL {result.kld:.5f} "
        f"[{result.kld_low:.5f}, {result.kld_high:.5f}]  perplexity {result.perplexity_reference:.3f} -> "
        f"{result.perplexity:.3f}",
        flush=True,
    )
    return result


def write(options: argparse.Namespace, results: Sequence[Result | dict[str, object]], **facts: object) -> None:
    """Write a table with what it depends on."""
    document = {
        "model": Path(options.model).name,
        "calibration": Path(options.calibration).name,
        "data": Path(options.data).name,
        "seed": 0,
        **facts,
        "rows": [result if isinstance(result, dict) else asdict(result) for result in results],
    }
    publish(options.json, document)


def publish(path: Path | None, document: Mapping[str, object]) -> None:
    """Write what was measured, with the versions and the machine it depends on; nothing where there is no path."""
    if path is None:
        return
    facts = {
        "llmcompress": llmcompress.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "machine": f"{platform.machine()}, CPU",
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(facts | dict(document), indent=2) + "\n")
