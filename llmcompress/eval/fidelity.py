"""Distance between two models on the same tokens, in float64, one figure per sequence."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.errors import InputError

CHUNK_LOGITS = 1 << 22  # positions are handled in chunks of about this many logits


@dataclass(frozen=True)
class SequenceFidelity:
    """One sequence. Nats per token; `top1` is the share of positions where both prefer the same token.

    `kld_spread` is the variance of the KL divergence over the sequence's positions.
    """

    positions: int
    kld: float
    kld_spread: float
    kld_largest: float
    nll_reference: float
    nll_candidate: float
    top1: float
    finite: bool


def compare(reference: Tensor, candidate: Tensor, tokens: Tensor) -> list[SequenceFidelity]:
    """Compare logits `(batch, tokens, vocabulary)` of two models on token ids `(batch, tokens)`.

    KL(reference || candidate) and top-1 agreement are taken at every position, the negative
    log-likelihood at every position that has a next token. Raises InputError when shapes differ,
    when there is no next token at all, or when a token id lies outside the vocabulary.
    """
    _check(reference, candidate, tokens)
    return [_sequence(*parts) for parts in zip(reference, candidate, tokens, strict=True)]


def _check(reference: Tensor, candidate: Tensor, tokens: Tensor) -> None:
    if reference.shape != candidate.shape:
        raise InputError(
            f"logits {tuple(reference.shape)} and {tuple(candidate.shape)} cannot be compared",
            "both models need the same vocabulary",
        )
    if reference.ndim != 3 or reference.shape[:2] != tokens.shape:
        raise InputError(
            f"logits {tuple(reference.shape)} do not belong to token ids {tuple(tokens.shape)}",
            "logits are (batch, tokens, vocabulary), token ids (batch, tokens)",
        )
    length, vocabulary = reference.shape[1:]
    if length < 2:
        raise InputError(f"sequences of {length} tokens have no next token", "use sequences of 2 tokens or more")
    if bool(((tokens < 0) | (tokens >= vocabulary)).any()):
        raise InputError(
            f"token ids {int(tokens.min())} to {int(tokens.max())} do not fit a vocabulary of {vocabulary}",
            "use the tokenizer that came with the model",
        )


def _sequence(reference: Tensor, candidate: Tensor, tokens: Tensor) -> SequenceFidelity:
    length, vocabulary = reference.shape
    following = torch.cat([tokens[1:], tokens[:1]]).to(reference.device, torch.int64)
    rows = max(CHUNK_LOGITS // vocabulary, 1)
    klds, likelihoods, agreements = [], [], []
    for start in range(0, length, rows):
        chunk = slice(start, start + rows)
        p = torch.log_softmax(reference[chunk].double(), -1)
        q = torch.log_softmax(candidate[chunk].double(), -1)
        klds.append((p.exp() * (p - q)).sum(-1))
        picked = following[chunk, None]
        likelihoods.append(torch.stack([p.gather(1, picked)[:, 0], q.gather(1, picked)[:, 0]]))
        agreements.append(reference[chunk].argmax(-1) == candidate[chunk].argmax(-1))
    kld = torch.cat(klds)
    nll = -torch.cat(likelihoods, dim=1)[:, : length - 1]
    finite = bool(torch.isfinite(kld).all() and torch.isfinite(nll).all())
    return SequenceFidelity(
        positions=length,
        kld=float(kld.mean()),
        kld_spread=float(kld.var(correction=0)),
        kld_largest=float(kld.max()),
        nll_reference=float(nll[0].mean()),
        nll_candidate=float(nll[1].mean()),
        top1=float(torch.cat(agreements).double().mean()),
        finite=finite,
    )


def evaluate(
    reference: Iterable[Tensor], candidate: Iterable[Tensor], batches: Iterable[Tensor]
) -> tuple[SequenceFidelity, ...]:
    """Compare two streams of logits batch by batch. Raises InputError when one ends early or all are empty."""
    found: list[SequenceFidelity] = []
    for left, right, tokens in itertools.zip_longest(reference, candidate, batches):
        if left is None or right is None or tokens is None:
            raise InputError("the two models gave different numbers of batches", "evaluate both on the same text")
        found += compare(left, right, tokens)
    if not found:
        raise InputError("there are no sequences to compare", "give a longer text")
    return tuple(found)
