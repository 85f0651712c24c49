"""How much memory a run needs, stage by stage, from the header of the model and the recipe alone.

Counted is anonymous memory: what the system cannot get back by dropping or writing pages of files. Factors are counted
from the code, copies that live at one time; `python bench/memory.py` compares the sums with what runs take.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from llmcompress.compress.head import LOGITS
from llmcompress.compress.pipeline import QUANTIZERS, Opened
from llmcompress.compress.replay import INPUT_BYTES
from llmcompress.compress.rewrite import check_methods
from llmcompress.compress.rounds import Method
from llmcompress.compress.sequential import BATCH_WEIGHTS
from llmcompress.model.text import SAMPLING_ROWS
from llmcompress.plugins import find
from llmcompress.recipes import Recipe
from llmcompress.types import LinearInfo

FLOAT = 4
PROGRAM = 340 << 20  # the interpreter, torch and transformers, as imported
FACTOR = 34  # of a column squared: a float32 Hessian and its drift, and its factor and inverse in float64
ROUNDING = 32  # of a weight while it is rounded: copies in order, what is left, codes, or its target in float64
HOLES = 1 << 30  # at most, and at most half of what is in use: kept by the C library's heap, of tensors up to 32 MB
REWRITING = 24  # of a parameter: float32 before and after, float64, and that again to go back to
LOGIT_COPIES = 6  # of one batch, while two distributions are compared
GRADIENT_COPIES = 5  # of one batch: logits, probabilities, logarithms and their gradients
CONTESTANTS = 6  # allocations carried out side by side, at most
SWAPPING = ("kl", "noise", "working_point", "adaquant_delta")  # scorers that keep to score.swaps.memory_mb


@dataclass(frozen=True)
class Stage:
    """One stage of a run and what is in memory at its height, bytes by name.

    `hidden` are hidden states and what else waits for the next block: in files instead, where memory is limited.
    """

    name: str
    terms: Mapping[str, int]
    hidden: int = 0

    def total(self, *, spilled: bool) -> int:
        """Bytes, with hidden states in memory or not."""
        return sum(self.every(spilled=spilled).values())

    def every(self, *, spilled: bool) -> dict[str, int]:
        """All terms that are not nothing, the largest first."""
        found = {**self.terms, "hidden states": 0 if spilled else self.hidden}
        found |= {"program": PROGRAM, "heap": min(sum(found.values()) // 2, HOLES)}
        return dict(sorted(((k, v) for k, v in found.items() if v), key=lambda pair: -pair[1]))


def peak(found: tuple[Stage, ...], *, spilled: bool) -> Stage:
    """The stage that needs most."""
    return max(found, key=lambda stage: stage.total(spilled=spilled))


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
        inside = sum(p.numel() for p in self.opened.skeleton.blocks.parameters())
        return (self.opened.trace.parameters - inside) * FLOAT

    @property
    def loading(self) -> int:
        """The block as it is in the file, while it becomes float32."""
        return self.block * min(self.opened.source_bytes // max(self.opened.trace.parameters, 1), FLOAT)

    @property
    def weights(self) -> int:
        return max((sum(x.weights for x in linears) for linears in self.linears), default=0)

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

    def logits(self, copies: int) -> int:
        """Of one batch."""
        vocabulary = int(self.opened.skeleton.config.get_text_config().vocab_size)
        return self.recipe.calibration.batch_size * self.length * vocabulary * FLOAT * copies

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

    def hessians(self, *, every: bool) -> int:
        """What a group with the widest input takes while it is rounded, and float32 ones of all groups of a block."""
        if not self.method.quantizer.NEEDS_HESSIAN:
            return 0
        groups = [{x.shared_input: x.columns**2 for x in linears} for linears in self.linears]
        widest = max((columns for found in groups for columns in found.values()), default=0)
        together = max((sum(found.values()) for found in groups), default=0)
        return widest * FACTOR + ((together - widest) * FLOAT if every else 0)

    def rounding(self, *, formats: int = 1) -> int:
        """Copies of the weights that are rounded together, linears of a group in so many formats."""
        largest = together = 0
        for linears in self.linears:
            groups: dict[int, int] = {}
            for x in linears:
                groups[x.shared_input] = groups.get(x.shared_input, 0) + x.weights * formats
                largest = max(largest, x.weights)
            together = max(together, *groups.values(), 0)
        return max(min(together, BATCH_WEIGHTS), largest) * ROUNDING + (together if formats > 1 else 0)


def stages(opened: Opened, recipe: Recipe, *, reads: bool, scored: bool = False) -> tuple[Stage, ...]:
    """Every stage of `quantize`; `reads`: there is calibration text; `scored`: scores are there already."""
    sizes = _Sizes(opened, recipe)
    found = [_entering(sizes, reads), _applying(sizes, reads)]
    if reads and any(len(specs) > 1 for specs in opened.candidates.values()):
        found += () if scored else _scoring(sizes)
        if recipe.plan.trials:
            found += _trials(sizes)
    if reads and recipe.calibration.source == "self":
        found.append(_sampling(sizes))
    if opened.shards.head is not None:
        found.append(_head(sizes, opened.shards.head))
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
    method, samples = sizes.method, sizes.recipe.calibration.samples if reads else 0
    models = 2 if method.compares else 1
    terms = {
        "block": sizes.block * FLOAT * models + max(sizes.loading, 2 * sizes.weights),
        "Hessians": sizes.hessians(every=not sizes.recipe.quantize.true_sequential or bool(method.learners)),
        "rounding": sizes.rounding(),
        "activations": sizes.activations() if reads else 0,
    }
    if method.learners:  # what is learned and its gradients, logits of a batch and theirs
        logits = 2 * min(sizes.logits(3), 3 * LOGITS * FLOAT)
        terms["learning"] = 4 * sizes.block * FLOAT + sizes.activations(gradients=True) + logits
        terms["outside the blocks"] = sizes.rest
    waiting = sizes.hidden(samples) * (1 + (2 + sizes.routes) * models) + sizes.inputs(samples) * models
    return Stage("quantizing a block", terms, waiting if samples else 0)


def _scoring(sizes: _Sizes) -> list[Stage]:
    """Fisher's backward, block by block; other scorers keep less, or to the memory that they are told."""
    recipe = sizes.recipe
    samples, formats = recipe.calibration.score_samples, max(map(len, sizes.opened.candidates.values()))
    hidden = sizes.hidden(samples)
    if recipe.scorer in SWAPPING:
        hidden = 3 * hidden + (recipe.score.swaps.memory_mb << 20)
    else:
        hidden *= 1 + recipe.score.fisher.draws
    block = {
        "block": sizes.block * FLOAT,
        "candidates": sizes.weights * 2 * formats,
        "Hessians": sizes.hessians(every=True),
        "rounding": sizes.rounding(formats=formats),
        "activations": sizes.activations(gradients=True),
    }
    head = {"outside the blocks": sizes.rest, "logits": sizes.logits(GRADIENT_COPIES)}
    return [Stage("scoring a block", block, hidden), Stage("scoring the last hidden states", head, hidden)]


def _trials(sizes: _Sizes) -> list[Stage]:
    """Allocations carried out side by side: each has hidden states of its own."""
    samples, models = sizes.recipe.calibration.samples, 2 if sizes.method.compares else 1
    ways = sizes.hidden(samples) * (1 + CONTESTANTS)
    part = sizes.recipe.calibration.score_samples
    block = {
        "block": sizes.block * FLOAT * models + max(sizes.loading, 2 * sizes.weights),
        "Hessians": sizes.hessians(every=not sizes.recipe.quantize.true_sequential),
        "rounding": sizes.rounding(),
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
        "Hessians": head.columns**2 * FACTOR if sizes.method.quantizer.NEEDS_HESSIAN else 0,
        "logits": sizes.logits(2),
    }
    return Stage("quantizing the head", terms, 2 * sizes.hidden(sizes.recipe.calibration.samples))
