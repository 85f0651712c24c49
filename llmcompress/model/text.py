"""Text to fixed token batches: the same for every rank and every rerun."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy
import torch
from torch import Tensor
from transformers import AutoTokenizer

from llmcompress.errors import InputError, one_line
from llmcompress.model.sources import read_documents

TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
SHORTEST_SEQUENCE = 8
POOL_FACTOR = 4  # windows are drawn from this many times the tokens asked for
DIGEST_BYTES = 16 << 20  # of the source, whatever part of it the windows come from
CHARACTERS_PER_TOKEN = 16  # generous: how much of a long document is tokenized at first
EDGE_TOKENS = 64  # tokens this near to a cut could differ from those of the whole document
SAMPLING_ROWS = 16  # sequences sampled side by side, which bounds the key-value cache


@dataclass(frozen=True)
class TextRequest:
    """Which text, and how many windows of how many tokens of it.

    sized_by  where the user says how much of it: keys of the recipe, options of the command, or nowhere
    """

    spec: str
    samples: int
    sequence_length: int
    seed: int
    split: Literal["calibration", "evaluation"]
    sized_by: Literal["recipe", "options", "nothing"] = "recipe"


@dataclass(frozen=True)
class Batches:
    """Token ids, int64 `(samples, sequence length)`, and where they came from.

    source       "builtin", "self", a file's name, or org/name:split[:column]; never a path
    text_digest  sha256 over the text of the source, the same however many windows are taken from it
    """

    tokens: Tensor
    source: str
    text_digest: str

    @property
    def digest(self) -> str:
        """sha256 of the shape and the ids, little-endian."""
        array = self.tokens.cpu().numpy().astype("<i8")
        return hashlib.sha256(str(array.shape).encode() + array.tobytes()).hexdigest()

    def split(self, batch_size: int) -> list[Tensor]:
        """Batches of rows, in order; the last may be smaller."""
        return list(torch.split(self.tokens, batch_size)) if self.tokens.numel() else []


def same_text(text_digest: str, batches: Batches) -> bool:
    """Whether `batches` come from the text with that digest, so that evaluation on it must be refused."""
    return text_digest == batches.text_digest


def unseen_tokens(batches: Sequence[Tensor], vocabulary: int, *, most: int) -> list[Tensor]:
    """Tokens that a text lacks, each once and in random order, in batches of its shape: for ranges that must hold them.

    batches  int64 `(batch, tokens)` each. Of more than `most` absent tokens every second, third, ... is taken.
    Every sequence begins with the text's first token, because beginnings are often left out of ranges.
    """
    absent = torch.ones(vocabulary, dtype=torch.bool)
    for tokens in batches:
        absent[torch.unique(tokens).cpu()] = False
    found = torch.nonzero(absent).flatten()
    found = found[:: max(-(-len(found) // most), 1)]
    if not batches or not len(found):
        return []
    found = found[torch.randperm(len(found), generator=torch.Generator().manual_seed(0))]
    rows, length = batches[0].shape[0], min(max(batches[0].shape[1] - 1, 1), len(found))
    filled = torch.cat([found, found[: -len(found) % length]]).view(-1, length)
    first = batches[0][0, 0].cpu().expand(len(filled), 1)
    return list(torch.split(torch.cat([first, filled], 1), rows))


class _TokenizerErrors:
    """Turns what a damaged tokenizer raises into InputError.

    The tokenizers library raises plain `Exception`; matching that exact type lets every other error
    through, which an `except Exception` would not.
    """

    KNOWN = (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RecursionError)

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or not (kind is Exception or issubclass(kind, self.KNOWN)):
            return
        words = " ".join(str(error).replace(str(self.folder), self.folder.name).split())[:160]
        there = ", ".join(name for name in TOKENIZER_FILES if (self.folder / name).is_file())
        raise InputError(
            f"{self.folder.name}: cannot load the tokenizer from {there or 'nothing, it has no such files'}: {words}",
            "download the tokenizer files of the model again, tokenizer.json and tokenizer_config.json above all",
        ) from None


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model directory. Raises InputError when there is none that can be read."""
    with _TokenizerErrors(folder):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)


def tokenizer_digest(folder: Path) -> str:
    """sha256 over the names and bytes of the tokenizer's files."""
    state = hashlib.sha256()
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            data = (folder / name).read_bytes()
            state.update(f"{name}:{len(data)}:".encode() + data)
    return state.hexdigest()


def token_batches(request: TextRequest, folder: Path) -> Batches:
    """Read text, tokenize it with the tokenizer in `folder` and cut it into windows.

    Documents are tokenized one by one, with the special tokens the tokenizer adds, joined in order and cut
    into windows that do not overlap; `samples` of them are drawn by a permutation of the seed and kept in
    order. Windows come from the first `POOL_FACTOR` times the tokens asked for; what is beyond is not
    tokenized, nor read once `DIGEST_BYTES` of text have been digested.

    Raises InputError when the text is missing, unreadable or too short, MachineError when the network fails.
    """
    length, needed = request.sequence_length, request.samples * request.sequence_length
    _check_size(request.samples, length, request.split)
    source, documents = read_documents(request.spec, request.split)
    ids, text_digest = _pool(load_tokenizer(folder), documents, POOL_FACTOR * needed)
    windows = len(ids) // length
    if windows < request.samples:
        raise InputError(
            f"{request.split} text {source} has {len(ids)} tokens, {needed} are needed ({request.samples} x {length})",
            _smaller(request, len(ids)),
        )
    table = torch.tensor(ids[: windows * length], dtype=torch.int64).view(windows, length)
    chosen = numpy.random.default_rng(request.seed).permutation(windows)[: request.samples]
    return Batches(table[torch.from_numpy(numpy.sort(chosen))], one_line(source), text_digest)


