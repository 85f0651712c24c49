"""Write a healed checkpoint: the files of the one it was, with some tensors changed or an adapter beside them."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from llmcompress.compress.heal.lora import LoraTuning
from llmcompress.compress.output import RECORD_NAME, copy_side_files
from llmcompress.compress.prune.records import RECORD_NAME as PRUNE_NAME
from llmcompress.compress.rewrite import RECORD_NAME as REWRITE_NAME
from llmcompress.compress.shards import INDEX_NAME, write_shard
from llmcompress.compress.tie.records import TYING_NAME
from llmcompress.files import commit_bytes, commit_json
from llmcompress.hub.card import PICTURE_NAME
from llmcompress.kernels.stored import Layout
from llmcompress.model.checkpoint import DTYPE_NAMES
from llmcompress.preflight import SourceFiles
from llmcompress.runtime.adapter import CONFIG_NAME, FOLDER, WEIGHTS_NAME

KEPT = (PICTURE_NAME, "config.json", INDEX_NAME, PRUNE_NAME, TYING_NAME, REWRITE_NAME)


def write_checkpoint(files: SourceFiles, changed: Mapping[str, Tensor], folder: Path) -> None:
    """The checkpoint with some tensors changed, dtypes and shapes the same; other shards are copied."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for shard in files.shards:
        entries = {n: e for n, e in files.tensors.items() if e.path.name == shard}
        if changed.keys().isdisjoint(entries):
            commit_bytes(folder / shard, (files.folder / shard).read_bytes())
            continue
        layout: Layout = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
        write_shard(folder / shard, layout, {n: changed.get(n, e) for n, e in entries.items()})
    copy_side_files(files.folder, folder)
    for name in KEPT:
        if (files.folder / name).is_file():
            commit_bytes(folder / name, (files.folder / name).read_bytes())


def write_adapter(tuning: LoraTuning, folder: Path) -> int:
    """The adapter in the layout of peft, in a folder of its own; returns the bytes of its weights."""
    place = folder / FOLDER
    place.mkdir()
    tensors = tuning.adapter()
    layout: Layout = {name: (DTYPE_NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
    write_shard(place / WEIGHTS_NAME, layout, tensors)
    commit_json(place / CONFIG_NAME, tuning.adapter_config())
    return (place / WEIGHTS_NAME).stat().st_size


def is_ours(folder: Path) -> bool:
    """Whether a directory was written by us, so that its model card tells how it came to be."""
    return any((folder / name).is_file() for name in (RECORD_NAME, PRUNE_NAME, REWRITE_NAME))
