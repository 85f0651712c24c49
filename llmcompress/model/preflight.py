"""Look at a model directory before any library opens it, and refuse what is wrong or unsafe.

transformers loads many damaged checkpoints without a word and follows `../` in an index; so the list
of shards it would read is validated here and the weights are read by us, from that list only.
"""

import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcompress.errors import InputError
from llmcompress.files import read_json
from llmcompress.model.header import TensorEntry, read_header

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PLAIN_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*\.safetensors")
HARMLESS_INTEGERS = re.compile(r"((attn|attention)\.(masked_)?bias|position_ids|inv_freq)$")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
FLOATS = frozenset(("F64", "F32", "F16", "BF16"))
LIMITS: Mapping[str, int] = {
    "num_hidden_layers": 10_000,
    "n_layer": 10_000,
    "vocab_size": 10_000_000,
    "hidden_size": 1_000_000,
    "n_embd": 1_000_000,
    "intermediate_size": 10_000_000,
    "num_attention_heads": 100_000,
    "max_position_embeddings": 1 << 32,
}


@dataclass(frozen=True)
class SourceFiles:
    """A validated model directory: its config, its shards, and where every tensor lies."""

    folder: Path
    config: Mapping[str, Any]
    shards: tuple[str, ...]
    tensors: Mapping[str, TensorEntry]


def check_source(folder: Path, *, packed: bool = False) -> SourceFiles:
    """Validate a model directory. Raises InputError naming the file and the remedy.

    With `packed` the directory may be already quantized (an output of ours is opened again).
    """
    if not folder.is_dir():
        raise InputError(f"{folder.name}: not a model directory", "give a directory with config.json and safetensors")
    config = _check_config(folder, packed)
    shards, index = _shard_list(folder)
    tensors: dict[str, TensorEntry] = {}
    for name in shards:
        for entry in read_header(_safe_shard(folder, name)):
            if entry.name in tensors:
                raise InputError(f"{name}: tensor {entry.name!r} is also in another shard", "download the model again")
            tensors[entry.name] = entry
            _check_dtype(name, entry, packed)
    if index is not None:
        _check_index(index, tensors)
    return SourceFiles(folder, config, shards, tensors)


def _check_config(folder: Path, packed: bool) -> Mapping[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder.name}: no config.json", "give a Hugging Face model directory")
    config = read_json(path)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise InputError("config.json: no model_type", "compare it with the config.json of the published model")
    tokenizer = folder / "tokenizer_config.json"
    documents = {"config.json": config}
    if tokenizer.is_file():
        documents["tokenizer_config.json"] = read_json(tokenizer)
    for name, document in documents.items():
        if isinstance(document, dict) and "auto_map" in document:
            raise InputError(f"{name}: auto_map asks to run code from the model", "remote code is never run here")
    for key, value in config.items():
        if "attn_implementation" in key and isinstance(value, str) and "/" in value:
            raise InputError(f"config.json: {key} names a kernel to download", "remove that line")
    if "quantization_config" in config and not packed:
        section = config["quantization_config"]
        method = section.get("quant_method") if isinstance(section, dict) else None
        raise InputError(f"{folder.name}: already quantized ({method})", "give the original, unquantized model")
    _check_architecture(config)
    _check_limits(config)
    return config


def _check_architecture(config: Mapping[str, Any]) -> None:
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list):
        raise InputError("config.json: architectures is not a list", "compare it with the published config.json")
    causal = any(isinstance(a, str) and re.search(r"(ForCausalLM|LMHeadModel)$", a) for a in architectures)
    if config.get("is_encoder_decoder") or (architectures and not causal):
        found = architectures[0] if architectures else config["model_type"]
        raise InputError(
            f"config.json: {found!r} is not a causal language model",
            "only decoder-only language models are compressed",
        )


def _check_limits(config: Mapping[str, Any]) -> None:
    for key, limit in LIMITS.items():
        value = config.get(key)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= limit:
            raise InputError(f"config.json: {key} is {str(value)[:40]}, expected 1 to {limit}", "repair the config")


