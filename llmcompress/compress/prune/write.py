"""Write a model without some of its blocks and halves of others, so that its own class opens the rest.

Blocks are renumbered, and so is everything in config.json that counts or lists them. Whether that was all is not
reasoned about but measured: the files are opened again and must give the logits of the model with those blocks passed
over, exactly. Halves of blocks stay in place as zeros, and config.json says which they are.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcompress.compress.prune.halves import Half, Halves, Removal
from llmcompress.compress.prune.measure import NO_HALVES, logits_without
from llmcompress.compress.shards import INDEX_NAME, ShardMap, index_document, write_shard
from llmcompress.errors import InputError
from llmcompress.files import commit_json, read_json
from llmcompress.kernels.stored import Layout
from llmcompress.model.checkpoint import TORCH_DTYPES
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import BlockStream
from llmcompress.preflight.header import TensorEntry
from llmcompress.runtime.skipping import KEY, SkipRecord

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


@dataclass(frozen=True)
class Writing:
    """A model, and what of it is not to be written: blocks, and halves that are among `halves`."""

    skeleton: Skeleton
    removed: Removal
    halves: Halves = NO_HALVES

    @property
    def kept(self) -> tuple[int, ...]:
        """Blocks that stay, by their numbers in the original; those in the written model are their places here."""
        return tuple(index for index in range(len(self.skeleton.blocks)) if index not in self.removed)

    def renumbered(self, name: str, old: int) -> str:
        """A name with the number that block `old` gets."""
        return renumbered(name, self.skeleton.blocks_name.rpartition(".")[2], old, self.kept.index(old))

    def record(self) -> SkipRecord | None:
        """Which halves the written model skips; None where it has all."""
        gone = sorted(half for half in self.removed if isinstance(half, Half))
        halves, zero, idle = [], {}, []
        for half in gone:
            modules, start = self.halves.modules[half], self.skeleton.block_name(half.block)
            halves.append(f"{self.kept.index(half.block)}.{half.part}")
            zero[self.renumbered(f"{start}.{modules.zero}", half.block)] = modules.returns
            idle += [self.renumbered(f"{start}.{name}", half.block) for name in modules.idle]
        return SkipRecord(halves=tuple(halves), zero=zero, idle=tuple(idle)) if gone else None

    def stored(self, name: str, index: int) -> Tensor | TensorEntry:
        """A tensor of block `index` as it will be stored: zeros where it is of a half that is removed."""
        skeleton = self.skeleton
        start = skeleton.block_name(index)
        gone = [self.halves.modules[half] for half in self.removed if isinstance(half, Half) and half.block == index]
        modules = tuple(f"{start}.{module}." for half in gone for module in half.weights)
        entry = skeleton.files.tensors[name]
        if not skeleton.names.module_of[name].startswith(modules):
            return entry
        return torch.zeros(entry.shape, dtype=TORCH_DTYPES[entry.dtype])


def write_pruned(writing: Writing, folder: Path) -> None:
    """Shards, index and config.json of the model without some blocks and halves; other tensors byte for byte."""
    skeleton, kept, entries = writing.skeleton, writing.kept, writing.skeleton.files.tensors
    rest, parts = skeleton.rest_tensors(), [skeleton.block_tensors(old) for old in kept]
    names = ShardMap((rest, *parts), {}, {}, "BF16")  # only for the names of the files
    layouts: list[tuple[str, Layout]] = []
    for place in range(len(kept) + 1):
        if place:
            old = kept[place - 1]
            new_names = {name: writing.renumbered(name, old) for name in parts[place - 1]}
            tensors: dict[str, Tensor | TensorEntry] = {
                new: writing.stored(name, old) for name, new in new_names.items()
            }
        else:
            new_names = {name: name for name in rest}
            tensors = {name: entries[name] for name in rest}
        layout: Layout = {new: (entries[name].dtype, entries[name].shape) for name, new in new_names.items()}
        write_shard(folder / names.name(place), layout, tensors)
        layouts.append((names.name(place), layout))
    gone = sum(p.numel() for i, block in enumerate(skeleton.blocks) if i not in kept for p in block.parameters())
    commit_json(folder / INDEX_NAME, index_document(layouts, skeleton.parameters - gone))
    config = pruned_config(read_json(skeleton.files.folder / "config.json"), skeleton.config, kept)
    config.pop(KEY, None)
    record = writing.record()
    commit_json(folder / "config.json", config | ({KEY: record.model_dump(mode="json")} if record else {}))


@torch.no_grad()
def check_pruned(writing: Writing, folder: Path, tokens: Tensor) -> None:
    """Raises InputError where the reopened model is not the original with parts passed over, logit for logit."""
    skeleton = writing.skeleton
    expected = logits_without(skeleton, writing.removed, tokens, writing.halves)
    family = skeleton.config.model_type
    try:
        found = next(iter(BlockStream(Skeleton.open(folder, str(skeleton.device))).logits([tokens])))
    except InputError as error:
        raise InputError(f"a {family} model cannot do without these blocks: {error.what}", _ADVICE) from None
    if found.shape != expected.shape or not torch.equal(found, expected):
        difference = float((found - expected).abs().max()) if found.shape == expected.shape else float("inf")
        why = "depend on their number" if len(writing.kept) < len(skeleton.blocks) else "cannot be halved"
        what = f"the logits of the written model differ by {difference:.2g}"
        raise InputError(f"blocks of a {family} model {why}: {what}", _ADVICE)


_ADVICE = "choose other blocks with --blocks or --exclude, or another model"
