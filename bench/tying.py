"""What tying blocks is worth against removing them, at equal bytes (relaxed recursive transformers, arXiv 2410.20672).

    python bench/tying.py demo --json OUT.json

Both are made by the program itself, `prune --tie` and `prune --blocks`, and opened from their files. Tying groups of
`N` blocks with corrections that take a share `f` of a block's weights saves `(N - 1) (1 - f)` blocks each. Sets are
chosen on calibration text and judged on other text, KL in nats per token, before and after all that is left in the
blocks is trained towards the original's answers.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import publish
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import llmcompress
from llmcompress.compress.measuring import sequence_kld
from llmcompress.compress.prune.run import Pruned, PruneRequest, prune
from llmcompress.compress.tie.run import TiedResult, TieRequest, tie
from llmcompress.hub.source import Source, resolve
from llmcompress.model.text import TextRequest, token_batches
from llmcompress.recipes import Recipe, load_recipe


class Row(NamedTuple):
    """Groups of `size` blocks to tie, with corrections of a `share` of a block; what is saved is in blocks."""

    saved: int
    groups: int
    size: int = 2
    share: float = 0.0


ROWS = (Row(1, 1), Row(1, 2, share=0.5), Row(2, 2), Row(2, 1, 3), Row(2, 3, share=1 / 3))


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
        q = torch.log_softmax(model(tokens, use_cache=False).logits, -1)
        loss = nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / 10, (steps - step) / steps)
        optimizer.step()


def rank_of(model: Any, share: float) -> int:
    """The rank at which factors take a share of a block's matrices."""
    shapes = [module.weight.shape for module in model.model.layers[0].modules() if isinstance(module, nn.Linear)]
    return int(share * sum(map(torch.Size.numel, shapes)) / sum(map(sum, shapes)))


def removed(source: Source, count: int, folder: Path, recipe: Recipe) -> tuple[str, Any]:
    """The model without `count` blocks, and what it is called."""
    last = list(prune(PruneRequest(source, folder, recipe, "cpu", "bench", by="kl", count=count)))[-1]
    assert isinstance(last, Pruned)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return f"{count} removed: {list(last.record.removed)}", model


def tied(source: Source, row: Row, rank: int, folder: Path, recipe: Recipe) -> tuple[str, Any]:
    """The model with groups tied."""
    request = TieRequest(source, folder, recipe, "cpu", "bench", size=row.size, rank=rank, groups=row.groups)
    last = list(tie(request))[-1]
    assert isinstance(last, TiedResult)
    groups = " ".join(f"{group} {base}" for group, base in zip(last.record.groups, last.record.bases, strict=True))
    return f"{row.saved} saved by {row.groups} of {row.size} blocks, rank {rank}: {groups}", llmcompress.load(
        folder, dtype=torch.float32
    )


def main() -> None:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument(
        "--samples",
        type=int,
        default=32,
        help="to judge by; a quarter as many choose",
    )
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    source = resolve(options.model)
    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float32).eval()

    def text(samples: int, split: Any) -> list[Tensor]:
        request = TextRequest("builtin", samples, options.length, 0, split)
        return list(torch.split(token_batches(request, source.path).tokens, 4))

    judging, training = text(options.samples, "evaluation"), text(4 * options.steps, "calibration")
    with torch.no_grad():
        answers = [torch.log_softmax(model(tokens, use_cache=False).logits, -1) for tokens in judging]
    whole, rows = block_bytes(model), []
    sizes = (f"samples={2 * options.samples}", f"score_samples={options.samples // 4}")
    recipe = load_recipe(
        "balanced", (*(f"calibration.{size}" for size in sizes), f"calibration.sequence_length={options.length}")
    )

    def report(label: str, made: Any) -> None:
        row: dict[str, Any] = {"label": label, "saved": 1 - block_bytes(made) / whole}
        for when in ("before", "after"):
            klds = kld(made.eval(), judging, answers)
            row[when] = [float(klds.mean()), float(klds.std() / len(klds) ** 0.5)]
            if when == "before":
                began = time.process_time()
                train(made, model, training, steps=options.steps, rate=options.rate)
                row["seconds"] = time.process_time() - began
        rows.append(row)
        shown = "  ".join(f"{when} {row[when][0]:.4f} +- {row[when][1]:.4f}" for when in ("before", "after"))
        print(f"{label:<64} saved {row['saved']:.3f}  {shown}", flush=True)

    with tempfile.TemporaryDirectory() as place:
        for count in sorted({row.saved for row in ROWS}):
            report(*removed(source, count, Path(place) / f"removed-{count}", recipe))
        for number, row in enumerate(ROWS):
            report(*tied(source, row, rank_of(model, row.share), Path(place) / f"tied-{number}", recipe))
    facts = {key: value for key, value in vars(options).items() if key not in ("model", "json")}
    publish(options.json, {"model": source.name, "seed": 0, **facts, "rows": rows})


if __name__ == "__main__":
    main()