def _shard_list(folder: Path) -> tuple[tuple[str, ...], dict[str, str] | None]:
    """Plain names of the shards, and the index where there is one. transformers, too, prefers the single file."""
    single, index_path = folder / SINGLE_NAME, folder / INDEX_NAME
    if single.exists() or single.is_symlink():
        return (SINGLE_NAME,), None
    if not index_path.is_file():
        if any(True for pattern in PICKLES for _ in folder.glob(pattern)):
            raise InputError(
                f"{folder.name}: only pickled weights, which can run code when opened",
                "convert them to safetensors first, e.g. with the model hub's conversion service",
            )
        raise InputError(f"{folder.name}: no {SINGLE_NAME} and no {INDEX_NAME}", "download the weights")
    document = read_json(index_path)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{INDEX_NAME}: no weight_map", "download the index again")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not PLAIN_SHARD.fullmatch(name):
            raise InputError(
                f"{INDEX_NAME}: {str(tensor)[:80]!r} points to {str(name)[:80]!r}, not to a plain .safetensors file",
                "an index may only name files of its own directory; do not trust this model",
            )
    return tuple(sorted(set(weight_map.values()))), weight_map


def _safe_shard(folder: Path, name: str) -> Path:
    """The shard's path, once it is known to be a regular file of this model."""
    path = folder / name
    try:
        status = path.lstat()
        link = stat.S_ISLNK(status.st_mode)
        real = path.resolve(strict=True) if link else path
    except (OSError, RuntimeError):
        raise InputError(f"{name}: missing or a broken link", "the download is incomplete; fetch it again") from None
    if link and not _link_allowed(folder, real):
        raise InputError(f"{name}: a link to a file outside the model", "copy the file into the model directory")
    if not stat.S_ISREG(real.stat().st_mode):
        raise InputError(f"{name}: not a regular file", "give a model directory with ordinary files")
    return path


def _link_allowed(folder: Path, real: Path) -> bool:
    """Inside the directory, or in the `blobs` of the hub cache whose `snapshots` hold the directory."""
    home = folder.resolve()
    if home in real.parents:
        return True
    return home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs"


def _check_dtype(shard: str, entry: TensorEntry, packed: bool) -> None:
    if packed or entry.dtype in FLOATS or HARMLESS_INTEGERS.search(entry.name):
        return
    raise InputError(
        f"{shard}: tensor {entry.name!r} is {entry.dtype}, weights must be floating point",
        "give the original, unquantized model",
    )


def _check_index(index: Mapping[str, str], tensors: Mapping[str, TensorEntry]) -> None:
    for name, shard in index.items():
        entry = tensors.get(name)
        if entry is None or entry.path.name != shard:
            raise InputError(
                f"{shard}: tensor {name!r}, which the index promises, is not in it",
                "transformers would fill it with random numbers; download the model again",
            )
    extra = next((name for name in tensors if name not in index), None)
    if extra is not None:
        raise InputError(
            f"{tensors[extra].path.name}: tensor {extra!r} is not in the index", "download the index again"
        )


def check_tokenizer(folder: Path, vocabulary: int) -> None:
    """Raises InputError when tokenizer.json has an id beyond the embedding's rows."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return
    document = read_json(path)
    model = document.get("model") if isinstance(document, dict) else None
    table = model.get("vocab") if isinstance(model, dict) else None
    ids = [i for i in table.values() if isinstance(i, int)] if isinstance(table, dict) else []
    added = document.get("added_tokens") if isinstance(document, dict) else None
    ids += [t["id"] for t in added or [] if isinstance(t, dict) and isinstance(t.get("id"), int)]
    largest = max(ids, default=0)
    if largest >= vocabulary:
        raise InputError(
            f"tokenizer.json: token id {largest}, but the model has {vocabulary} embeddings",
            "the tokenizer belongs to another model",
        )
