"""Write a model without some of its blocks, so that its own class opens the rest.

Blocks are renumbered, and so is everything in config.json that counts or lists them. Whether that was all is not
reasoned about but measured: the files are opened again and must give the logits of the model with those blocks passed
over, exactly.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcompress.compress.prune.measure import logits_without
from llmcompress.compress.shards import INDEX_NAME, ShardMap, index_document, write_shard
from llmcompress.errors import InputError
from llmcompress.files import commit_json, read_json
from llmcompress.kernels.stored import Layout
from llmcompress.model.checkpoint import read_tensor
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import BlockStream

COUNT = "num_hidden_layers"
TYPES = "layer_types"


def renumbered(name: str, leaf: str, old: int, new: int) -> str:
    """A tensor's name in the file with its block's number changed. `leaf` is what the list of blocks is called.

    Raises InputError where the name does not hold that number once, after the list's name.
    """
    pattern = re.compile(rf"(?:(?<=^)|(?<=\.)){re.escape(leaf)}\.{old}(?=\.)")
    if len(pattern.findall(name)) != 1:
        raise InputError(f"tensor {name}: cannot tell the number of its block", "report this model family")
    return pattern.sub(f"{leaf}.{new}", name)


def pruned_config(document: Mapping[str, Any], config: Any, kept: tuple[int, ...]) -> dict[str, Any]:
    """config.json for the blocks in `kept` (numbers in the original, ascending).

    The count is changed, lists with an entry per block lose those of removed blocks, lists of block numbers are
    renumbered, and kinds of layers that the class derives from a pattern are written out.
    """
    found = dict(document)
    inner = config.get_text_config()
    key = getattr(inner, "attribute_map", {}).get(COUNT, COUNT)
    nested = next((k for k, v in document.items() if isinstance(v, Mapping) and key in v and key not in document), None)
    part: dict[str, Any] = dict(found[nested]) if nested else found
    blocks = int(inner.num_hidden_layers)
    place = {old: new for new, old in enumerate(kept)}
    for name, value in part.items():
        if isinstance(value, list) and "layer" in name:
            if len(value) == blocks:
                part[name] = [value[old] for old in kept]
            elif all(isinstance(x, int) and not isinstance(x, bool) and 0 <= x < blocks for x in value):
                part[name] = [place[x] for x in value if x in place]
    kinds = getattr(inner, TYPES, None)
    if kinds is not None and len(kinds) == blocks:
        part[TYPES] = [kinds[old] for old in kept]
    part[key] = len(kept)
    if nested:
        found[nested] = part
    return found


def write_pruned(skeleton: Skeleton, removed: frozenset[int], folder: Path) -> None:
    """Shards, index and config.json of the model without some blocks; every tensor byte for byte."""
    kept = tuple(index for index in range(len(skeleton.blocks)) if index not in removed)
    entries, leaf = skeleton.files.tensors, skeleton.blocks_name.rpartition(".")[2]
    parts: list[dict[str, str]] = [{name: name for name in skeleton.rest_tensors()}]
    for new, old in enumerate(kept):
        parts.append({renumbered(name, leaf, old, new): name for name in skeleton.block_tensors(old)})
    names = ShardMap(tuple(tuple(part) for part in parts), {}, {}, "BF16")  # only for the names of the files
    layouts: list[tuple[str, Layout]] = []
    for place, part in enumerate(parts):
        layout: Layout = {name: (entries[source].dtype, entries[source].shape) for name, source in part.items()}
        tensors = {name: read_tensor(entries[source]) for name, source in part.items()}
        write_shard(folder / names.name(place), layout, tensors)
        layouts.append((names.name(place), layout))
    gone = sum(p.numel() for index in removed for p in skeleton.blocks[index].parameters())
    parameters = sum(p.numel() for p in skeleton.model.parameters()) - gone
    commit_json(folder / INDEX_NAME, index_document(layouts, parameters))
    document = read_json(skeleton.files.folder / "config.json")
    commit_json(folder / "config.json", pruned_config(document, skeleton.config, kept))


@torch.no_grad()
def check_pruned(skeleton: Skeleton, removed: frozenset[int], folder: Path, tokens: Tensor) -> None:
    """Raises InputError where the reopened model is not the original with blocks passed over, logit for logit."""
    expected = logits_without(skeleton, removed, tokens)
    family = skeleton.config.model_type
    try:
        found = next(iter(BlockStream(Skeleton.open(folder, str(skeleton.device))).logits([tokens])))
    except InputError as error:
        raise InputError(f"a {family} model cannot do without these blocks: {error.what}", _ADVICE) from None
    if found.shape != expected.shape or not torch.equal(found, expected):
        difference = float((found - expected).abs().max()) if found.shape == expected.shape else float("inf")
        what = f"the logits of the written model differ by {difference:.2g}"
        raise InputError(f"blocks of a {family} model depend on their number: {what}", _ADVICE)


_ADVICE = "choose other blocks with --blocks or --exclude, or another model"
