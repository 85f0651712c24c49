"""Static 8-bit activations against outlier channels: plain per-tensor ranges, SmoothQuant, RepQuant.

A few channels of every norm are multiplied by 30 to 100 and the columns that read them divided, so the model computes
what it did, but its activations have outliers. Then every linear of the blocks reads 8-bit asymmetric codes of one
static scale, and keeps 8-bit symmetric weights of one scale per row; KL from the model without rounding on other text.

python bench/outliers.py MODEL --calibration TEXT --data OTHER_TEXT
"""

import argparse
import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import write
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llmcompress.compress.rewriting.clipping import ActivationQuantizer, range_quantizer
from llmcompress.compress.rewriting.edits import divide_gain, matrix
from llmcompress.compress.rewriting.samples import input_samples
from llmcompress.compress.rewriting.sites import norm_sites
from llmcompress.compress.rewriting.work import Call, Subject, working
from llmcompress.eval.fidelity import SequenceFidelity, compare
from llmcompress.hub.source import resolve
from llmcompress.model.config import quiet_transformers
from llmcompress.model.skeleton import find_blocks
from llmcompress.model.stream import linear_modules
from llmcompress.model.text import TextRequest, token_batches, unseen_tokens
from llmcompress.options import ReparamOptions
from llmcompress.plugins import find

BITS = 8
NORMS = "norms"
REPARAM = "llmcompress.compress.reparam"
METHODS: tuple[tuple[str, str | None, dict[str, Any]], ...] = (
    ("naive", None, {}),
    ("smooth", "smooth", {"smooth": {"alpha": 0.5}}),
    ("smooth, 0.65", "smooth", {"smooth": {"alpha": 0.65}}),
    ("smooth, 0.8", "smooth", {"smooth": {"alpha": 0.8}}),
    ("repquant", "repquant", {}),
    ("repquant, seen tokens", "repquant", {"repquant": {"unseen": False}}),
    ("repquant, norms alone", "repquant", {"repquant": {"links": False}}),
    ("repquant, grid", "repquant", {"repquant": {"clip": "grid"}}),
    ("repquant, learned", "repquant", {"repquant": {"clip": "learn"}}),
    ("repquant, norm bias", "repquant", {"repquant": {"bias": True}}),
)


@dataclass(frozen=True)
class Row:
    """One method on the model with outliers: KL in nats per token and its standard error over sequences."""

    label: str
    kld: float
    standard_error: float
    perplexity: float
    top1: float
    rewritten: int
    refused: int
    difference: float


@dataclass
class Bench:
    """The model with outliers, its text, and what it says of it without rounding."""

    model: Any
    calibration: list[Tensor]
    data: list[Tensor]
    skip_first: bool
    bits: int  # of activations
    inputs: list[str]  # last names of the linears whose inputs are rounded, NORMS for those behind norms; or all
    weights: bool  # whether they are rounded
    reference: list[Tensor] = field(default_factory=list)

    @torch.no_grad()
    def logits(self, model: Any) -> list[Tensor]:
        """Logits of the held-out batches."""
        return [model(input_ids=tokens, use_cache=False).logits for tokens in self.data]


def blocks_of(model: Any) -> nn.ModuleList:
    """The decoder blocks of a loaded model."""
    return find_blocks(model, int(model.config.get_text_config().num_hidden_layers))[1]


@torch.no_grad()
def block_calls(model: Any, batches: Sequence[Tensor]) -> list[list[Call]]:
    """The calls that a model makes to each of its blocks."""
    blocks = blocks_of(model)
    calls: list[list[Call]] = [[] for _ in blocks]
    handles = []
    for place, block in enumerate(blocks):

        def before(_: nn.Module, args: Any, kwargs: dict[str, Any], place: int = place) -> None:
            calls[place].append(Call(args, dict(kwargs)))

        handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
    for tokens in batches:
        model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return calls


def subjects(model: Any, batches: Sequence[Tensor]) -> list[Subject]:
    """Every block with its calibration calls, a short call to check edits with, and calls with tokens not in them."""
    probes = block_calls(model, [batches[0][:1, :32]])
    vocabulary = int(model.config.get_text_config().vocab_size)
    unseen = block_calls(model, unseen_tokens(batches, vocabulary, most=ReparamOptions().tokens))
    parts = zip(blocks_of(model), block_calls(model, batches), probes, unseen, strict=True)
    return [Subject(block, calls, probe[0], unseen=absent) for block, calls, probe, absent in parts]


def inject(model: Any, tokens: Tensor, *, share: float, low: float, high: float, seed: int) -> int:
    """Give a share of each norm's channels outliers of `low` to `high` times their size; returns how many in all."""
    generator = torch.Generator().manual_seed(seed)
    total = 0
    for subject in subjects(model, [tokens]):
        with working(subject) as work:
            for site in norm_sites(subject.module, work.probe):
                norm = subject.module.get_submodule(site.norm)
                readers = [subject.module.get_submodule(name) for name in site.readers]
                width = matrix(readers[0]).shape[1]
                count = max(round(width * share), 1)
                factor = torch.ones(width, dtype=torch.float64)
                chosen = torch.randperm(width, generator=generator)[:count]
                factor[chosen] = low + (high - low) * torch.rand(count, generator=generator, dtype=torch.float64)
                work.require(site.norm, [norm, *readers], partial(divide_gain, norm, readers, 1 / factor))
                total += count
    return total


