"""Gains of norms in closed form, after quantization: what they recover (statistics tuning, arXiv 2006.10518).

    python bench/norm_gains.py MODEL --bits 2 3 4 --json OUT.json

Every linear gets one width, as in `balanced`. Then norm by norm, first to last, each channel's gain is multiplied by
the least-squares factor `E y' y / E y^2` between what the norm returns in the original, `y'`, and in the quantized
model with the gains before it, `y`. A norm's gains are taken where the KL divergence falls on text that none was fitted
to. "All" takes every norm of blocks and the last, "last" the last alone, "any" all without asking. KL on other text.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from common import publish, rounding_parser
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import llmcompress
from llmcompress.compress.allocate.budget import parse_budget
from llmcompress.compress.measuring import sequence_kld
from llmcompress.compress.run import QuantizeRequest, quantize
from llmcompress.compress.statistics import standard_error
from llmcompress.hub.source import resolve
from llmcompress.model.text import TextRequest, token_batches
from llmcompress.recipes import load_recipe


def norms_of(model: Any) -> list[str]:
    """Names of modules that end in a norm and act on the whole stream, in the order of the model."""
    width = model.config.get_text_config().hidden_size
    return [
        name
        for name, module in model.named_modules()
        if "norm" in name.rpartition(".")[2] and getattr(module, "weight", torch.empty(0)).shape == (width,)
    ]


@torch.no_grad()
def returned(model: Any, norm: str, batches: Sequence[Tensor]) -> Tensor:
    """What a norm returns, float64 `(tokens, channels)`."""
    found: list[Tensor] = []
    hook = model.get_submodule(norm).register_forward_hook(lambda _, __, out: found.append(out.flatten(0, -2).double()))
    for tokens in batches:
        model(tokens, use_cache=False)
    hook.remove()
    return torch.cat(found)


@torch.no_grad()
def kld(original: Any, model: Any, batches: Sequence[Tensor]) -> list[float]:
    """By sequence, nats per token."""
    found: list[float] = []
    for tokens in batches:
        logs = [torch.log_softmax(one(tokens, use_cache=False).logits.float(), -1) for one in (original, model)]
        found += sequence_kld(*logs).tolist()
    return found


@torch.no_grad()
def tune(original: Any, model: Any, text: Sequence[Sequence[Tensor]], norms: Sequence[str], *, ask: bool) -> int:
    """Set gains norm by norm; returns how many norms were taken."""
    fitting, judging = text
    best, taken = sum(kld(original, model, judging)), 0
    for name in norms:
        wanted, stored = returned(original, name, fitting), returned(model, name, fitting)
        factor = (wanted * stored).sum(0) / stored.square().sum(0).clamp_min(1e-30)
        module: nn.Module = model.get_submodule(name)
        before = module.weight.clone()
        module.weight.copy_(before * factor.to(before.dtype))
        after = sum(kld(original, model, judging)) if ask else -1.0
        if after < best:
            best, taken = after if ask else best, taken + 1
        else:
            module.weight.copy_(before)
    return taken


def rows_of(options: argparse.Namespace, bits: int) -> list[dict[str, object]]:
    """One width: as quantized, and with gains."""
    sets = (
        f"plan.bits=[{bits}]", f"plan.group_size={options.group_size}", "plan.trials=false",
        f"calibration.source={options.calibration}", f"calibration.samples={options.calibration_samples}",
        f"calibration.sequence_length={options.sequence_length}",
    )  # fmt: skip
    source, rows = resolve(options.model), []
    original = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32)

    def text(spec: str, samples: int, role: str, seed: int = 0) -> tuple[Tensor, ...]:
        request = TextRequest(spec, samples, options.sequence_length, seed, role)
        return torch.split(token_batches(request, source.path).tokens, 8)

    fitting = text(options.calibration, options.calibration_samples, "calibration")
    cut = max(len(fitting) // 4, 1)
    other = text(options.data, options.samples, "evaluation")
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        list(
            quantize(QuantizeRequest(source, out, load_recipe("balanced", sets), parse_budget("9bits"), "cpu", "bench"))
        )
        for label in ("as quantized", "all", "last", "any"):
            model = llmcompress.load(out, dtype=torch.float32, dense=True)
            norms = norms_of(model) if label in ("all", "any") else norms_of(model)[-1:] if label == "last" else []
            taken = tune(original, model, (fitting[cut:], fitting[:cut]), norms, ask=label != "any")
            found = kld(original, model, other)
            mean, error = sum(found) / len(found), standard_error(found)
            rows.append({"label": label, "bits": bits, "kld": mean, "standard_error": error, "taken": taken})
            print(f"{bits} bits  {label:<14} KL {mean:.5f} ± {error:.5f}  {taken} of {len(norms)} norms", flush=True)
    return rows


def main() -> None:
    """Print the table and write it."""
    parser = rounding_parser(__doc__, 256)
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3, 4])
    options = parser.parse_args()
    rows = [row for bits in options.bits for row in rows_of(options, bits)]
    facts = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    facts |= {key: Path(str(facts[key])).name for key in ("model", "calibration", "data", "json")}
    publish(options.json, {**facts, "rows": rows})


if __name__ == "__main__":
    main()
