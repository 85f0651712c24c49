"""The weights of a model directory: the shards an index may name, their headers, and whether all of it agrees."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llmcompress.errors import Finding, InputError, Refused
from llmcompress.files import read_json
from llmcompress.preflight.documents import vocabulary_of
from llmcompress.preflight.folder import check_entry, limit_of
from llmcompress.preflight.header import TensorEntry, read_header

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PLAIN_SHARD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,200}\.safetensors")
HARMLESS_INTEGERS = re.compile(r"((attn|attention)\.(masked_)?bias|position_ids|inv_freq)$")
EMBEDDING = re.compile(
    r"((model|transformer|gpt_neox|model\.decoder|model\.language_model|language_model\.model)\.)?"
    r"(embed_tokens|wte|word_embeddings|embed_in)\.weight"
)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")
FLOATS = frozenset(("F64", "F32", "F16", "BF16"))
ADAPTER, ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter", "adapter_model.safetensors", "adapter_config.json"
AGAIN = "download the model again"
MIXED = "config.json and the weights are not of the same model"


def shard_list(folder: Path, refused: set[str]) -> tuple[tuple[str, ...], dict[str, str] | None]:
    """Plain names of the shards, and the index where there is one. transformers, too, prefers the single file.

    Raises InputError where there are no weights, or the index names anything but plain files beside it.
    """
    single, index_path = folder / SINGLE_NAME, folder / INDEX_NAME
    if single.exists() or single.is_symlink():
        return (SINGLE_NAME,), None
    if INDEX_NAME in refused:
        return (), None
    if not index_path.is_file():
        if any(True for pattern in PICKLES for _ in folder.glob(pattern)):
            raise InputError(
                f"{folder.name}: only pickled weights, which can run code when opened",
                "convert them to safetensors first, e.g. with the model hub's conversion service",
            )
        raise InputError(f"{folder.name}: no {SINGLE_NAME} and no {INDEX_NAME}", "download the weights")
    document = read_json(index_path, limit_of(INDEX_NAME) or 0)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{INDEX_NAME}: no weight_map", "download the index again")
    hint = "an index may only name files of its own directory; do not trust this model"
    findings = [
        Finding(f"{INDEX_NAME}: {tensor[:80]!r} points to {str(name)[:80]!r}, not to a plain .safetensors file", hint)
        for tensor, name in weight_map.items()
        if not isinstance(name, str) or not PLAIN_SHARD.fullmatch(name)
    ]
    if findings:
        raise Refused(findings)
    return tuple(sorted(set(weight_map.values()))), weight_map


def read_shards(
    folder: Path, names: tuple[str, ...], refused: set[str], *, packed: bool
) -> tuple[dict[str, TensorEntry], list[Finding]]:
    """The tensors of all shards by name, and what is wrong with them; shards already `refused` are not opened again."""
    tensors: dict[str, TensorEntry] = {}
    findings: list[Finding] = []
    for name in names:
        if name in refused:
            continue
        if (finding := check_entry(folder, name)) is not None:
            findings.append(finding)
            continue
        try:
            entries = read_header(folder / name)
        except InputError as error:
            findings += error.findings if isinstance(error, Refused) else [Finding(error.what, error.hint)]
            continue
        for entry in entries:
            if entry.name in tensors:
                findings.append(Finding(f"{name}: tensor {entry.name[:120]!r} is also in another shard", AGAIN))
            tensors[entry.name] = entry
        findings += [] if packed else _not_floats(name, entries)
    return tensors, findings


def _not_floats(shard: str, entries: tuple[TensorEntry, ...]) -> Iterator[Finding]:
    for entry in entries:
        if entry.dtype not in FLOATS and not HARMLESS_INTEGERS.search(entry.name):
            what = f"{shard}: tensor {entry.name[:120]!r} is {entry.dtype}, weights must be floating point"
            yield Finding(what, "give the original, unquantized model")


def check_index(index: Mapping[str, str], tensors: Mapping[str, TensorEntry]) -> Iterator[Finding]:
    """The index promises exactly the tensors there are, where they are."""
    for name, shard in index.items():
        entry = tensors.get(name)
        if entry is None or entry.path.name != shard:
            yield Finding(
                f"{shard}: tensor {name[:120]!r}, which the index promises, is not in it",
                "transformers would fill it with random numbers; download the model again",
            )
    for name, entry in tensors.items():
        if name not in index:
            yield Finding(f"{entry.path.name}: tensor {name[:120]!r} is not in the index", "download the index again")


def check_sizes(config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> Iterator[Finding]:
    """config.json asks for no more than the files can hold, before a model of its sizes is built."""
    text = config.get("text_config")
    sizes = {**(text if isinstance(text, dict) else {}), **config}
    largest = max((max(entry.shape, default=0) for entry in tensors.values()), default=0)
    limits = {key: len(tensors) for key in ("num_hidden_layers", "n_layer")}
    limits |= dict.fromkeys(("hidden_size", "n_embd"), largest)
    for key, limit in limits.items():
        value = sizes.get(key)
        if isinstance(value, int) and value > limit:
            what = f"{len(tensors)} tensors, the largest size of any {largest}"
            yield Finding(f"config.json: {key} is {str(value)[:40]}, but the weights are {what}", MIXED)
    vocabulary = vocabulary_of(config)
    if vocabulary is None or "quantization_config" in config:
        return
    for name, entry in tensors.items():
        if EMBEDDING.fullmatch(name) and len(entry.shape) == 2 and entry.shape[0] != vocabulary:
            yield Finding(f"{name}: {entry.shape[0]} embeddings, but vocab_size is {vocabulary} in config.json", MIXED)


def check_adapter(folder: Path, document: Any, refused: set[str]) -> Iterator[Finding]:
    """The low-rank adapter beside a checkpoint: plain numbers in its settings, and pairs of factors that fit."""
    where, name = f"{ADAPTER}/{ADAPTER_CONFIG}", f"{ADAPTER}/{ADAPTER_WEIGHTS}"
    if (folder / ADAPTER_CONFIG).exists():
        yield Finding(
            f"{ADAPTER_CONFIG}: a directory of an adapter, whose base transformers would fetch from elsewhere",
            "merge the adapter into its model first: peft's merge_and_unload",
        )
    if not (folder / ADAPTER).is_dir() or refused & {where, name, ADAPTER}:
        return
    rank = document.get("r") if isinstance(document, dict) else None
    alpha = document.get("lora_alpha") if isinstance(document, dict) else None
    whole = isinstance(rank, int) and not isinstance(rank, bool) and 0 < rank <= 1 << 16
    if not whole or not isinstance(alpha, int | float) or isinstance(alpha, bool) or abs(alpha) > 1e9:
        yield Finding(f"{where}: no rank and alpha of a low-rank adapter", "remove the folder, or heal again")
        return
    if (finding := check_entry(folder, name)) is not None:
        yield finding
        return
    try:
        shapes = {entry.name: entry.shape for entry in read_header(folder / name)}
    except InputError as error:
        yield from error.findings if isinstance(error, Refused) else (Finding(error.what, error.hint),)
        return
    for tensor, shape in shapes.items():
        stem, _, part = tensor.rpartition(".lora_")
        down, up = shapes.get(f"{stem}.lora_A.weight", ()), shapes.get(f"{stem}.lora_B.weight", ())
        pair = len(down) == len(up) == 2 and down[0] == up[1] == rank
        if part not in ("A.weight", "B.weight") or not pair:
            yield Finding(f"{name}: {tensor[:120]!r} of shape {shape} is not a factor of rank {rank}", "heal again")
