"""What single tokens say, added up sequence by sequence while two models are compared."""

from collections.abc import Sequence
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmcompress.eval.facts import (
    Choice,
    Flips,
    Histogram,
    PositionBin,
    Quantile,
    Tempered,
    TokenFacts,
    TopTokens,
    WorstToken,
)
from llmcompress.eval.fidelity import SequenceFidelity, TokenFidelity, by_token, of_sequence
from llmcompress.eval.report import estimate, number
from llmcompress.model.shares import Share

TOPS = (10, 50, 100)
QUANTILES = (0.5, 0.9, 0.95, 0.99, 0.999)
POSITION_BINS = 32
EDGES = tuple(float(10.0 ** (quarter / 4)) for quarter in range(-32, 9))  # 1e-8 to 100 nats, four a decade
WORST = 10
CHOICES = 3
CONTEXT_TOKENS = 32


class Tally:
    """Reads logits batch by batch; `facts` says what was found."""

    def __init__(self, temperatures: Sequence[float] = ()) -> None:
        self._temperatures = tuple(temperatures)
        self._tops: tuple[int, ...] = ()
        self._found: list[TokenFidelity] = []
        self._batches: list[int] = []  # how many sequences each has
        self._following: list[Tensor] = []
        self._worst: list[tuple[float, WorstToken, Tensor]] = []

    def add(
        self, reference: Tensor, candidate: Tensor, tokens: Tensor, *, first: int | None = None
    ) -> list[SequenceFidelity]:
        """Compare logits `(batch, tokens, vocabulary)` on token ids `(batch, tokens)`; raises what `compare` raises.

        `first` is the number of the first sequence among all, where others are compared elsewhere.
        """
        first = len(self._found) if first is None else first
        self._tops = tuple(k for k in TOPS if k < reference.shape[-1])
        found = by_token(reference, candidate, tokens, tops=self._tops, temperatures=self._temperatures)
        for row, figures in enumerate(found):
            self._keep_worst(figures, reference[row], candidate[row], tokens=tokens[row].cpu(), sequence=first + row)
            self._found.append(figures)
            self._following.append(tokens[row, 1:].cpu())
        self._batches.append(len(found))
        return [of_sequence(figures) for figures in found]

    def together(self, share: Share) -> list[SequenceFidelity]:
        """Take in what other processes found on their batches, in order; the figures of all sequences."""
        if share.crew.size > 1:
            self._tops = tuple(int(k) for k in share.crew.spread({"tops": torch.tensor(self._tops)})["tops"])
            self._following = _shared(share, self._batches, self._following)
            parts = {
                name: _shared(share, self._batches, [getattr(x, name) for x in self._found])
                for name in TokenFidelity.__dataclass_fields__
            }
            self._found = [TokenFidelity(*fields) for fields in zip(*parts.values(), strict=True)]
            self._share_worst(share)
        return [of_sequence(figures) for figures in self._found]

    def _share_worst(self, share: Share) -> None:
        every = []
        for rank in range(share.crew.size):
            own = [place.model_dump_json().encode() for _, place, _ in self._worst]
            tensors = {f"{i}": torch.frombuffer(bytearray(words), dtype=torch.uint8) for i, words in enumerate(own)}
            tensors |= {f"{i} tokens": tokens for i, (_, _, tokens) in enumerate(self._worst)}
            tensors["badness"] = torch.tensor([badness for badness, _, _ in self._worst], dtype=torch.float64)
            heard = share.crew.spread(tensors, rank)
            for i, badness in enumerate(heard["badness"].tolist()):
                place = WorstToken.parse(heard[str(i)].numpy().tobytes(), "another process")
                every.append((badness, place, heard[f"{i} tokens"]))
        every.sort(key=lambda entry: (-entry[0], entry[1].sequence, entry[1].position))
        self._worst = every[:WORST]

    def _keep_worst(
        self, found: TokenFidelity, reference: Tensor, candidate: Tensor, *, tokens: Tensor, sequence: int
    ) -> None:
        badness = torch.nan_to_num(found.kld, nan=torch.inf)
        for position in badness.argsort(descending=True, stable=True)[:WORST].tolist():
            if len(self._worst) == WORST and float(badness[position]) <= self._worst[-1][0]:
                return
            place = WorstToken(
                sequence=sequence, position=position, before="", following=None,
                kld=number(float(found.kld[position])),
                reference=_choices(reference[position]), candidate=_choices(candidate[position]),
            )  # fmt: skip
            self._worst.append((float(badness[position]), place, tokens))
            self._worst.sort(key=lambda entry: -entry[0])
            del self._worst[WORST:]

    def tempered(self) -> tuple[Tempered, ...]:
        """KL at each temperature, with sequences as the unit."""
        rows = [[float(f.tempered[i].mean()) for f in self._found] for i in range(len(self._temperatures))]
        return tuple(
            Tempered(temperature=t, kld=estimate(row, kind="kl"))
            for t, row in zip(self._temperatures, rows, strict=True)
        )

    def facts(self, tokenizer: Any) -> TokenFacts:
        """Everything found; `tokenizer` turns token ids into words."""
        klds = [found.kld.numpy() for found in self._found]
        every = numpy.concatenate(klds)
        finite = bool(numpy.isfinite(every).all())
        return TokenFacts(
            kld_quantiles=tuple(
                Quantile(share=q, value=float(numpy.quantile(every, q)) if finite else None) for q in QUANTILES
            ),
            kld_by_position=by_position(klds),
            kld_histogram=histogram(every),
            worst=tuple(_worded(place, tokens, tokenizer) for _, place, tokens in self._worst),
            flips=flips(self._found, self._following),
            top=tuple(self._top(i, k) for i, k in enumerate(self._tops)),
        )

    def _top(self, index: int, k: int) -> TopTokens:
        overlap = torch.cat([found.overlap[index] for found in self._found])
        klds = [float(found.restricted[index].mean()) for found in self._found]
        return TopTokens(k=k, overlap=float(overlap.mean()), kld=estimate(klds, kind="kl"))


