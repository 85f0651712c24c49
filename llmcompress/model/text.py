"""Text to fixed token batches: the same for every rank and every rerun."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor
from transformers import AutoTokenizer

from llmcompress.errors import InputError
from llmcompress.model.corpus import Split
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
POOL_FACTOR = 4  # reading stops once this many times the tokens asked for were seen


@dataclass(frozen=True)
class TextRequest:
    """Which text, and how many windows of how many tokens of it."""

    spec: str
    samples: int
    sequence_length: int
    seed: int
    split: Split


@dataclass(frozen=True)
class Batches:
    """Token ids, int64 `(samples, sequence length)`, and where they came from."""

    tokens: Tensor
    source: str
    text_digest: str

    @property
    def digest(self) -> str:
        """sha256 of the shape and the ids."""
        array = self.tokens.cpu().numpy().astype("<i8")
        return hashlib.sha256(str(array.shape).encode() + array.tobytes()).hexdigest()

    def split(self, batch_size: int) -> list[Tensor]:
        """Batches of rows, in order; the last may be smaller."""
        return list(torch.split(self.tokens, batch_size)) if self.tokens.numel() else []


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model directory. Raises InputError when there is none that can be read."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        words = " ".join(str(error).split())[:160]
        raise InputError(f"{folder.name}: cannot load the tokenizer: {words}", "check its tokenizer files") from None


def tokenizer_digest(folder: Path) -> str:
    """sha256 over the names and bytes of the tokenizer's files."""
    state = hashlib.sha256()
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            data = (folder / name).read_bytes()
            state.update(f"{name}:{len(data)}:".encode() + data)
    return state.hexdigest()


def token_batches(request: TextRequest, folder: Path) -> Batches:
    """Read, tokenize and cut text into windows.

    Documents are tokenized once, with the special tokens the tokenizer adds, joined in order and cut
    into windows that do not overlap; `samples` of them are drawn by a permutation of the seed and kept
    in order. Of very long text only the first part is read, `POOL_FACTOR` times what is needed.
    Raises InputError when the text is missing, unreadable or too short.
    """
    if request.samples < 1 or request.sequence_length < 8:
        raise InputError(
            f"calibration of {request.samples} x {request.sequence_length} tokens", "use at least 1 sample of 8 tokens"
        )
    source, documents = read_documents(request.spec, request.split)
    needed = request.samples * request.sequence_length
    state = hashlib.sha256()
    ids = _token_ids(load_tokenizer(folder), _digesting(documents, state), POOL_FACTOR * needed)
    windows = len(ids) // request.sequence_length
    if windows < request.samples:
        raise InputError(
            f"text {source}: {len(ids)} tokens, {needed} are needed ({request.samples} x {request.sequence_length})",
            "give more text, or ask for less: --set calibration.samples=8, calibration.sequence_length=128",
        )
    table = torch.tensor(ids[: windows * request.sequence_length], dtype=torch.int64).view(windows, -1)
    chosen = numpy.random.default_rng(request.seed).permutation(windows)[: request.samples]
    rows = torch.from_numpy(numpy.sort(chosen))
    return Batches(table[rows].clone(), source, state.hexdigest())


def _digesting(documents: Iterator[str], state: Any) -> Iterator[str]:
    for document in documents:
        state.update(document.encode())
        yield document


def _token_ids(tokenizer: Any, documents: Iterator[str], enough: int) -> list[int]:
    ids: list[int] = []
    for document in documents:
        ids += tokenizer(document, verbose=False).input_ids
        if len(ids) >= enough:
            break
    return ids


@torch.no_grad()
def sample_tokens(model: Any, tokenizer: Any, *, samples: int, sequence_length: int, seed: int) -> Tensor:
    """Text sampled from the model itself at temperature 1, int64 `(samples, sequence_length)`.

    Each row starts from the beginning-of-text token, or from a random token where there is none.
    """
    generator = torch.Generator().manual_seed(seed)
    begin = tokenizer.bos_token_id
    vocabulary = int(model.config.get_text_config().vocab_size)
    if begin is None:
        current = torch.randint(vocabulary, (samples, 1), generator=generator)
    else:
        current = torch.full((samples, 1), int(begin))
    rows, cache = [current], None
    device = next(model.parameters()).device
    for _ in range(sequence_length - 1):
        answer = model(input_ids=current.to(device), past_key_values=cache, use_cache=True)
        cache = answer.past_key_values
        chances = torch.softmax(answer.logits[:, -1].float(), -1).cpu()
        current = torch.multinomial(chances, 1, generator=generator)
        rows.append(current)
    return torch.cat(rows, dim=1)
