"""What a model and a recipe come to in bytes: the figures that the forecast of `compress/memory.py` adds up.

Factors are counted from the code, copies that live at one time.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from llmcompress.compress.group import Method
from llmcompress.compress.measuring import SLICE_LOGITS
from llmcompress.compress.pipeline import QUANTIZERS, Opened
from llmcompress.compress.replay import INPUT_BYTES
from llmcompress.compress.sequential import BATCH_WEIGHTS
from llmcompress.plugins import find
from llmcompress.recipes import Recipe
from llmcompress.types import LinearInfo

FLOAT = 4
SUMMING = 8  # of a column squared while a Hessian is summed up: it, half of it in stripes, what the models differ by
FACTOR = 12  # of a column squared, beside the Hessian: a factor in float64, and the same in float32
FACTORS = 8  # of a column squared, beside the Hessian: factor and metric in float32
ROUNDING = (
    16  # of a weight while rows are rounded with feedback in torch: what is left, errors, steps, codes, gradients
)
WHOLE = 32  # of a weight where all its rows are rounded at a time
NEAREST = 16  # of a weight while it is rounded by itself


@dataclass(frozen=True)
class Sizes:
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
        """Tokens of a sequence."""
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

    @property
    def largest(self) -> int:
        """Weights of the largest linear."""
        return max((x.weights for linears in self.linears for x in linears), default=0)

    def hessian(self, each: int = FLOAT) -> int:
        """The Hessian of the widest input, or so many bytes of each of its numbers."""
        widest = max((x.columns for linears in self.linears for x in linears), default=0)
        return widest**2 * each if self.method.quantizer.NEEDS_HESSIAN else 0

    def summing(self) -> int:
        """What the widest input takes while its Hessian is summed up."""
        return self.hessian(SUMMING)

    def rounding(self, *, formats: int = 0, filed: bool = False) -> dict[str, int]:
        """What the group that needs most takes while it is rounded, its linears in so many formats.

        Without a number of formats it is for what is stored, and weights are aimed at something of their own. `filed`:
        the Hessian is in a file.
        """
        most = {"Hessian": 0, "rounding": 0}
        for linears in self.linears:
            for group in {x.shared_input for x in linears}:
                found = self._group([x for x in linears if x.shared_input == group], formats, filed=filed)
                most = max(most, found, key=lambda terms: sum(terms.values()))
        return most

    def _group(self, members: Sequence[LinearInfo], formats: int, *, filed: bool) -> dict[str, int]:
        largest, together = max(x.weights for x in members), sum(x.weights for x in members)
        if not self.method.quantizer.NEEDS_HESSIAN:
            return {"Hessian": 0, "rounding": together * max(formats, 1) * NEAREST}
        at_once = max(min(together * max(formats, 1), BATCH_WEIGHTS), largest)
        by_rows = hasattr(self.method.quantizer, "TWO_SIDED")
        working = min(at_once, 2 * BATCH_WEIGHTS) * ROUNDING if by_rows else at_once * WHOLE
        kept, terms = (together * formats, 0) if formats else (together * FLOAT, together * FLOAT)  # what is aimed at
        squares = members[0].columns ** 2
        known = 0 if filed else squares * FLOAT
        losing = 3 * largest * FLOAT  # what was stored, its error, and that times the Hessian
        steps = ((squares * FACTOR, terms), (squares * FACTORS, working), (0, losing))
        factors, work = max(steps, key=sum)
        return {"Hessian": known + factors, "rounding": kept + work}


def _weights(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
