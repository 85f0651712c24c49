"""What healing recovers after blocks are removed, and whether it matters which blocks are trained.

    python bench/heal.py demo
    python bench/heal.py MODEL --calibration TEXT --samples 512 --steps 300 --seeds 5

First: KL and perplexity against the number of blocks removed, before and after adapters on all blocks are trained.
Then: two blocks removed, the same number of trained parameters in the blocks that RDP selects, in as many random ones,
in as many of the last, and in all (ranks are adjusted), over several seeds, which change everything random. One
text trains, another part of it stops, a third judges. Intervals are 95 % (Student's t), over sequences in the
first table and over seeds in the second; differences are paired by seed.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from common import publish

from llmcompress.compress.heal.finish import judged
from llmcompress.compress.heal.lora import LoraOptions, LoraTuning
from llmcompress.compress.heal.places import Places, select
from llmcompress.compress.heal.run import load_whole, parts_of
from llmcompress.compress.heal.state import Saves
from llmcompress.compress.heal.training import Data, Schedule, Trainer
from llmcompress.compress.heal.tuning import by_name
from llmcompress.compress.prune.run import PruneRequest, prune
from llmcompress.compress.statistics import interval, mean
from llmcompress.hub.source import Source, resolve
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.text import TextRequest, token_batches
from llmcompress.recipes import load_recipe

LOOKED = 32  # sequences that RDP looks at
BATCH = 4


def arguments() -> argparse.Namespace:
    """Options of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=150, help="of each run in the first table")
    parser.add_argument("--short", type=int, default=80, help="steps of each run in the second")
    parser.add_argument("--most", type=int, default=4, help="blocks removed at most")
    parser.add_argument("--rank", type=int, default=48, help="on the selected blocks; all blocks get less each")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the tables here")
    return parser.parse_args()


def pruned(source: Source, count: int, folder: Path, calibration: str) -> Path:
    """The model without `count` blocks, as `prune` writes it."""
    less = ("calibration.samples=64", "calibration.score_samples=32", "calibration.sequence_length=256")
    recipe = load_recipe("balanced", (*less, f"calibration.source={calibration}"))
    for _ in prune(PruneRequest(source, folder, recipe, "cpu", "bench", count=count)):
        pass
    return folder


def healed(folder: Path, data: Data, places: Places, rank: int, schedule: Schedule) -> dict[str, object]:
    """Heal once; KL by sequence of the text to judge by, and what was trained."""
    began = time.process_time()
    student = Skeleton.open(folder)
    load_whole(student)
    looked = torch.split(data.original.tokens[list(data.training[:LOOKED])], BATCH)
    blocks = select(places, student, looked, schedule.seed)
    tuning = LoraTuning(student, blocks, LoraOptions(rank, 2.0 * rank), seed=schedule.seed)
    with tempfile.TemporaryDirectory() as state:
        position = list(Trainer(student, tuning, data, schedule).run(Saves(Path(state))))[-1]
    with tuning.as_stored():
        klds, rises = judged(student, data, BATCH)
    return {
        "blocks": blocks, "rank": rank, "parameters": sum(p.numel() for p in by_name(tuning.trained, blocks).values()),
        "best_step": position.best.step, "kld": klds, "rise": rises, "cpu_seconds": time.process_time() - began,
    }  # fmt: skip


def untouched(folder: Path, data: Data) -> tuple[list[float], list[float]]:
    """KL and rise of the loss before healing, by sequence."""
    student = Skeleton.open(folder)
    load_whole(student)
    return judged(student, data, BATCH)


def cell(values: Sequence[float]) -> str:
    """A mean with its interval."""
    low, high = interval(values)
    return f"{mean(values):.4f} [{low:.4f}, {high:.4f}]"


def by_blocks_removed(
    options: argparse.Namespace, source: Source, data: Data, scratch: Path
) -> list[dict[str, object]]:
    """The first table."""
    rows: list[dict[str, object]] = []
    for count in range(1, options.most + 1):
        folder = pruned(source, count, scratch / str(count), options.calibration)
        before, rise_before = untouched(folder, data)
        schedule = Schedule(steps=options.steps, batch_size=BATCH, rate=2e-3, every=max(options.steps // 3, 1))
        found = healed(folder, data, Places("all"), 32, schedule)
        after, rise = found.pop("kld"), found.pop("rise")
        ratios = [float(torch.tensor(mean(values)).exp()) for values in (rise_before, rise)]  # type: ignore[arg-type]
        row = {"removed": count, "before": before, "after": after, "perplexity_ratios": ratios, **found}
        share = 1 - mean(after) / mean(before)  # type: ignore[arg-type]
        print(f"{count} removed  KL {cell(before)} -> {cell(after)}  {share:.0%} recovered  "  # type: ignore[arg-type]
              f"perplexity x {ratios[0]:.3f} -> x {ratios[1]:.3f}  {found['cpu_seconds']:.0f} s")  # fmt: skip
        rows.append(row)
    return rows


def by_place(options: argparse.Namespace, folder: Path, data: Data) -> list[dict[str, object]]:
    """The second table: the same parameters in different blocks, by seed."""
    blocks = len(Skeleton.open(folder).blocks)
    some = -(-blocks // 3)
    last = ",".join(str(block) for block in range(blocks - some, blocks))
    every = max(options.rank * some // blocks, 1)
    ways = {
        "rdp": (Places("rdp", some), options.rank),
        "random": (Places("random", some), options.rank),
        "last": (Places(last), options.rank),
        "all": (Places("all"), every),
    }
    rows: list[dict[str, object]] = []
    for seed in range(options.seeds):
        for way, (places, rank) in ways.items():
            schedule = Schedule(options.short, BATCH, rate=2e-3, every=max(options.short // 2, 1), seed=seed)
            found = healed(folder, data, places, rank, schedule)
            found |= {"kld": mean(found["kld"]), "rise": mean(found["rise"])}  # type: ignore[arg-type]
            rows.append({"way": way, "seed": seed, **found})
            print(f"seed {seed}  {way:<7} blocks {found['blocks']}  {found['parameters']:,}  KL {found['kld']:.4f}")
    klds = {way: [float(str(row["kld"])) for row in rows if row["way"] == way] for way in ways}
    for way in ways:
        gaps = [mine - its for mine, its in zip(klds[way], klds["rdp"], strict=True)]
        print(f"{way:<7} KL {cell(klds[way])}  more than rdp by {cell(gaps)}")
    return rows


def main() -> None:
    """Print both tables."""
    options = arguments()
    source = resolve(options.model)
    text = TextRequest(options.calibration, options.samples, options.length, 0, "calibration")
    data = parts_of(source.path, token_batches(text, source.path).tokens, held_out=32, batch_size=8, device="cpu")
    with tempfile.TemporaryDirectory() as place:
        scratch = Path(place)
        first = by_blocks_removed(options, source, data, scratch)
        second = by_place(options, scratch / "2", data)
    document = {
        "model": source.name, "calibration": Path(options.calibration).name, "samples": options.samples,
        "length": options.length, "steps": options.steps, "short": options.short, "seeds": options.seeds,
        "batch": BATCH, "removed": first, "places": second,
    }  # fmt: skip
    publish(options.json, document)


if __name__ == "__main__":
    main()
