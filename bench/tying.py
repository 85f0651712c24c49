"""What tying blocks is worth against removing them, at equal bytes (relaxed recursive transformers, arXiv 2410.20672).

    python bench/tying.py demo --json OUT.json

Tied, two blocks in a row share the linears of one, or their mean; norms stay their own, and beside the shared weights a
block has low-rank factors fitted to the difference on what its linears read. Tying two blocks with factors that take a
share `f` of a block's linears saves `1 - f` blocks, so tying `n / (1 - f)` pairs saves as much as removing `n` blocks.
Sets are chosen on calibration text and judged on other text, KL in nats per token, before and after all that is left
in the blocks is trained towards the original's answers.
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import torch
from common import publish
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from llmcompress.compress.lowrank import factors_of
from llmcompress.compress.measuring import sequence_kld
from llmcompress.model.hub import resolve
from llmcompress.model.text import TextRequest, token_batches

BASES = ("first", "last", "mean")
Pair = tuple[int, str]  # the first of two blocks, and whose weights they share
ROWS = ((1, 1, 0.0), (1, 2, 0.5), (2, 2, 0.0), (2, 3, 1 / 3), (2, 4, 0.5), (3, 3, 0.0), (3, 4, 0.25), (4, 4, 0.0))


class Corrected(nn.Module):
    """A linear of other blocks too, and factors of its own."""

    def __init__(self, base: nn.Linear, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.base, self.up, self.down = base, nn.Parameter(up), nn.Parameter(down)

    def forward(self, x: Tensor) -> Tensor:
        """Inputs `(..., columns)` to outputs `(..., rows)`."""
        out: Tensor = self.base(x) + (x @ self.down.T) @ self.up.T
        return out


def linears_of(block: nn.Module) -> dict[str, nn.Linear]:
    """The linears of a block by name."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


@torch.no_grad()
def hessians(model: Any, text: Sequence[Tensor]) -> list[dict[str, Tensor]]:
    """Of every block, the mean of `x x^T` of what each linear reads."""
    found: list[dict[str, Tensor]] = [{} for _ in model.model.layers]
    handles = []
    for sums, block in zip(found, model.model.layers, strict=True):
        for name, linear in linears_of(block).items():

            def look(_: nn.Module, given: tuple[Tensor], sums: dict[str, Tensor] = sums, name: str = name) -> None:
                x = given[0].reshape(-1, given[0].shape[-1])
                sums[name] = sums.get(name, 0) + x.T @ x / x.shape[0] / len(text)

            handles.append(linear.register_forward_pre_hook(look))
    for tokens in text:
        model(tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def tied(model: Any, pairs: Sequence[Pair], share: float, seen: list[dict[str, Tensor]]) -> Any:
    """A copy in which each pair shares its linears; `share` of a block's linears goes to factors."""
    model = copy.deepcopy(model)
    for first, base in pairs:
        blocks = [model.model.layers[first], model.model.layers[first + 1]]
        names = linears_of(blocks[0])
        for name in names:
            own = [linears_of(block)[name] for block in blocks]
            weights = [linear.weight.detach().clone() for linear in own]
            shared = {"first": weights[0], "last": weights[1], "mean": (weights[0] + weights[1]) / 2}[base]
            linear = nn.Linear(shared.shape[1], shared.shape[0], bias=False)
            linear.weight.copy_(shared)
            rank = int(share * shared.numel() / sum(shared.shape)) // (2 if base == "mean" else 1)
            for place, (block, weight) in enumerate(zip(blocks, weights, strict=True)):
                module: nn.Module = linear
                if rank and base != ("first", "last")[place]:
                    module = Corrected(
                        linear, *factors_of(weight - shared, seen[first + place][name], rank, torch.float32)
                    )
                owner, _, leaf = name.rpartition(".")
                setattr(block.get_submodule(owner), leaf, module)
    return model


@contextmanager
def without(model: Any, blocks: Sequence[int]) -> Iterator[Any]:
    """The model without some blocks, while inside."""
    layers, count = model.model.layers, model.config.num_hidden_layers
    model.model.layers = nn.ModuleList(b for place, b in enumerate(layers) if place not in blocks)
    model.config.num_hidden_layers = len(model.model.layers)
    yield model
    model.model.layers, model.config.num_hidden_layers = layers, count


def removed(model: Any, blocks: Sequence[int]) -> Any:
    """A copy without some blocks."""
    with without(model, blocks) as shorter:
        return copy.deepcopy(shorter)


@torch.no_grad()
def kld(model: Any, text: Sequence[Tensor], answers: Sequence[Tensor]) -> Tensor:
    """KL divergence from the original by sequence."""
    parts = []
    for tokens, p in zip(text, answers, strict=True):
        parts.append(sequence_kld(p, torch.log_softmax(model(tokens, use_cache=False).logits, -1)))
    return torch.cat(parts)


def block_bytes(model: Any) -> int:
    """Bytes of everything in the blocks in 16 bits, shared weights once."""
    return 2 * sum(p.numel() for p in model.model.layers.parameters())


def train(model: Any, original: Any, text: Sequence[Tensor], *, steps: int, rate: float) -> None:
    """Train everything in the blocks to answer as the original does; a warm-up and a linear descent."""
    model.requires_grad_(False)
    model.model.layers.requires_grad_(True)
    optimizer = torch.optim.Adam(model.model.layers.parameters(), lr=rate)
    for step in range(steps):
        tokens = text[step % len(text)]
        with torch.no_grad():
            p = torch.log_softmax(original(tokens, use_cache=False).logits, -1)
        loss = sequence_kld(p, torch.log_softmax(model(tokens, use_cache=False).logits, -1)).mean()
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / 10, (steps - step) / steps)
        optimizer.step()


