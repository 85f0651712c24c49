"""Write a model whose blocks share weights, in our own layout, and compare what is read with what was measured."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from llmcompress.compress.exporters import native
from llmcompress.compress.prune.measure import logits_of
from llmcompress.compress.shards import INDEX_NAME, ShardMap, index_document, write_shard
from llmcompress.compress.tie.weights import Group, Tied
from llmcompress.errors import InputError
from llmcompress.files import commit_json, read_json
from llmcompress.kernels.stored import DOWN, UP, Layout
from llmcompress.model.checkpoint import DTYPE_NAMES, read_tensor
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import BlockStream
from llmcompress.runtime.adapter import reader_of
from llmcompress.runtime.tying import KEY, TieRecord
from llmcompress.types import LinearInfo


@dataclass(frozen=True)
class Writing:
    """A tied variant of a model, by the tensors of its file."""

    tied: Tied

    @property
    def skeleton(self) -> Skeleton:
        return self.tied.ties.skeleton

    def record(self) -> TieRecord:
        """What config.json says of it."""
        shared: dict[str, str] = {}
        for group in self.tied.groups:
            first, *others = (self.tied.ties.linears[index] for index in group.blocks)
            shared |= {linear.stem: first[name].stem for block in others for name, linear in block.items()}
        groups = tuple(tuple(group.blocks) for group in self.tied.groups)
        return TieRecord(groups=groups, shared=shared, rank=self.tied.ties.rank)

    def tensors(self, index: int) -> dict[str, Tensor]:
        """What the file holds of a block."""
        entries = self.skeleton.files.tensors
        found = {name: read_tensor(entries[name]) for name in self.skeleton.block_tensors(index)}
        for group in self.tied.groups:
            if index in group.blocks:
                for name, linear in self.tied.ties.linears[index].items():
                    found |= self._linear(group, index, name, linear)
        return found

    def _linear(self, group: Group, index: int, name: str, linear: LinearInfo) -> dict[str, Tensor]:
        """The tensors of one tied linear: the first of a group has the weight, the others one that stops strangers."""
        ties = self.tied.ties
        guard = torch.empty(0, dtype=torch.float16)
        found = {linear.tensor: ties.shared(group, name) if index == group.first else guard}
        if (factors := ties.factors.get((group, index, name))) is not None:
            found |= {linear.stem + part: factor for part, factor in zip((UP, DOWN), factors, strict=True)}
        return found


def write_tied(writing: Writing, folder: Path) -> None:
    """Shards, index and config.json; everything that is not a tied weight byte for byte as it was."""
    skeleton = writing.skeleton
    entries, rest = skeleton.files.tensors, skeleton.rest_tensors()
    blocks = range(len(skeleton.blocks))
    names = ShardMap((rest, *(() for _ in blocks)), {}, {}, "BF16")  # only for the names of the files
    layouts: list[tuple[str, Layout]] = []
    for place in range(len(blocks) + 1):
        tensors = writing.tensors(place - 1) if place else {name: read_tensor(entries[name]) for name in rest}
        layout: Layout = {name: (DTYPE_NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
        write_shard(folder / names.name(place), layout, tensors)
        layouts.append((names.name(place), layout))
    commit_json(folder / INDEX_NAME, index_document(layouts, skeleton.parameters))
    config = read_json(skeleton.files.folder / "config.json")
    section = {
        "quant_method": "llmcompress",
        "version": native.VERSION,
        "how_to_open": native.HOW,
        "groups": {},
        "ignore": [],
        KEY: writing.record().model_dump(mode="json"),
    }
    commit_json(folder / "config.json", config | {"quantization_config": section})


def check_tied(writing: Writing, folder: Path, tokens: Tensor) -> Tensor:
    """Logits of the reopened files. Raises InputError where they are not those of the model that was measured."""
    expected = logits_of(writing.skeleton, writing.tied, tokens)
    reopened = Skeleton.open(folder, str(writing.skeleton.device), decode=reader_of(folder))
    found = next(iter(BlockStream(reopened).logits([tokens])))
    if not torch.equal(found, expected):
        raise InputError(
            f"the written model's logits differ by {float((found - expected).abs().max()):.2g}",
            "report this model family; nothing was written",
        )
    return found
