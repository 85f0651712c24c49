"""KL against the number of blocks removed, for every way to choose them: by a score alone, at random, and by search.

    python bench/depth.py demo
    python bench/depth.py MODEL --calibration TEXT --data OTHER_TEXT --most 3

A score removes its least important blocks, whatever that does together; `search` is what `llmcompress prune` does,
from the ranking by voids; with `--halves`, `halves` is the same with attention and MLP halves, two for each block
(`prune --sublayers --pairs`). All choose on calibration text and are judged on other text; random choices are five
seeds. KL in nats per token with its standard error over sequences.
"""

import argparse
import random
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from common import write

from llmcompress.compress.pipeline import calibration, open_model, score_job
from llmcompress.compress.prune.choose import Chooser, Search, choose
from llmcompress.compress.prune.halves import Removal
from llmcompress.compress.prune.measure import removal_damage
from llmcompress.compress.prune.run import block_importance
from llmcompress.compress.prune.units import Scope, Units, find_units
from llmcompress.compress.scoring import run_scorers
from llmcompress.compress.statistics import mean, standard_error
from llmcompress.hub.source import resolve
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.text import TextRequest, token_batches
from llmcompress.recipes import load_recipe

SEEDS = 5
SCORERS = ("voids", "block_influence", "lim", "rdp", "fisher")


def arguments() -> argparse.Namespace:
    """Options of this benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--data", default="builtin")
    parser.add_argument("--samples", type=int, default=32, help="sequences to choose by, and to judge by")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--most", type=int, default=4, help="blocks removed at most")
    parser.add_argument("--halves", action="store_true", help="search halves of blocks as well")
    parser.add_argument("--json", type=Path, help="also write the table here")
    return parser.parse_args()


def searched_halves(skeleton: Skeleton, units: Units, choosing: Sequence[torch.Tensor], most: int) -> list[Removal]:
    """The best sets of two, four, ... halves, as `prune --sublayers --pairs` finds them."""

    def measured(sets: Sequence[frozenset[int]]) -> torch.Tensor:
        return removal_damage(skeleton, list(map(units.removal, sets)), choosing, halves=units.halves).kld

    places = range(len(units.units))
    singles = measured([frozenset({place}) for place in places]).mean(1).tolist()
    steps = choose(Chooser(measured, singles, Search(), pairs=units.pairs), count=2 * most, max_kld=None)
    return [units.removal(frozenset(map(int, step.removed))) for step in steps[1::2]]


def share(skeleton: Skeleton, removal: Removal, units: Units) -> float:
    """Share of the blocks' weights that a removal leaves out."""
    gone = 0
    for unit in removal:
        if isinstance(unit, int):
            gone += sum(p.numel() for p in skeleton.blocks[unit].parameters())
        else:
            modules = [skeleton.blocks[unit.block].get_submodule(name) for name in units.halves.modules[unit].weights]
            gone += sum(p.numel() for module in modules for p in module.parameters())
    return gone / sum(p.numel() for p in skeleton.blocks.parameters())


def main() -> None:
    """Print the table."""
    options = arguments()
    settings = {"source": options.calibration, "samples": options.samples, "score_samples": options.samples}
    changes = [f"calibration.{key}={value}" for key, value in settings.items()]
    recipe = load_recipe("balanced", (*changes, f"calibration.sequence_length={options.length}"))
    source = resolve(options.model)
    opened = open_model(source, recipe, "cpu")
    batches = calibration(opened, recipe)
    skeleton, blocks = opened.skeleton, len(opened.trace.blocks)
    choosing = batches.split(8)
    request = TextRequest(options.data, options.samples, options.length, 0, "evaluation")
    judging = token_batches(request, source.path).split(8)
    singles = removal_damage(skeleton, [frozenset({block}) for block in range(blocks)], choosing).kld.mean(1).tolist()
    found = run_scorers(SCORERS, score_job(opened, recipe, batches))
    linears = [[linear.name for linear in info.linears] for info in opened.trace.blocks]
    ranks = {name: list(block_importance(found[name], linears, name)) for name in SCORERS} | {"single KL": singles}

    def measured(sets: Sequence[frozenset[int]]) -> torch.Tensor:
        return removal_damage(skeleton, sets, choosing).kld

    steps = choose(Chooser(measured, ranks["voids"], Search()), count=options.most, max_kld=None)
    ways: dict[str, Callable[[int], frozenset[int]]] = {
        name: lambda count, values=values: frozenset(sorted(range(blocks), key=lambda b: (values[b], b))[:count])
        for name, values in ranks.items()
    }
    ways["last blocks"] = lambda count: frozenset(range(blocks - count, blocks))
    for seed in range(SEEDS):
        order = random.Random(seed).sample(range(blocks), blocks)
        ways[f"random {seed}"] = lambda count, order=order: frozenset(order[:count])
    ways["search"] = lambda count: frozenset(steps[count - 1].removed)
    table: dict[str, list[Removal]] = {
        name: [way(count) for count in range(1, options.most + 1)] for name, way in ways.items()
    }
    units = find_units(skeleton, opened.trace, Scope(sublayers=True, pairs=True))
    if options.halves:
        table["halves"] = searched_halves(skeleton, units, choosing, options.most)
    rows = []
    for name, sets in table.items():
        damage = removal_damage(skeleton, sets, judging, halves=units.halves)
        cells = [(mean(klds), standard_error(klds)) for klds in damage.kld.tolist()]
        ratios = [float(torch.tensor(mean(values)).exp()) for values in damage.dnll.tolist()]
        removed = [sorted(map(str, some)) for some in sets]
        shares = [share(skeleton, some, units) for some in sets]
        rows.append({"way": name, "removed": removed, "kld": cells, "perplexity_ratio": ratios, "share": shares})
        print(f"{name:<16}" + "  ".join(f"{kld:8.4f} ± {error:.4f}" for kld, error in cells) + f"  {removed[-1]}")
    write(options, rows, samples=options.samples, length=options.length)


if __name__ == "__main__":
    main()