def best_removals(model: Any, measure: Callable[[Any], float], most: int) -> dict[int, tuple[int, ...]]:
    """The best sets of blocks of every size: all of one and two, then grown by one at a time."""
    found: dict[int, tuple[int, ...]] = {}
    every = range(len(model.model.layers))
    for count in range(1, most + 1):
        grown = [(*found[count - 1], b) for b in every if b not in found[count - 1]] if count > 2 else []
        sets = grown or list(combinations(every, count))
        costs = {}
        for some in sets:
            with without(model, some) as shorter:
                costs[some] = measure(shorter)
        found[count] = min(costs, key=costs.__getitem__)
    return found


def pair_sets(blocks: int, count: int) -> list[tuple[int, ...]]:
    """Sets of pairs of neighbours that have no block in common, by their first blocks."""
    sets = combinations(range(blocks - 1), count)
    return [some for some in sets if all(b - a > 1 for a, b in pairwise(some))]


def main() -> None:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--samples", type=int, default=32, help="sequences to judge by; a quarter as many choose")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    path = resolve(options.model).path
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    def text(samples: int, split: Any) -> list[Tensor]:
        return list(
            torch.split(token_batches(TextRequest("builtin", samples, options.length, 0, split), path).tokens, 4)
        )

    choosing, judging = text(options.samples // 4, "calibration"), text(options.samples, "evaluation")
    training = text(4 * options.steps, "calibration")
    with torch.no_grad():
        answers = {
            id(part): [torch.log_softmax(model(t, use_cache=False).logits, -1) for t in part]
            for part in (choosing, judging)
        }

    def choose(shorter: Any) -> float:
        return float(kld(shorter, choosing, answers[id(choosing)]).mean())

    whole, seen, rows = block_bytes(model), hessians(model, choosing), []

    def report(label: str, made: Any) -> None:
        row: dict[str, Any] = {"label": label, "saved": 1 - block_bytes(made) / whole}
        for when in ("before", "after"):
            klds = kld(made, judging, answers[id(judging)])
            row[when] = [float(klds.mean()), float(klds.std() / len(klds) ** 0.5)]
            if when == "before":
                began = time.process_time()
                train(made, model, training, steps=options.steps, rate=options.rate)
                row["seconds"] = time.process_time() - began
        rows.append(row)
        shown = "  ".join(f"{when} {row[when][0]:.4f} +- {row[when][1]:.4f}" for when in ("before", "after"))
        print(f"{label:<60} saved {row['saved']:.3f}  {shown}", flush=True)

    for count, blocks in best_removals(model, choose, max(count for count, _, _ in ROWS)).items():
        report(f"{count} removed: {sorted(blocks)}", removed(model, blocks))
    bases: dict[tuple[int, float], str] = {}
    for count, pairs, share in ROWS:
        for first in range(len(model.model.layers) - 1):
            if (first, share) not in bases:
                costs = {base: choose(tied(model, [(first, base)], share, seen)) for base in BASES}
                bases[first, share] = min(costs, key=costs.__getitem__)
        sets = [[(f, bases[f, share]) for f in some] for some in pair_sets(len(model.model.layers), pairs)]
        best = min(sets, key=lambda some: choose(tied(model, some, share, seen)))
        label = f"{count} saved by {pairs} pairs, factors {share:.2f}: {' '.join(f'{f}+{f + 1} {b}' for f, b in best)}"
        report(label, tied(model, best, share, seen))
    facts = {key: value for key, value in vars(options).items() if key not in ("model", "json")}
    publish(options.json, {"model": Path(options.model).name, "seed": 0, **facts, "rows": rows})


if __name__ == "__main__":
    main()
