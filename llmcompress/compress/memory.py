"""How much memory a run needs, stage by stage, from the header of the model and the recipe alone.

Counted is anonymous memory: what the system cannot get back by dropping or writing pages of files; `python
bench/memory.py` compares the sums with what runs take.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

from llmcompress.compress.head import LOGITS
from llmcompress.compress.pipeline import Opened
from llmcompress.compress.rewrite import check_methods
from llmcompress.compress.sizes import FACTOR, FLOAT, WHOLE, Sizes
from llmcompress.model.needs import Stage, Stages, fit
from llmcompress.model.shelf import Shelf
from llmcompress.model.text import SAMPLING_ROWS
from llmcompress.recipes import Recipe
from llmcompress.types import LinearInfo

SIDED = 28  # of an output squared, where errors are fed back along outputs: a factor in float64, copies, the result
REWRITING = 24  # of a parameter: float32 before and after, float64, and that again to go back to
LOGIT_COPIES = 6  # of one batch, while two distributions are compared
GRADIENT_COPIES = 5  # of one batch: logits, probabilities, logarithms and their gradients
CONTESTANTS = 6  # allocations carried out side by side, at most
SWAPPING = ("kl", "noise", "working_point", "adaquant_delta")  # scorers that keep to score.swaps.memory_mb


def stages(opened: Opened, recipe: Recipe, *, reads: bool, scored: bool = False) -> Stages:
    """Every stage of `quantize`; `reads`: there is calibration text; `scored`: scores are there already."""
    sizes = Sizes(opened, recipe)
    found = [_entering(sizes, reads), *_applying(sizes, reads)]
    if reads and any(len(specs) > 1 for specs in opened.candidates.values()):
        found += () if scored else tuple(_scoring(sizes, recipe.scorer))
        if recipe.plan.trials:
            found += _trials(sizes)
    if opened.shards.head is not None:
        found.append(_head(sizes, opened.shards.head))
    if recipe.quantize.output_feedback:
        found.append(_curvatures(sizes))
    return (*found, *_before(sizes, reads))


def with_batches(recipe: Recipe, size: int) -> Recipe:
    """The recipe with so many sequences in a batch."""
    part = recipe.calibration.model_copy(update={"batch_size": size})
    return recipe.model_copy(update={"calibration": part})


def kept_to(
    opened: Opened, recipe: Recipe, limit: int | None, stages_of: Callable[[Recipe], Stages]
) -> tuple[Recipe, str]:
    """The recipe that keeps to a limit in bytes, and what is done about it; hidden states wait where they should.

    For commands without a state of their own: files are in the system's folder for temporary ones. Raises InputError
    with the memory that is needed where nothing helps.
    """
    size = recipe.calibration.batch_size
    found = fit(lambda size: stages_of(with_batches(recipe, size)), size, limit)
    opened.skeleton.shelf = Shelf(everything=found.spilled)
    return with_batches(recipe, found.batch_size), found.words(size)


def score_stages(opened: Opened, recipe: Recipe, scorers: Sequence[str], *, reads: bool) -> Stages:
    """Every stage of `score`."""
    sizes = Sizes(opened, recipe)
    found = [_entering(sizes, reads)]
    for scorer in scorers if reads else ():
        found += _scoring(sizes, scorer)
    return (*found, *_before(sizes, reads))


def prune_stages(opened: Opened, recipe: Recipe, scorers: Sequence[str]) -> Stages:
    """Every stage of `prune`, which measures as many models side by side as `score.swaps.memory_mb` has room for."""
    sizes = Sizes(opened, recipe)
    hidden = sizes.hidden(recipe.calibration.samples) + (recipe.score.swaps.memory_mb << 20)
    head = {"outside the blocks": sizes.rest, "logits": sizes.logits(LOGIT_COPIES)}
    walking = Stage("leaving blocks out", _entering(sizes, True).terms, hidden)
    return (walking, Stage("comparing what is left", head, hidden), *score_stages(opened, recipe, scorers, reads=True))


def _before(sizes: Sizes, reads: bool) -> Stages:
    """What is done to text and model before anything is scored."""
    opened, recipe = sizes.opened, sizes.recipe
    found = [_sampling(sizes)] if reads and recipe.calibration.source == "self" else []
    if recipe.rewrite.methods:  # of the model, or of a block
        whole = opened.trace.parameters if check_methods(recipe.rewrite.methods) else sizes.block
        found.append(Stage("rewriting", {"rewriting": whole * REWRITING}, sizes.hidden(recipe.calibration.samples)))
    return tuple(found)


def _entering(sizes: Sizes, reads: bool) -> Stage:
    """At the start of every pass, and when the result is read back."""
    samples = sizes.recipe.calibration.samples if reads else 0
    terms = {
        "outside the blocks": sizes.rest,
        "block": sizes.block * FLOAT + sizes.loading,
        "activations": sizes.activations() if reads else 0,
    }
    return Stage("entering the model", terms, sizes.hidden(samples))


def _sampling(sizes: Sizes) -> Stage:
    """Text is drawn from the model itself, which is whole in memory for that, with a cache of keys and values."""
    trace = sizes.opened.trace
    cache = 2 * SAMPLING_ROWS * sizes.length * sizes.width * FLOAT * len(trace.blocks)
    return Stage("sampling text", {"whole model": trace.parameters * FLOAT, "keys and values": cache})


def _block(sizes: Sizes, name: str, hidden: int, *, learns: bool, reads: bool) -> tuple[Stage, Stage]:
    """A block while its linears are looked at, and while they are rounded; the full-precision one runs beside.

    Where memory is limited that one and Hessians are in files.
    """
    beside = sizes.block * FLOAT if sizes.method.compares else 0
    others = sizes.others() if learns or not sizes.recipe.quantize.true_sequential else 0
    base = {
        "block": sizes.block * FLOAT + max(sizes.loading, 2 * sizes.weights),
        "full-precision block": beside,
        "other Hessians": others,
    }
    away = {"full-precision block": 0, "other Hessians": 0}
    files = beside + others + sizes.hessian()
    looking = {**base, "Hessian": sizes.summing(), "activations": sizes.activations() if reads else 0}
    kept = {**away, **sizes.rounding(filed=True)}
    return Stage("running a block", looking, hidden, away, files), Stage(
        name, {**base, **sizes.rounding()}, hidden, kept, files
    )


def _applying(sizes: Sizes, reads: bool) -> tuple[Stage, Stage]:
    """A block is rounded for good."""
    method, recipe = sizes.method, sizes.recipe
    samples = recipe.calibration.samples if reads else 0
    models = 2 if method.compares else 1
    waiting = sizes.hidden(samples) * (1 + (2 + sizes.routes) * models) + sizes.inputs(samples) * models
    hidden = waiting if samples else 0
    looking, rounding = _block(sizes, "quantizing a block", hidden, learns=bool(method.learners), reads=reads)
    more: dict[str, int] = {}
    if recipe.quantize.output_feedback:
        rows = max((x.rows for linears in sizes.linears for x in linears), default=0)
        more["output side"] = rows**2 * SIDED + sizes.group * FLOAT
    if method.learners:  # what is learned and its gradients, logits of a batch and theirs
        logits = 2 * min(sizes.logits(3), 3 * LOGITS * FLOAT)
        more["learning"] = 4 * sizes.block * FLOAT + sizes.activations(gradients=True) + logits
        more["outside the blocks"] = sizes.rest
    return looking, replace(rounding, terms={**rounding.terms, **more})


def _curvatures(sizes: Sizes) -> Stage:
    """The backward that output-side feedback needs: a block, and a matrix as wide as its output for every linear."""
    squares = [sum(x.rows**2 for x in linears if x.expert is None) for linears in sizes.linears]
    terms = {
        "block": sizes.block * FLOAT + sizes.loading,
        "output side": max(squares, default=0) * FLOAT,
        "activations": sizes.activations(gradients=True),
    }
    return Stage("gradients of a block", terms, 3 * sizes.hidden(sizes.recipe.calibration.samples))


def _scoring(sizes: Sizes, scorer: str) -> list[Stage]:
    """Fisher's backward, block by block; other scorers keep less, or to the memory that they are told."""
    recipe = sizes.recipe
    samples, formats = recipe.calibration.score_samples, max(map(len, sizes.opened.candidates.values()))
    hidden = sizes.hidden(samples)
    if scorer in SWAPPING:
        hidden = 3 * hidden + (recipe.score.swaps.memory_mb << 20)
    else:
        hidden *= 1 + recipe.score.fisher.draws
    base = {"block": sizes.block * FLOAT, "candidates": sizes.weights * 2 * formats, "other Hessians": sizes.others()}
    rounding = {**base, **sizes.rounding(formats=formats)}
    running = {**base, "activations": sizes.activations(gradients=True), "change": sizes.largest * FLOAT}
    looking = {**base, "Hessian": sizes.summing(), "activations": sizes.activations()}
    away, kept, files = {}, {}, 0
    if scorer == "fisher":  # by groups in turn then
        away = {"other Hessians": 0, "candidates": 0}
        kept = {**away, **sizes.rounding(formats=formats, filed=True)}
        files = sizes.group * 2 * formats + sizes.hessian()
    whole = sizes.opened.shards.head is not None
    head = {"outside the blocks": sizes.rest, "logits": sizes.logits(GRADIENT_COPIES, sliced=not whole)}
    return [
        Stage("running a block", {**looking, "candidates": 0}, hidden, away, files),
        Stage("rounding candidates", rounding, hidden, kept, files),
        Stage("scoring a block", {**running, "other Hessians": 0}, hidden, away, files),
        Stage("scoring the last hidden states", head, hidden),
    ]


