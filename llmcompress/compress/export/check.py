"""Hold what an export wrote against the checkpoint: every tensor, and the logits of a probe."""

from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.compress.export.checkpoint import Written, relative_error
from llmcompress.compress.output import Probe
from llmcompress.compress.verify import VerifyError, probe_of
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import BlockStream

SLACK = 1e-6  # between the error that was meant and the one that is read back
EQUAL_LOGITS = 1e-3  # of the largest, where all weights are equal
PROBE_TOKENS = 64
HINT = "this should not happen: please report it; nothing was published"


@dataclass(frozen=True)
class Comparison:
    """Relative error of every tensor that was read back, and how far logits are apart."""

    errors: dict[str, float]
    logit_difference: float
    kld: float
    tokens: int
    probe: Probe


@torch.no_grad()
def compare(source: Skeleton, found: Skeleton, written: Written) -> Comparison:
    """Raises VerifyError where a tensor is missing or further off than the export meant it to be."""
    names, present = source.reader.names(), set(found.reader.names())
    errors = {}
    for name in names:
        if name not in present:
            raise VerifyError(f"export: {name} is not in what was written", HINT)
        one, other = source.read(name), found.read(name)
        if one.shape != other.shape:
            raise VerifyError(f"export: {name} has shape {tuple(other.shape)}, not {tuple(one.shape)}", HINT)
        errors[name] = relative_error(other, one)
        if not abs(errors[name] - written.errors.get(name, 0.0)) <= SLACK:
            meant = written.errors.get(name, 0.0)
            raise VerifyError(f"export: {name} reads back {errors[name]:.2g} off, {meant:.2g} was meant", HINT)
    tokens = _probe(source)
    wanted, got = (next(iter(BlockStream(each).logits([tokens]))).double() for each in (source, found))
    difference = float((wanted - got).abs().max())
    if not difference <= (float("inf") if any(errors.values()) else EQUAL_LOGITS * float(wanted.abs().max())):
        raise VerifyError(f"export: logits differ by {difference:.2g} though all weights are equal", HINT)
    return Comparison(errors, difference, _kld(wanted, got), tokens.shape[1], probe_of(tokens, got))


def _probe(skeleton: Skeleton) -> Tensor:
    config = skeleton.config.get_text_config()
    length = min(PROBE_TOKENS, getattr(config, "max_position_embeddings", None) or PROBE_TOKENS)
    return torch.randint(int(config.vocab_size), (1, length), generator=torch.Generator().manual_seed(0))


def _kld(wanted: Tensor, got: Tensor) -> float:
    """Mean KL divergence of the rows of two arrays of logits, nats."""
    first, second = wanted.log_softmax(-1), got.log_softmax(-1)
    return max(float((first.exp() * (first - second)).sum(-1).mean()), 0.0)
