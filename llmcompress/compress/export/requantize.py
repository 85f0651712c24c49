"""Weights as integers of ggml once more, weighed by what their inputs are on calibration text (an importance matrix).

Scales are those of the least `sum_j E[x_j^2] (w_j - integer_j * scale)^2`: the diagonal of the Hessian of a linear,
which is seen on the very checkpoint that is exported.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.compress.export import ggml
from llmcompress.compress.export.checkpoint import Checkpoint
from llmcompress.compress.grid import find_scale, round_weight
from llmcompress.compress.observe import watching_inputs
from llmcompress.model.stream import BlockStream
from llmcompress.model.text import TextRequest, token_batches
from llmcompress.model.trace import trace
from llmcompress.spec import LinearSpec

SAMPLES, LENGTH, BATCH = 32, 256, 8


@dataclass(frozen=True)
class Energies:
    """Mean squares of the inputs `(columns,)` of linears by tensor, and what text they are of."""

    of: dict[str, Tensor]
    source: str


@torch.no_grad()
def input_energies(checkpoint: Checkpoint, text: str) -> Energies:
    """What the linears of the blocks read on calibration text. Raises InputError where there is too little of it."""
    skeleton = checkpoint.skeleton
    limit = getattr(skeleton.config.get_text_config(), "max_position_embeddings", None) or LENGTH
    request = TextRequest(text, SAMPLES, min(LENGTH, limit), 0, "calibration", "nothing")
    batches = token_batches(request, skeleton.files.folder)
    traced, stream = trace(skeleton), BlockStream(skeleton)
    hidden, calls = stream.start(batches.split(BATCH))
    found: dict[str, Tensor] = {}
    for block in traced.blocks:
        sums: dict[int, Tensor] = {}

        def see(group: int, inputs: Tensor, sums: dict[int, Tensor] = sums) -> None:
            sums[group] = sums.get(group, 0.0) + inputs.double().square().sum(0)

        with watching_inputs(skeleton.blocks[block.index], block, see):
            stream.pass_block(block.index, hidden, calls)
        for linear in block.linears:
            found[linear.tensor] = (sums[linear.shared_input] / batches.tokens.numel()).float()
    skeleton.free_rest()
    return Energies(found, batches.source)


def rounded(weight: Tensor, energy: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    """The integers, int16 `(rows, columns)`, and scales, float16 `(rows, columns / 32)`, of a weight rounded anew.

    weight  (rows, columns)  float32; columns are whole blocks of 32
    energy  (columns,)       what a squared error of each column counts in the search for scales, all alike where None
    kind    of ggml: `Q4_0`, `Q5_0`, `Q8_0`
    """
    spec = LinearSpec(bits=ggml.HALVES[kind].bit_length(), group_size=ggml.BLOCK)
    scale = find_scale(weight, spec, torch.float16, importance=energy)
    codes = round_weight(weight, scale, spec)
    return codes.codes.to(torch.int16) - ggml.HALVES[kind], codes.scale
