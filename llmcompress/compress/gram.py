"""The Gauss-Newton Gram of single changes: how the errors of two units add up in the logits.

For small changes `KL = 1/2 E dz^T F dz` with `F = diag(p) - p p^T`. With `v_i = sqrt(p) (dz_i - E_p dz_i)` per
token, `G_ij = <v_i, v_j>` makes `1/2 x^T G x` the divergence of any set `x` of changes: one evaluation per change,
positive semidefinite by construction. Vectors are kept as seeded count sketches, so their length does not matter.
"""

from collections.abc import Sequence

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmcompress.compress.allocate.quadratic import pairwise
from llmcompress.compress.measuring import Changes, MeasureJob, Text
from llmcompress.compress.swaps import measure_swaps, run_swaps

TOKENS_KEPT = 256  # the most likely tokens of each position; the rest goes into one bucket
SKETCH = 1 << 14


def error_vectors(p: Tensor, q: Tensor, kept: int = TOKENS_KEPT) -> Tensor:
    """`v` of each token, `(tokens, min(kept, vocabulary) + 1)`, from log-probabilities `(tokens, vocabulary)`.

    A shift of the logits cancels, so log-probabilities serve as logits. The bucket holds the probability mass of
    the unlikely tokens and their mean change, which loses only the variance within it.
    """
    change = q - p
    chance = p.exp()
    centred = change - (chance * change).sum(-1, keepdim=True)
    if kept >= p.shape[-1]:
        return chance.sqrt() * centred
    top = chance.topk(kept, -1).indices
    likely = (chance.sqrt() * centred).gather(-1, top)
    mass = (1 - chance.gather(-1, top).sum(-1, keepdim=True)).clamp_min(1e-12)
    rest = -(chance * centred).gather(-1, top).sum(-1, keepdim=True)  # the centred changes add up to zero
    return torch.cat([likely, rest / mass.sqrt()], -1)


class GramJudge:
    """Sketches the error vector of every variant, and adds up nothing else.

    The sketch is a count sketch: every coordinate goes to one of `size` buckets with a random sign, both drawn
    from the seed and the batch's place. Inner products are kept in expectation, with deviation `1 / sqrt(size)`.
    """

    def __init__(self, variants: int, *, size: int = SKETCH, seed: int = 0) -> None:
        self.table = torch.zeros(variants, size, dtype=torch.float32)
        self.seed = seed
        self.tokens: dict[int, int] = {}
        self._drawn: tuple[int, Tensor, Tensor] = (-1, torch.empty(0), torch.empty(0))

    def _draw(self, place: int, count: int) -> tuple[Tensor, Tensor]:
        """Bucket and sign of every coordinate of a batch, the same for all variants."""
        if self._drawn[0] != place:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + place)
            bucket = torch.randint(self.table.shape[1], (count,), generator=generator)
            sign = torch.randint(2, (count,), generator=generator).float().mul_(2).sub_(1)
            self._drawn = (place, bucket, sign)
        return self._drawn[1:]

    def see(self, variant: int, place: int, p: Tensor, q: Tensor) -> None:
        """Add one batch of one variant."""
        vectors = error_vectors(p.flatten(0, 1), q.flatten(0, 1)).cpu()
        self.tokens[place] = len(vectors)
        bucket, sign = self._draw(place, vectors.numel())
        self.table[variant].index_add_(0, bucket, vectors.flatten() * sign)

    def gram(self) -> NDArray[numpy.float64]:
        """`G` of all variants, nats per token."""
        found = self.table.double().numpy()
        product: NDArray[numpy.float64] = found @ found.T / sum(self.tokens.values())
        return product


def measure_pairs(
    job: MeasureJob, variants: Sequence[Changes], units: Sequence[str], *, text: Text, memory_bytes: int
) -> NDArray[numpy.float64]:
    """CLADO's matrix (arXiv 2307.05657): every change and every pair of changes of different units, measured.

    `units[i]` is the unit that variant `i` changes. For few units only: the number of evaluations is quadratic.
    """
    pairs = [(i, k) for i in range(len(variants)) for k in range(i) if units[i] != units[k]]
    together = [{**variants[i], **variants[k]} for i, k in pairs]
    klds = measure_swaps(job, {}, [*variants, *together], text=text, memory_bytes=memory_bytes)[1:].mean(1).numpy()
    table = numpy.full((len(variants), len(variants)), numpy.nan)
    for (i, k), value in zip(pairs, klds[len(variants) :], strict=True):
        table[i, k] = value
    return pairwise(klds[: len(variants)], table)


def measure_gram(
    job: MeasureJob, variants: Sequence[Changes], *, text: Text, memory_bytes: int, seed: int = 0
) -> NDArray[numpy.float64]:
    """The Gram matrix `(variants, variants)` of changes of the full-precision model."""
    judge = GramJudge(1 + len(variants), seed=seed)
    run_swaps(job, {}, variants, text=text, memory_bytes=memory_bytes, judge=judge)
    return judge.gram()[1:, 1:]