def quantize_weight(linear: nn.Module) -> None:
    """Round a weight to symmetric codes of one scale per row."""
    weight = matrix(linear)
    scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / (2 ** (BITS - 1) - 1)
    weight.copy_(torch.round(weight / scale) * scale)


def attach(linear: nn.Module, quantizer: ActivationQuantizer) -> None:
    """Let a linear read what the codes of its input stand for."""
    scale, zero = quantizer.scale.float(), quantizer.zero.float()
    static = ActivationQuantizer(scale, zero, quantizer.bits)
    linear.register_forward_pre_hook(lambda _, args: (static(args[0]), *args[1:]))


@torch.no_grad()
def measure(bench: Bench, label: str, method: str | None, changes: dict[str, Any]) -> Row:
    """Rewrite a copy of the model, round it, and compare."""
    model = copy.deepcopy(bench.model)
    options = ReparamOptions.model_validate({"skip_first": bench.skip_first, **changes})
    options = options.model_copy(update={"repquant": options.repquant.model_copy(update={"bits": bench.bits})})
    rewritten, refused, difference = 0, 0, 0.0
    for subject in subjects(model, bench.calibration):
        block, fixed = subject.module, {}
        if not options.repquant.unseen:
            subject = replace(subject, unseen=())
        if method is not None:
            result = find(REPARAM, method).rewrite(subject, options)
            fixed = dict(result.quantizers)
            rewritten, refused = rewritten + len(result.sites), refused + len(result.fallbacks)
            difference = max(difference, result.difference)
        names = list(linear_modules(block))
        fed = {name for site in norm_sites(block, subject.first) for name in site.readers}
        seen = input_samples(block, subject.calls, names, tokens=options.tokens, skip_first=options.skip_first)
        for name, linear in linear_modules(block).items():
            own = NORMS if name in fed else name.rpartition(".")[2]
            if not bench.inputs or own in bench.inputs:
                low, high = seen[name].min(), seen[name].max()
                attach(linear, fixed.get(name) or range_quantizer(low, high, bench.bits))
            if bench.weights:
                quantize_weight(linear)
    found: list[SequenceFidelity] = []
    for before, after, tokens in zip(bench.reference, bench.logits(model), bench.data, strict=True):
        found += compare(before, after, tokens)
    klds = torch.tensor([one.kld for one in found], dtype=torch.float64)
    nll = torch.tensor([one.nll_candidate for one in found], dtype=torch.float64)
    row = Row(
        label=label,
        kld=float(klds.mean()),
        standard_error=float(klds.std() / len(klds) ** 0.5),
        perplexity=float(nll.mean().exp()),
        top1=sum(one.top1 for one in found) / len(found),
        rewritten=rewritten,
        refused=refused,
        difference=difference,
    )
    print(
        f"{row.label:<28} KL {row.kld:.6f} ± {row.standard_error:.6f}  perplexity {row.perplexity:.3f}  "
        f"top-1 {row.top1:.4f}  rewritten {row.rewritten}, refused {row.refused}",
        flush=True,
    )
    return row


def arguments() -> argparse.Namespace:
    """Options of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--data", default="builtin")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--share", type=float, default=0.03, help="of the channels that get outliers")
    parser.add_argument("--low", type=float, default=30.0)
    parser.add_argument("--high", type=float, default=100.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bits", type=int, default=BITS, help="of the activations")
    parser.add_argument("--inputs", nargs="+", default=[], help=f"round only these: {NORMS}, or last names of linears")
    parser.add_argument("--keep-weights", action="store_true", help="round inputs alone")
    parser.add_argument("--only", nargs="+", choices=[each[0] for each in METHODS], help="methods to measure")
    parser.add_argument("--with-first", action="store_true", help="let first tokens widen the static ranges")
    parser.add_argument("--json", type=Path, help="also write the table here")
    return parser.parse_args()


def main() -> None:
    """Print the table."""
    options = arguments()
    quiet_transformers()
    folder = resolve(options.model).path
    calibration = token_batches(
        TextRequest(options.calibration, options.samples, options.length, options.seed, "calibration"), folder
    )
    data = token_batches(TextRequest(options.data, options.samples, options.length, options.seed, "evaluation"), folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    weights = not options.keep_weights
    bench = Bench(
        model, calibration.split(8), data.split(8), not options.with_first, options.bits, options.inputs, weights
    )
    bench.reference = bench.logits(model)
    rows = [measure(bench, "naive, without outliers", None, {})]
    channels = inject(
        model, bench.calibration[0], share=options.share, low=options.low, high=options.high, seed=options.seed
    )
    bench.reference = bench.logits(model)
    print(f"{channels} channels of norms now have outliers of {options.low:g} to {options.high:g} times their size")
    rows += [measure(bench, *each) for each in METHODS if not options.only or each[0] in options.only]
    by_label = {row.label: row.kld for row in rows}
    pairs = [("repquant", other) for other in ("naive", "smooth") if {"repquant", other} <= by_label.keys()]
    ratios = {f"{one} / {other}": by_label[one] / by_label[other] for one, other in pairs}
    print("  ".join(f"{name}: {value:.4f}" for name, value in ratios.items()))
    if options.json is not None:
        facts = {
            "samples": options.samples,
            "length": options.length,
            "outliers": {"share": options.share, "low": options.low, "high": options.high, "channels": channels},
            "skip_first": bench.skip_first,
            "activation_bits": bench.bits,
            "inputs": bench.inputs,
            "weights": bench.weights,
            "seed": options.seed,
            "ratios": ratios,
        }
        write(options, [asdict(row) for row in rows], **facts)


if __name__ == "__main__":
    main()
