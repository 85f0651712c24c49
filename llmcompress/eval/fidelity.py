"""Distance between two models on the same tokens, in float64, one figure per sequence."""

import itertools
from collections.abc import Iterable, Sequence
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


@dataclass(frozen=True)
class TokenFidelity:
    """One sequence of `length` tokens, position by position, on the CPU; float64 but for `choices`.

    kld         (length,)               KL(reference || candidate), nats
    nll         (2, length - 1)         of the token that follows, reference and candidate, nats
    choices     (2, length) int64       the likeliest next token of each
    overlap     (tops, length)          share of the reference's k likeliest that are among the candidate's
    restricted  (tops, length)          KL with both restricted to the reference's k likeliest and renormalised
    tempered    (temperatures, length)  KL after logits were divided by the temperature
    """

    kld: Tensor
    nll: Tensor
    choices: Tensor
    overlap: Tensor
    restricted: Tensor
    tempered: Tensor


def compare(reference: Tensor, candidate: Tensor, tokens: Tensor) -> list[SequenceFidelity]:
    """Compare logits `(batch, tokens, vocabulary)` of two models on token ids `(batch, tokens)`.

    KL(reference || candidate) and top-1 agreement are taken at every position, the negative
    log-likelihood at every position that has a next token. Raises InputError when shapes differ,
    when there is no next token at all, or when a token id lies outside the vocabulary.
    """
    return [of_sequence(found) for found in by_token(reference, candidate, tokens)]


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


def by_token(
    reference: Tensor,
    candidate: Tensor,
    tokens: Tensor,
    *,
    tops: Sequence[int] = (),
    temperatures: Sequence[float] = (),
) -> list[TokenFidelity]:
    """What `compare` averages, one entry per sequence; besides, for each of `tops` and `temperatures`, what those ask.

    Every one of `tops` is less than the vocabulary. Raises InputError where `compare` does.
    """
    _check(reference, candidate, tokens)
    return [_tokens(p, q, t, tops, temperatures) for p, q, t in zip(reference, candidate, tokens, strict=True)]


def _tokens(
    reference: Tensor, candidate: Tensor, tokens: Tensor, tops: Sequence[int], temperatures: Sequence[float]
) -> TokenFidelity:
    length, vocabulary = reference.shape
    following = torch.cat([tokens[1:], tokens[:1]]).to(reference.device, torch.int64)
    rows = max(CHUNK_LOGITS // vocabulary, 1)
    parts = []
    for start in range(0, length, rows):
        chunk = slice(start, start + rows)
        left, right, picked = reference[chunk].double(), candidate[chunk].double(), following[chunk, None]
        p, q = torch.log_softmax(left, -1), torch.log_softmax(right, -1)
        nll = -torch.stack([p.gather(1, picked)[:, 0], q.gather(1, picked)[:, 0]])
        choices = torch.stack([reference[chunk].argmax(-1), candidate[chunk].argmax(-1)])
        heated = [_kl(torch.log_softmax(left / t, -1), torch.log_softmax(right / t, -1)) for t in temperatures]
        overlap, restricted = _top(p, q, tops)
        parts.append((_kl(p, q)[None], nll, choices, overlap, restricted, _rows(heated, p)))
    kld, nll, choices, overlap, restricted, tempered = (torch.cat(part, 1).cpu() for part in zip(*parts, strict=True))
    return TokenFidelity(kld[0], nll[:, : length - 1], choices, overlap, restricted, tempered)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL of log-probabilities, over the last dimension."""
    return (p.exp() * (p - q)).sum(-1)


def _rows(values: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(values) if values else like.new_empty(0, len(like))


def _top(p: Tensor, q: Tensor, tops: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Overlap of the likeliest tokens and KL on the reference's, `(tops, positions)` each, from log-probabilities."""
    most = max(tops, default=0)
    likeliest, least = p.topk(most).indices, q.topk(most).values
    p, q = p.gather(1, likeliest), q.gather(1, likeliest)
    overlap = [(q[:, :k] >= least[:, k - 1 : k]).double().mean(-1) for k in tops]
    restricted = [_kl(torch.log_softmax(p[:, :k], -1), torch.log_softmax(q[:, :k], -1)) for k in tops]
    return _rows(overlap, p), _rows(restricted, p)


def of_sequence(found: TokenFidelity) -> SequenceFidelity:
    """The averages of one sequence."""
    kld, nll, choices = found.kld, found.nll, found.choices
    return SequenceFidelity(
        positions=len(kld),
        kld=float(kld.mean()),
        kld_spread=float(kld.var(correction=0)),
        kld_largest=float(kld.max()),
        nll_reference=float(nll[0].mean()),
        nll_candidate=float(nll[1].mean()),
        top1=float((choices[0] == choices[1]).double().mean()),
        finite=bool(torch.isfinite(kld).all() and torch.isfinite(nll).all()),
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
