"""A low-rank adapter that lies beside a packed checkpoint, in the layout of peft, and a reader that adds it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from llmcompress.errors import InputError
from llmcompress.runtime.packed import PackedReader, Reader
from llmcompress.runtime.shards import ShardReader, read_document

FOLDER = "adapter"  # in the directory of the checkpoint
CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."


class Adapter:
    """What an adapter adds to weights, by the name of their module."""

    def __init__(self, folder: Path) -> None:
        document = read_document(folder / CONFIG_NAME)
        self._shards = ShardReader([folder / WEIGHTS_NAME])
        rank, alpha = document.get("r"), document.get("lora_alpha")
        if document.get("peft_type") != "LORA" or not isinstance(rank, int) or not isinstance(alpha, int | float):
            raise InputError(f"{FOLDER}/{CONFIG_NAME}: not an adapter this can read", "the files are damaged")
        self._scale = alpha / rank
        self.columns_first = bool(document.get("fan_in_fan_out"))  # how weights that are not packed lie
        ending = ".lora_A.weight"
        names = self._shards.names()
        self._modules = tuple(n.removeprefix(PREFIX).removesuffix(ending) for n in names if n.endswith(ending))

    def change_of(self, stem: str) -> Tensor | None:
        """What is added to the weight of a linear, float32 `(rows, columns)`, None where nothing is."""
        module = next((m for m in self._modules if m == stem or m.endswith("." + stem)), None)
        if module is None:
            return None
        down, up = (self._shards.read(f"{PREFIX}{module}.lora_{part}.weight").float() for part in "AB")
        return up @ down * self._scale


class AdaptedReader(PackedReader):
    """A packed checkpoint and its adapter, seen as one."""

    def __init__(self, base: Reader, config: Mapping[str, Any], adapter: Adapter) -> None:
        super().__init__(base, config)
        self._adapter = adapter

    def read(self, name: str) -> Tensor:
        """A tensor as stored, or a packed weight dequantized to float32, with what the adapter adds."""
        found, stem = super().read(name), name.removesuffix(".weight")
        change = None if stem == name else self._adapter.change_of(stem)
        if change is None:
            return found
        return found + (change.T if self._adapter.columns_first and name not in self.row_major else change)

    def read_float(self, name: str) -> Tensor:
        """The same in float32."""
        return self.read(name).float()


def adapter_bytes(folder: Path) -> int:
    """Size of the adapter's weights in a directory, 0 where there is none."""
    path = folder / FOLDER / WEIGHTS_NAME
    return path.stat().st_size if path.is_file() else 0


def reader_of(folder: Path) -> Callable[[Reader, Mapping[str, Any]], PackedReader]:
    """How to read the packed checkpoint in a directory: with its adapter, where there is one."""
    if not (folder / FOLDER).is_dir():
        return PackedReader
    return lambda base, config: AdaptedReader(base, config, Adapter(folder / FOLDER))
