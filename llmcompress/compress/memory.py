"""How much memory a run needs, stage by stage, from the header of the model and the recipe alone.

Counted is anonymous memory: what the system cannot get back by dropping or writing pages of files. Factors are counted
from the code, copies that live at one time; `python bench/memory.py` compares the sums with what runs take.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from llmcompress.compress.group import Method
from llmcompress.compress.head import LOGITS
from llmcompress.compress.measuring import SLICE_LOGITS
from llmcompress.compress.pipeline import QUANTIZERS, Opened
from llmcompress.compress.replay import INPUT_BYTES
from llmcompress.compress.rewrite import check_methods
from llmcompress.compress.sequential import BATCH_WEIGHTS
from llmcompress.model.needs import Stage, Stages, fit
from llmcompress.model.shelf import Shelf
from llmcompress.model.text import SAMPLING_ROWS
from llmcompress.plugins import find
from llmcompress.recipes import Recipe
from llmcompress.types import LinearInfo

FLOAT = 4
FACTOR = 20  # of a column squared: a float32 Hessian, factor and metric, and one more in float64 while one is made
ROUNDING = 32  # of a weight while it is rounded with feedback: copies in order, what is left, codes, gradients
SIDED = 28  # of an output squared, where errors are fed back along outputs: a factor in float64, copies, the result
NEAREST = 16  # of a weight while it is rounded by itself
REWRITING = 24  # of a parameter: float32 before and after, float64, and that again to go back to
LOGIT_COPIES = 6  # of one batch, while two distributions are compared
GRADIENT_COPIES = 5  # of one batch: logits, probabilities, logarithms and their gradients
CONTESTANTS = 6  # allocations carried out side by side, at most
SWAPPING = ("kl", "noise", "working_point", "adaquant_delta")  # scorers that keep to score.swaps.memory_mb


@dataclass(frozen=True)
class _Sizes:
    """Of one model and recipe: parameters and weights by number, the rest in bytes."""

    opened: Opened
    recipe: Recipe
    method: Method = field(init=False)

    def __post_init__(self) -> None:
        quantizer = find(QUANTIZERS, self.recipe.quantizer)
        object.__setattr__(self, "method", Method(quantizer, self.recipe.quantize, torch.float32, learns=True))

    @property
    def linears(self) -> list[list[LinearInfo]]:
        """Linears that may be quantized, by block."""
        return [[x for x in info.linears if x.name in self.opened.candidates] for info in self.opened.trace.blocks]

    @property
    def block(self) -> int:
        return max(sum(p.numel() for p in block.parameters()) for block in self.opened.skeleton.blocks)

    @property
    def rest(self) -> int:
        """What tokens enter the model by, or leave it by, whichever is more; that of a tied head is both."""
        model = self.opened.skeleton.model
        inside = sum(p.numel() for p in self.opened.skeleton.blocks.parameters())
        ends = [_weights(part) for part in (model.get_input_embeddings(), model.get_output_embeddings())]
        apart = 0 if self.opened.skeleton.tied() else min(ends)
        return (self.opened.trace.parameters - inside - apart) * FLOAT

    @property
    def loading(self) -> int:
        """The block as it is in the file, where its tensors have to be merged while they become float32."""
        stored = min(self.opened.source_bytes // max(self.opened.trace.parameters, 1), FLOAT)
        return self.block * stored if self.opened.skeleton.names.converted else 0

    @property
    def weights(self) -> int:
        return max((sum(x.weights for x in linears) for linears in self.linears), default=0)

    @property
    def group(self) -> int:
        """Weights of the largest group of linears that read one input."""
        sums: Counter[tuple[int, int]] = Counter()
        for place, linears in enumerate(self.linears):
            for x in linears:
                sums[place, x.shared_input] += x.weights
        return max(sums.values(), default=0)

    @property
    def width(self) -> int:
        return int(self.opened.skeleton.config.get_text_config().hidden_size)

    @property
    def length(self) -> int:
        wanted = self.recipe.calibration.sequence_length
        return min(wanted, self.opened.context_tokens or wanted)

    def hidden(self, samples: int) -> int:
        """Hidden states of so many sequences."""
        return min(samples, self.recipe.calibration.samples) * self.length * self.width * FLOAT

    def inputs(self, samples: int) -> int:
        """Inputs of last linears that are kept for the next run of a block."""
        widest = max((x.columns for linears in self.linears for x in linears), default=0)
        return min(self.hidden(samples) * widest // self.width, INPUT_BYTES)

    def logits(self, copies: int, *, sliced: bool = True) -> int:
        """Of one batch, or of so many positions of it as are compared at a time."""
        vocabulary = int(self.opened.skeleton.config.get_text_config().vocab_size)
        numbers = self.recipe.calibration.batch_size * self.length * vocabulary
        least = self.recipe.calibration.batch_size * vocabulary
        return (min(numbers, max(SLICE_LOGITS, least)) if sliced else numbers) * FLOAT * copies

    def activations(self, *, gradients: bool = False) -> int:
        """Inputs and outputs of every linear of a block, for one batch; with gradients, what goes back as well."""
        each = max(self._of_token(info.linears) for info in self.opened.trace.blocks)
        return self.recipe.calibration.batch_size * self.length * each * FLOAT * (2 if gradients else 1)

    def _of_token(self, linears: Sequence[LinearInfo]) -> int:
        """Inputs and outputs of the linears that a token passes: of experts, those it is routed to."""
        sizes = {
            routed: sum(x.rows + x.columns for x in linears if (x.expert is not None) == routed) for routed in (0, 1)
        }
        experts = len({x.expert for x in linears if x.expert is not None})
        config = self.opened.skeleton.config.get_text_config()
        chosen = min(int(getattr(config, "num_experts_per_tok", 0) or experts), experts)
        return sizes[0] + -(-sizes[1] * chosen // max(experts, 1))

    @property
    def routes(self) -> bool:
        """Whether what arrives at experts waits until all of them have been looked at."""
        return any(x.expert is not None for linears in self.linears for x in linears)

    def others(self) -> int:
        """Float32 Hessians of the inputs of a block, but for the widest."""
        if not self.method.quantizer.NEEDS_HESSIAN:
            return 0
        found = [{x.shared_input: x.columns**2 for x in linears}.values() for linears in self.linears]
        return max((sum(squares) - max(squares, default=0) for squares in found), default=0) * FLOAT

    def rounding(self, *, formats: int = 1) -> dict[str, int]:
        """What the group that needs most takes while it is rounded, its linears in so many formats."""
        most = {"Hessian": 0, "rounding": 0}
        for linears in self.linears:
            for group in {x.shared_input for x in linears}:
                found = self._group([x for x in linears if x.shared_input == group], formats)
                most = max(most, found, key=lambda terms: sum(terms.values()))
        return most

    def _group(self, members: Sequence[LinearInfo], formats: int) -> dict[str, int]:
        largest, together = max(x.weights for x in members), sum(x.weights for x in members) * formats
        if not self.method.quantizer.NEEDS_HESSIAN:
            return {"Hessian": 0, "rounding": together * NEAREST}
        at_once = max(min(together, BATCH_WEIGHTS), largest) * ROUNDING
        return {"Hessian": members[0].columns ** 2 * FACTOR, "rounding": at_once + together * (formats > 1)}


def _weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def stages(opened: Opened, recipe: Recipe, *, reads: bool, scored: bool = False) -> Stages:
    """Every stage of `quantize`; `reads`: there is calibration text; `scored`: scores are there already."""
    sizes = _Sizes(opened, recipe)
    found = [_entering(sizes, reads), _applying(sizes, reads)]
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
    sizes = _Sizes(opened, recipe)
    found = [_entering(sizes, reads)]
    for scorer in scorers if reads else ():
        found += _scoring(sizes, scorer)
    return (*found, *_before(sizes, reads))


def prune_stages(opened: Opened, recipe: Recipe, scorers: Sequence[str]) -> Stages:
    """Every stage of `prune`, which measures as many models side by side as `score.swaps.memory_mb` has room for."""
    sizes = _Sizes(opened, recipe)
    hidden = sizes.hidden(recipe.calibration.samples) + (recipe.score.swaps.memory_mb << 20)
    head = {"outside the blocks": sizes.rest, "logits": sizes.logits(LOGIT_COPIES)}
    walking = Stage("leaving blocks out", _entering(sizes, True).terms, hidden)
    return (walking, Stage("comparing what is left", head, hidden), *score_stages(opened, recipe, scorers, reads=True))


def _before(sizes: _Sizes, reads: bool) -> Stages:
    """What is done to text and model before anything is scored."""
    opened, recipe = sizes.opened, sizes.recipe
    found = [_sampling(sizes)] if reads and recipe.calibration.source == "self" else []
    if recipe.rewrite.methods:  # of the model, or of a block
        whole = opened.trace.parameters if check_methods(recipe.rewrite.methods) else sizes.block
        found.append(Stage("rewriting", {"rewriting": whole * REWRITING}, sizes.hidden(recipe.calibration.samples)))
    return tuple(found)


def _entering(sizes: _Sizes, reads: bool) -> Stage:
    """At the start of every pass, and when the result is read back."""
    samples = sizes.recipe.calibration.samples if reads else 0
    terms = {
        "outside the blocks": sizes.rest,
        "block": sizes.block * FLOAT + sizes.loading,
        "activations": sizes.activations() if reads else 0,
    }
    return Stage("entering the model", terms, sizes.hidden(samples))


def _sampling(sizes: _Sizes) -> Stage:
    """Text is drawn from the model itself, which is whole in memory for that, with a cache of keys and values."""
    trace = sizes.opened.trace
    cache = 2 * SAMPLING_ROWS * sizes.length * sizes.width * FLOAT * len(trace.blocks)
    return Stage("sampling text", {"whole model": trace.parameters * FLOAT, "keys and values": cache})


def _applying(sizes: _Sizes, reads: bool) -> Stage:
    """A block is rounded, beside the full-precision one where that runs too."""
    method, recipe = sizes.method, sizes.recipe
    samples = recipe.calibration.samples if reads else 0
    models = 2 if method.compares else 1
    terms = {
        "block": sizes.block * FLOAT * models + max(sizes.loading, 2 * sizes.weights),
        "other Hessians": sizes.others() if not recipe.quantize.true_sequential or method.learners else 0,
        **sizes.rounding(),
        "activations": sizes.activations() if reads else 0,
    }
    if recipe.quantize.output_feedback:
        terms["output side"] = max((x.rows**2 for linears in sizes.linears for x in linears), default=0) * SIDED
    if method.learners:  # what is learned and its gradients, logits of a batch and theirs
        logits = 2 * min(sizes.logits(3), 3 * LOGITS * FLOAT)
        terms["learning"] = 4 * sizes.block * FLOAT + sizes.activations(gradients=True) + logits
        terms["outside the blocks"] = sizes.rest
    waiting = sizes.hidden(samples) * (1 + (2 + sizes.routes) * models) + sizes.inputs(samples) * models
    return Stage("quantizing a block", terms, waiting if samples else 0)


def _curvatures(sizes: _Sizes) -> Stage:
    """The backward that output-side feedback needs: a block, and a matrix as wide as its output for every linear."""
    squares = [sum(x.rows**2 for x in linears if x.expert is None) for linears in sizes.linears]
    terms = {
        "block": sizes.block * FLOAT + sizes.loading,
        "output side": max(squares, default=0) * FLOAT,
        "activations": sizes.activations(gradients=True),
    }
    return Stage("gradients of a block", terms, 3 * sizes.hidden(sizes.recipe.calibration.samples))


def _scoring(sizes: _Sizes, scorer: str) -> list[Stage]:
    """Fisher's backward, block by block; other scorers keep less, or to the memory that they are told."""
    recipe = sizes.recipe
    samples, formats = recipe.calibration.score_samples, max(map(len, sizes.opened.candidates.values()))
    hidden = sizes.hidden(samples)
    if scorer in SWAPPING:
        hidden = 3 * hidden + (recipe.score.swaps.memory_mb << 20)
    else:
        hidden *= 1 + recipe.score.fisher.draws
    block = {
        "block": sizes.block * FLOAT,
        "candidates": sizes.weights * 2 * formats,
        "other Hessians": sizes.others(),
        **sizes.rounding(formats=formats),
        "activations": sizes.activations(gradients=True),
    }
    whole = sizes.opened.shards.head is not None
    head = {"outside the blocks": sizes.rest, "logits": sizes.logits(GRADIENT_COPIES, sliced=not whole)}
    limited = {"other Hessians": 0, "candidates": sizes.group * 2 * formats}
    return [Stage("scoring a block", block, hidden, limited), Stage("scoring the last hidden states", head, hidden)]