def _check_size(samples: int, sequence_length: int, purpose: str) -> None:
    if samples < 1 or sequence_length < SHORTEST_SEQUENCE:
        raise InputError(
            f"{purpose} on {samples} x {sequence_length} tokens",
            f"use at least 1 sample of at least {SHORTEST_SEQUENCE} tokens",
        )


def _smaller(request: TextRequest, tokens: int) -> str:
    """A request that `tokens` would satisfy, in the words of the command line."""
    length = min(request.sequence_length, tokens // 2)
    if length < SHORTEST_SEQUENCE or request.sized_by == "nothing":
        return "give more text"
    samples = tokens // length
    if request.sized_by == "options":
        return f"give more text, or ask for less: --samples {samples} --sequence-length {length}"
    less = f"--set calibration.samples={samples} --set calibration.sequence_length={length}"
    return f"give more text, or fewer samples or shorter sequences: {less}"


def _pool(tokenizer: Any, documents: Iterator[str], enough: int) -> tuple[list[int], str]:
    """The first `enough` token ids, or all there are, and the digest of the text, which `enough` does not change."""
    state, digested, ids = hashlib.sha256(), 0, list[int]()
    for document in documents:
        if digested < DIGEST_BYTES:
            data = document.encode()
            state.update(f"{len(data)}:".encode() + data)
            digested += len(data)
        if len(ids) < enough:
            ids += _ids_of(tokenizer, document, enough - len(ids))
        if len(ids) >= enough and digested >= DIGEST_BYTES:
            break
    return ids[:enough], state.hexdigest()


def _ids_of(tokenizer: Any, document: str, wanted: int) -> list[int]:
    """Token ids of a document, at least the first `wanted`; only the beginning of a very long one is tokenized."""
    limit = CHARACTERS_PER_TOKEN * (wanted + EDGE_TOKENS)
    while limit < len(document):
        ids: list[int] = tokenizer(document[:limit], truncation=False, verbose=False).input_ids
        if len(ids) >= wanted + EDGE_TOKENS:
            return ids[:wanted]
        limit *= 4
    whole: list[int] = tokenizer(document, truncation=False, verbose=False).input_ids
    return whole


@torch.no_grad()
def sample_tokens(model: Any, tokenizer: Any, *, samples: int, sequence_length: int, seed: int) -> Tensor:
    """Text sampled from the model itself at temperature 1, int64 `(samples, sequence_length)` on the CPU.

    Each row starts from the beginning-of-text token, or, where there is none, from an ordinary token drawn
    uniformly. The model is put into evaluation mode. The random numbers depend on `seed` alone, and row by
    row, so that the number of rows sampled side by side does not matter.

    Raises InputError when the model's output is not finite.
    """
    _check_size(samples, sequence_length, "sampling")
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    first = _first_tokens(model, tokenizer, samples, generator)
    draws = torch.rand(samples, sequence_length - 1, generator=generator, dtype=torch.float64)
    parts = zip(torch.split(first, SAMPLING_ROWS), torch.split(draws, SAMPLING_ROWS), strict=True)
    return torch.cat([_continued(model, *part) for part in parts])


def _first_tokens(model: Any, tokenizer: Any, samples: int, generator: torch.Generator) -> Tensor:
    if tokenizer.bos_token_id is not None:
        return torch.full((samples, 1), int(tokenizer.bos_token_id))
    rows = min(len(tokenizer), int(model.config.get_text_config().vocab_size))
    special = frozenset(tokenizer.all_special_ids)
    ordinary = torch.tensor([token for token in range(rows) if token not in special])
    if not len(ordinary):
        raise InputError("the tokenizer has no ordinary tokens to start from", "use --calibration builtin")
    return ordinary[torch.randint(len(ordinary), (samples, 1), generator=generator)]


def _continued(model: Any, first: Tensor, draws: Tensor) -> Tensor:
    """Rows that start with `first` `(rows, 1)` and go on with one token per uniform number in `draws`."""
    device = next(model.parameters()).device
    current, rows, cache = first, [first], None
    for draw in draws.unbind(1):
        seen = current if cache is not None else torch.cat(rows, dim=1)  # a model without a cache reads it all again
        answer = model(input_ids=seen.to(device), past_key_values=cache, use_cache=True)
        cache = answer.past_key_values
        chances = torch.softmax(answer.logits[:, -1].cpu().double(), dim=-1)
        if not bool(torch.isfinite(chances).all()):
            raise InputError("the model's output is not finite, nothing can be sampled", "use --calibration builtin")
        current = _drawn(chances, draw)
        rows.append(current)
    return torch.cat(rows, dim=1)


def _drawn(chances: Tensor, draw: Tensor) -> Tensor:
    """Inverse of the cumulative distribution: `chances` `(rows, tokens)`, `draw` `(rows,)` in [0, 1)."""
    steps = chances.cumsum(dim=-1)
    place = torch.searchsorted(steps, (draw * steps[:, -1]).unsqueeze(1), right=True)
    return place.clamp_(max=chances.shape[-1] - 1)
