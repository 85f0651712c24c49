"""Nouns of report.json for what an evaluation finds besides means: tokens, blocks, sampling, speed. No torch."""

from typing import Literal

from pydantic import Field

from llmcompress.types import Noun


class Estimate(Noun):
    """A mean over sequences with its interval; null where it is not finite or cannot be told. Both ends or neither."""

    mean: float | None
    low: float | None = None
    high: float | None = None


class Quantile(Noun):
    """Share of sequences, or of tokens, at or below a value."""

    share: float
    value: float | None


class PositionBin(Noun):
    """Mean KL, nats, over the positions `first` to `last` (both in; 0 is the first token) of all sequences.

    `tokens` is how many were averaged.
    """

    first: int
    last: int
    tokens: int
    kld: float | None


class Histogram(Noun):
    """How many tokens have which KL: `counts[i]` of them from `edges[i]` up to `edges[i + 1]` nats.

    Edges are evenly spaced on the log scale. `below` counts tokens under the first edge, exact zeros among them,
    `above` those from the last edge on, `not_finite` the rest.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    below: int
    above: int
    not_finite: int


class Choice(Noun):
    """One token a model may say next, and the probability it gives it."""

    token_id: int
    text: str
    probability: float | None


class WorstToken(Noun):
    """A place where the two models differ most.

    sequence, position  row of the text, and the place in it whose next token is predicted there (0 is the first)
    before              the text read, up to and with that position, shortened from the left
    following           the token that really comes next; null at the end of a sequence
    kld                 nats
    reference, candidate  the likeliest next tokens of each model, likeliest first
    """

    sequence: int
    position: int
    before: str
    following: str | None
    kld: float | None
    reference: tuple[Choice, ...]
    candidate: tuple[Choice, ...]


class Flips(Noun):
    """Where the likeliest token changed, held against the token that really comes next. Shares of `tokens`.

    `right_to_wrong + wrong_to_right + wrong_to_wrong = changed`. Accuracies are shares of likeliest tokens that
    are right.
    """

    tokens: int
    changed: float
    right_to_wrong: float
    wrong_to_right: float
    wrong_to_wrong: float
    accuracy_reference: float
    accuracy_candidate: float


class TopTokens(Noun):
    """The reference's `k` likeliest tokens.

    overlap  share of them that are among the candidate's `k` likeliest, mean over positions
    kld      KL of both distributions restricted to them and renormalised, nats: what sampling with top-k feels
    """

    k: int
    overlap: float
    kld: Estimate


class TokenFacts(Noun):
    """What single tokens say, all from one pass."""

    kld_quantiles: tuple[Quantile, ...]
    kld_by_position: tuple[PositionBin, ...]
    kld_histogram: Histogram
    worst: tuple[WorstToken, ...]
    flips: Flips
    top: tuple[TopTokens, ...]


class BlockCost(Noun):
    """What reading one block and passing the whole text through it took while the two models were compared.

    Seconds of either model, none where it has no such block; `resident_bytes` is the memory of the process that no file
    backs, after both, where the system tells it.
    """

    block: int
    reference_seconds: float | None
    candidate_seconds: float | None
    resident_bytes: int | None


class BlockError(Noun):
    """How far the candidate's hidden states are from the reference's where they leave block `block`.

    -1 is what enters block 0, the embeddings. Means over tokens: `relative_error` of |difference| / |reference|,
    `cosine` of the angle between the two.
    """

    block: int
    relative_error: float | None
    cosine: float | None


class Tempered(Noun):
    """KL of the two distributions after logits were divided by `temperature`, nats per token."""

    temperature: float
    kld: Estimate


class Continuation(Noun):
    """Greedy continuations of the same prompts by both models, `new_tokens` long at most.

    first_divergence  mean index of the first token that differs; `new_tokens` where none does
    identical         share of prompts whose continuations are equal
    repetition_*      share of 4-grams of a continuation that it has had before, mean over prompts
    """

    new_tokens: int
    prompts: int
    prompt_tokens: int
    first_divergence: Estimate
    identical: float
    repetition_reference: Estimate
    repetition_candidate: Estimate


class Sampling(Noun):
    """The sampling sweep."""

    temperatures: tuple[Tempered, ...]
    continuations: tuple[Continuation, ...]


class Speed(Noun):
    """How fast one model runs as users load it, on this machine. Tokens per second, all sequences of a batch together.

    resident_bytes  parameters and buffers in memory
    peak_bytes      the most that was in memory while it ran, the program included; null where it cannot be told
    """

    side: Literal["reference", "candidate"]
    batch: int
    prompt_tokens: int
    new_tokens: int
    prefill_tokens_per_second: float = Field(gt=0)
    decode_tokens_per_second: float = Field(gt=0)
    resident_bytes: int
    peak_bytes: int | None = None
    dtype: str
    device: str
