"""A tokenizer.json as the keys of a GGUF file, for the two kinds of tokenizer that llama.cpp has and Llamas use."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcompress.errors import InputError
from llmcompress.files import read_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
SPLITS = {LLAMA3: "llama-bpe", QWEN2: "qwen2"}
SPACE = "▁"  # what stands for a space
ADVICE = "export it to bf16 and use llama.cpp's own converter"


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file says of a tokenizer.

    model      `gpt2`: pairs by `merges`, text split as `pre` says; `llama`: pairs by the `scores` of what they make
    tokens     by id, `types` their kinds
    add_bos    whether text begins with `bos`; `add_space` whether with a space
    """

    model: str
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    pre: str = "default"
    add_bos: bool = False
    add_space: bool = False
    chat_template: str | None = None


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """That of a model directory; `size` is the number of rows of the embedding. Raises InputError with the reason."""
    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"{folder.name}: no tokenizer.json, which a GGUF file holds", ADVICE)
    document = read_json(folder / "tokenizer.json")
    model = document["model"]
    if model.get("type") != "BPE":
        raise InputError(f"tokenizer.json: {model.get('type')}, of which llama.cpp has none", ADVICE)
    tokens, types = _tokens(document, size)
    merges = tuple(pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"])
    shared: dict[str, Any] = {"add_bos": _adds_bos(document), "chat_template": _template(folder)}
    if model.get("byte_fallback"):
        normalizer = json.dumps(document.get("normalizer")) + json.dumps(document.get("pre_tokenizer"))
        if "\\u2581" not in normalizer:
            raise InputError("tokenizer.json: bytes to fall back to, but no sign for spaces", ADVICE)
        spaced = '"Prepend"' in normalizer or '"prepend_scheme": "first"' in normalizer
        scores = _scores(tokens, merges)
        return Vocabulary("llama", tokens, types, scores=scores, add_space=spaced, **shared)
    return Vocabulary("gpt2", tokens, types, merges=merges, pre=_splitting(document), **shared)


def _tokens(document: dict[str, Any], size: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Every token by id and its kind; ids without one are said to be unused."""
    added = {entry["id"]: entry for entry in document.get("added_tokens", [])}
    by_id = {place: word for word, place in document["model"]["vocab"].items()}
    by_id |= {place: entry["content"] for place, entry in added.items()}
    if max(by_id, default=0) >= size:
        raise InputError(f"tokenizer.json: {max(by_id) + 1} tokens, the embedding has {size}", ADVICE)
    unknown = document["model"].get("unk_token")

    def kind(place: int) -> int:
        if place not in by_id:
            return UNUSED
        if by_id[place] == unknown:
            return UNKNOWN
        if place in added:
            return CONTROL if added[place]["special"] else USER_DEFINED
        falls_back = document["model"].get("byte_fallback") and re.fullmatch(r"<0x[0-9A-F]{2}>", by_id[place])
        return BYTE if falls_back else NORMAL

    return tuple(by_id.get(place, f"[PAD{place}]") for place in range(size)), tuple(map(kind, range(size)))


def _scores(tokens: tuple[str, ...], merges: tuple[str, ...]) -> tuple[float, ...]:
    """Of every token: the earlier the merge that makes it, the higher; what no merge makes is last."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(merges):
        ranks.setdefault(pair.replace(" ", "", 1), rank)
    return tuple(-float(ranks.get(token, len(merges))) for token in tokens)


def _splitting(document: dict[str, Any]) -> str:
    """llama.cpp's name for how text is split before pairs are merged. Raises InputError where it has none."""
    part = document.get("pre_tokenizer") or {}
    parts = part.get("pretokenizers", [part])
    kinds = [each.get("type") for each in parts]
    normalizer = (document.get("normalizer") or {}).get("type")
    if not parts[-1].get("add_prefix_space"):
        if kinds == ["ByteLevel"] and parts[0].get("use_regex", True) and normalizer is None:
            return "gpt-2"
        name = SPLITS.get(parts[0]["pattern"].get("Regex")) if kinds == ["Split", "ByteLevel"] else None
        if name is not None and normalizer in (None, "NFC" if name == "qwen2" else None):
            return name
    raise InputError("tokenizer.json: text is split in a way that this has no name of llama.cpp for", ADVICE)


def _adds_bos(document: dict[str, Any]) -> bool:
    """Whether text gets a special token in front."""
    part = document.get("post_processor") or {}
    parts = part.get("processors", [part])
    return any(p.get("type") == "TemplateProcessing" and "SpecialToken" in (p["single"] or [{}])[0] for p in parts)


def _template(folder: Path) -> str | None:
    """The chat template, from the file of its own or from tokenizer_config.json."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    path = folder / "tokenizer_config.json"
    found = read_json(path).get("chat_template") if path.is_file() else None
    return found if isinstance(found, str) else None