def _trials(sizes: _Sizes) -> list[Stage]:
    """Allocations carried out side by side: each has hidden states of its own."""
    samples, models = sizes.recipe.calibration.samples, 2 if sizes.method.compares else 1
    ways = sizes.hidden(samples) * (1 + CONTESTANTS)
    part = sizes.recipe.calibration.score_samples
    block = {
        "block": sizes.block * FLOAT * models + max(sizes.loading, 2 * sizes.weights),
        "other Hessians": 0 if sizes.recipe.quantize.true_sequential else sizes.others(),
        **sizes.rounding(),
        "activations": sizes.activations(),
    }
    head = {"outside the blocks": sizes.rest, "logits": sizes.logits(LOGIT_COPIES)}
    waiting = sizes.hidden(part) * (2 + sizes.routes) * models + sizes.inputs(part) * models
    return [Stage("trying allocations on a block", block, ways + waiting), Stage("comparing allocations", head, ways)]


def _head(sizes: _Sizes, head: LinearInfo) -> Stage:
    """The head is rounded: copies of its weight, its Hessian, and logits of a batch while its inputs are read."""
    terms = {
        "outside the blocks": sizes.rest,
        "rounding": head.weights * ROUNDING,
        "Hessian": head.columns**2 * FACTOR if sizes.method.quantizer.NEEDS_HESSIAN else 0,
        "logits": sizes.logits(2, sliced=False),
    }
    return Stage("quantizing the head", terms, 2 * sizes.hidden(sizes.recipe.calibration.samples))
