"""The JSON documents of a model directory: what would run code, fetch files or ask for too much is found here."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from llmcompress.errors import Finding, InputError
from llmcompress.files import read_json
from llmcompress.preflight.folder import limit_of

REPAIR = "compare it with the config.json of the published model"
# settings that libraries act on; in the others keys are tokens, and only their JSON is checked
SETTINGS = (
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "*processor_config.json",
    "adapter/adapter_config.json",
)
TABLES = ("special_tokens_map.json", "added_tokens.json", "tokenizer.json", "vocab.json", "chat_template.json")
WORD = re.compile(r"[A-Za-z0-9_.-]{1,100}")
FLOAT_NAMES = ("auto", "float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Range:
    """Numbers a key may have, and with `lists` lists of them, for blocks that differ."""

    low: float
    high: float
    whole: bool = True
    lists: bool = True

    def holds(self, value: object) -> bool:
        """Whether a value is such a number, or a flat list of them."""
        if isinstance(value, list):
            return self.lists and all(not isinstance(one, list) and self.holds(one) for one in value)
        kinds: tuple[type, ...] = (int,) if self.whole else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool) and self.low <= value <= self.high  # type: ignore[operator]


def _ranges(found: Range, *names: str) -> dict[str, Range]:
    return dict.fromkeys(names, found)


RANGES: Mapping[str, Range] = {
    **_ranges(Range(1, 10_000, lists=False), "num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    **_ranges(Range(1, 10_000_000, lists=False), "vocab_size"),
    **_ranges(Range(1, 10_000_000), "intermediate_size", "ffn_dim", "n_inner", "moe_intermediate_size", "head_dim"),
    **_ranges(Range(1, 1_000_000, lists=False), "hidden_size", "n_embd", "d_model", "word_embed_proj_dim"),
    **_ranges(Range(1, 100_000), "num_attention_heads", "n_head", "num_key_value_heads"),
    **_ranges(Range(0, 100_000), "num_experts", "num_local_experts", "num_experts_per_tok"),
    **_ranges(Range(1, 1 << 32), "max_position_embeddings", "n_positions", "n_ctx"),
    **_ranges(Range(1e-30, 1, whole=False), "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps"),
    **_ranges(Range(1e-6, 1e15, whole=False), "rope_theta", "rotary_emb_base"),
    **_ranges(Range(0, 1, whole=False), "attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop"),
    **_ranges(Range(0, 1, whole=False), "hidden_dropout", "partial_rotary_factor", "rotary_pct"),
}
FLAGS = ("tie_word_embeddings", "is_encoder_decoder", "attention_bias", "mlp_bias")
DIVIDING = ("llama", "gpt_neox", "opt")  # families whose class asks it of the width and the heads
ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function")
ACTIVATION = re.compile(r"[A-Za-z0-9_]{1,50}")


def read_documents(folder: Path, refused: set[str]) -> tuple[dict[str, Any], list[Finding]]:
    """Every JSON document of a model directory that is read, by its relative name, and those that cannot be."""
    names = [path.name for path in folder.glob("*.json")] + ["adapter/adapter_config.json"]
    patterns = (*SETTINGS, *TABLES)
    found: dict[str, Any] = {}
    findings = []
    for name in sorted(n for n in names if any(fnmatchcase(n, pattern) for pattern in patterns)):
        if name in refused or not (folder / name).is_file():
            continue
        try:
            found[name] = read_json(folder / name, limit_of(Path(name).name) or 0)
        except InputError as error:
            findings.append(Finding(error.what, error.hint))
    return found, findings


def _walk(document: Any) -> Iterator[tuple[str, Any, str]]:
    """Every key with its value and the dotted place it stands at, without recursion."""
    left = [("", document)]
    while left:
        place, value = left.pop()
        if isinstance(value, dict):
            for key, inner in value.items():
                yield key, inner, place
                left.append((f"{place}{key}."[:200], inner))
        elif isinstance(value, list):
            left += [(place, inner) for inner in value]


def check_settings(name: str, document: Any) -> Iterator[Finding]:
    """What any document of settings may not ask for."""
    if not isinstance(document, dict):
        yield Finding(f"{name}: not a table of settings", "download the file again")
    for key, value, _ in _walk(document):
        yield from _check_setting(f"{name}: {key[:60]}", key, value)


def _check_setting(where: str, key: str, value: Any) -> Iterator[Finding]:
    if key == "auto_map":
        yield Finding(f"{where} asks to run code from the model", "remote code is never run here")
    if "_implementation" in key and any("/" in text for text in _texts(value)):
        yield Finding(f"{where} names a kernel to download", "remove that line")
    if key == "transformers_weights":
        yield Finding(f"{where} names other weights than those that are checked", "remove that line")
    if key == "fast_tokenizer_files" and not all(map(_plain, _texts(value))):
        yield Finding(f"{where} names a file outside the model", "do not trust this model")


def _texts(value: Any) -> list[str]:
    """The texts a value is or holds."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else (value,)
    return [text for text in inner if isinstance(text, str)]