def _shared(share: Share, batches: Sequence[int], mine: Sequence[Tensor]) -> list[Tensor]:
    """A tensor for each sequence of all batches, from those of this process's batches."""
    rest = iter(mine)
    stacked = [torch.stack([next(rest) for _ in range(count)]) for count in batches]
    return [one for batch in share.all(stacked) for one in batch.unbind()]


def _choices(logits: Tensor) -> tuple[Choice, ...]:
    chances = torch.softmax(logits.double(), -1)
    found = logits.topk(min(CHOICES, len(logits))).indices.tolist()
    return tuple(Choice(token_id=i, text="", probability=number(float(chances[i]))) for i in found)


def _worded(place: WorstToken, tokens: Tensor, tokenizer: Any) -> WorstToken:
    def words(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def named(choices: tuple[Choice, ...]) -> tuple[Choice, ...]:
        return tuple(choice.model_copy(update={"text": words([choice.token_id])}) for choice in choices)

    end = place.position + 1
    return place.model_copy(
        update={
            "before": words(tokens[max(end - CONTEXT_TOKENS, 0) : end].tolist()),
            "following": words([int(tokens[end])]) if end < len(tokens) else None,
            "reference": named(place.reference),
            "candidate": named(place.candidate),
        }
    )


def by_position(klds: Sequence[NDArray[numpy.float64]]) -> tuple[PositionBin, ...]:
    """Mean KL by position, in at most `POSITION_BINS` bins of equal width."""
    longest = max(map(len, klds))
    width = -(-longest // POSITION_BINS)
    found = []
    for first in range(0, longest, width):
        inside = numpy.concatenate([kld[first : first + width] for kld in klds])
        last = min(first + width, longest) - 1
        found.append(PositionBin(first=first, last=last, tokens=len(inside), kld=number(float(inside.mean()))))
    return tuple(found)


def histogram(klds: NDArray[numpy.float64]) -> Histogram:
    """KL of single tokens on a log scale."""
    finite = klds[numpy.isfinite(klds)]
    places = numpy.searchsorted(EDGES, finite, side="right")
    counts = numpy.bincount(places, minlength=len(EDGES) + 1).tolist()
    return Histogram(
        edges=EDGES, counts=tuple(counts[1:-1]), below=counts[0], above=counts[-1], not_finite=len(klds) - len(finite)
    )


def flips(found: Sequence[TokenFidelity], following: Sequence[Tensor]) -> Flips:
    """How often the likeliest token changed, and whether for the better, at positions that have a next token."""
    left, right = torch.cat([f.choices[:, :-1] for f in found], dim=1)
    truth = torch.cat(list(following))
    was, became, changed = left == truth, right == truth, left != right

    def share(which: Tensor) -> float:
        return float(which.double().mean())

    return Flips(
        tokens=len(truth),
        changed=share(changed),
        right_to_wrong=share(was & ~became),
        wrong_to_right=share(became & ~was),
        wrong_to_wrong=share(changed & ~was & ~became),
        accuracy_reference=share(was),
        accuracy_candidate=share(became),
    )