def _trials(sizes: Sizes) -> list[Stage]:
    """Allocations carried out side by side: each has hidden states of its own."""
    samples, models = sizes.recipe.calibration.samples, 2 if sizes.method.compares else 1
    ways = sizes.hidden(samples) * (1 + CONTESTANTS)
    part = sizes.recipe.calibration.score_samples
    head = {"outside the blocks": sizes.rest, "logits": sizes.logits(LOGIT_COPIES)}
    waiting = sizes.hidden(part) * (2 + sizes.routes) * models + sizes.inputs(part) * models
    blocks = _block(sizes, "trying allocations on a block", ways + waiting, learns=False, reads=True)
    return [*blocks, Stage("comparing allocations", head, ways)]


def _head(sizes: Sizes, head: LinearInfo) -> Stage:
    """The head is rounded: copies of its weight, its Hessian, and logits of a batch while its inputs are read."""
    terms = {
        "outside the blocks": sizes.rest,
        "rounding": head.weights * WHOLE,
        "Hessian": head.columns**2 * (FLOAT + FACTOR) if sizes.method.quantizer.NEEDS_HESSIAN else 0,
        "logits": sizes.logits(2, sliced=False),
    }
    return Stage("quantizing the head", terms, 2 * sizes.hidden(sizes.recipe.calibration.samples))