def _plain(name: str) -> bool:
    return WORD.fullmatch(name) is not None and not name.startswith(".")


def check_config(document: Mapping[str, Any], *, packed: bool) -> Iterator[Finding]:
    """What config.json says of the model: its family, its sizes, whether it is quantized already."""
    if not isinstance(document.get("model_type"), str) or not WORD.fullmatch(document["model_type"]):
        yield Finding("config.json: no model_type", REPAIR)
    yield from _check_architecture(document)
    section = document.get("quantization_config")
    method = section.get("quant_method") if isinstance(section, dict) else None
    if isinstance(section, dict) and "tied" in section and not packed:
        yield Finding(
            "config.json: blocks of this model share their weights (prune --tie)",
            "give the model it was made from, or a copy in which they are apart: llmcompress export OUT --format bf16",
        )
    elif "quantization_config" in document and not packed:
        yield Finding(f"config.json: already quantized ({str(method)[:40]})", "give the original, unquantized model")
    elif "quantization_config" in document and not isinstance(method, str):
        yield Finding(
            f"config.json: quantized by {str(method)[:40]!r}, not a checkpoint this can read",
            "its quantization_config has no quant_method: download config.json again",
        )
    width, heads = document.get("hidden_size"), document.get("num_attention_heads")
    if (
        document.get("model_type") in DIVIDING
        and type(width) is type(heads) is int
        and heads > 0
        and 0 < width % heads < width
    ):
        yield Finding(f"config.json: hidden_size {width} is no multiple of num_attention_heads {heads}", REPAIR)
    sizes = {key: value for key, value in document.items() if key != "quantization_config"}
    for key, value, place in _walk(sizes):
        yield from _check_value(place + key, key, value)


def _check_value(where: str, key: str, value: Any) -> Iterator[Finding]:
    if value is None:
        return
    found, shown = RANGES.get(key), str(value)[:40]
    if found is not None and not found.holds(value):
        kind = "a whole number" if found.whole else "a number"
        yield Finding(f"config.json: {where} is {shown}, not {kind} from {found.low:g} to {found.high:g}", REPAIR)
    elif key in FLAGS and not isinstance(value, bool):
        yield Finding(f"config.json: {where} is {shown}, not true or false", REPAIR)
    elif key in ACTIVATIONS and not (isinstance(value, str) and ACTIVATION.fullmatch(value)):
        yield Finding(f"config.json: {where} is {shown}, not the name of an activation", REPAIR)
    elif key in ("dtype", "torch_dtype") and str(value).removeprefix("torch.") not in FLOAT_NAMES:
        yield Finding(f"config.json: {where} is {shown}, not one of {', '.join(FLOAT_NAMES)}", REPAIR)


def _check_architecture(config: Mapping[str, Any]) -> Iterator[Finding]:
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list):
        yield Finding("config.json: architectures is not a list", REPAIR)
        return
    causal = any(isinstance(a, str) and re.search(r"(ForCausalLM|LMHeadModel)$", a) for a in architectures)
    if config.get("is_encoder_decoder") is True or (architectures and not causal):
        found = str(architectures[0] if architectures else config.get("model_type"))[:60]
        yield Finding(
            f"config.json: {found!r} is not a causal language model", "only decoder-only language models are compressed"
        )


def vocabulary_of(config: Mapping[str, Any]) -> int | None:
    """Rows of the embedding by config.json, of the text model where there are several."""
    text = config.get("text_config")
    value = config.get("vocab_size", text.get("vocab_size") if isinstance(text, dict) else None)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def check_tokens(documents: Mapping[str, Any], vocabulary: int) -> Iterator[Finding]:
    """Tokens beyond the embedding's rows: in the tokenizer, and the padding that a model is built with."""
    hint = "the tokenizer belongs to another model"
    tokenizer = documents.get("tokenizer.json")
    if tokenizer is not None and not isinstance(tokenizer, dict):
        yield Finding("tokenizer.json: not a tokenizer", "download the file again")
    elif tokenizer is not None and (largest := _largest_id(tokenizer)) >= vocabulary:
        yield Finding(f"tokenizer.json: token id {largest}, but the model has {vocabulary} embeddings", hint)
    padding = documents["config.json"].get("pad_token_id")
    if isinstance(padding, int) and padding >= vocabulary:
        yield Finding(f"config.json: pad_token_id {padding}, but the model has {vocabulary} embeddings", REPAIR)


def _largest_id(tokenizer: Mapping[str, Any]) -> int:
    model, added = tokenizer.get("model"), tokenizer.get("added_tokens")
    table = model.get("vocab") if isinstance(model, dict) else None
    ids: list[int] = [i for i in table.values() if isinstance(i, int)] if isinstance(table, dict) else []
    ids.append(len(table) - 1 if isinstance(table, list) else 0)  # Unigram: a list in the order of ids
    tokens = added if isinstance(added, list) else []
    ids += [t["id"] for t in tokens if isinstance(t, dict) and isinstance(t.get("id"), int)]
    return max(ids)
