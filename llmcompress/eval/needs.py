"""How much memory `eval` needs, and what it does to keep to less."""

from torch import nn

from llmcompress.eval.fidelity import CHUNK_LOGITS
from llmcompress.model.needs import Stage, Stages, fit
from llmcompress.model.shelf import Shelf
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import linear_modules
from llmcompress.model.text import TextRequest

FLOAT = 4
LOGITS = 3  # of a batch: those of both models, and one of them twice for a moment
CHUNK = 8 * 12  # of a logit while a chunk of positions is compared in float64


def keep_to(reference: Skeleton, candidate: Skeleton, text: TextRequest, *, batch_size: int, limit: int | None) -> int:
    """Sequences in a batch that keep to `limit` bytes; hidden states of both wait where they should.

    Raises InputError with the memory that is needed where nothing helps.
    """
    pair = (reference, candidate)
    found = fit(lambda size: tuple(_stages(pair, text, size)), batch_size, limit)
    for skeleton in pair:
        skeleton.shelf = Shelf(everything=found.spilled)
    return found.batch_size


def _stages(pair: tuple[Skeleton, Skeleton], text: TextRequest, batch_size: int) -> Stages:
    config = pair[0].config.get_text_config()
    tokens = batch_size * text.sequence_length
    hidden = 2 * text.samples * text.sequence_length * int(config.hidden_size) * FLOAT
    block = 2 * max(map(_parameters, pair[0].blocks)) * FLOAT  # codes and what they stand for, on the way
    wide = max(sum(sum(p.shape) for p in _weights(each)) for each in pair[0].blocks)
    heads = [
        max(_parameters(s.model.get_output_embeddings()), _parameters(s.model.get_input_embeddings())) for s in pair
    ]
    passing = {"block": block, "outside the blocks": max(heads) * FLOAT, "activations": tokens * wide * FLOAT}
    logits = tokens * int(config.vocab_size) * FLOAT * LOGITS
    comparing = {"outside the blocks": sum(heads) * FLOAT, "logits": logits, "comparing": CHUNK_LOGITS * CHUNK}
    return Stage("running both models", passing, hidden), Stage("comparing logits", comparing, hidden)


def _parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _weights(block: nn.Module) -> list[nn.Parameter]:
    return [module.weight for module in linear_modules(block).values()]  # type: ignore[misc]
