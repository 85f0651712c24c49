"""Tensors by name from safetensors files."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmcompress.errors import InputError
from llmcompress.files import read_json

DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
}


class ShardReader:
    """Tensors by name from some files, each read when it is asked for."""

    def __init__(self, paths: Iterable[Path]) -> None:
        self._files: dict[str, Any] = {}
        for path in paths:
            try:
                opened = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                words = " ".join(str(error).split())[:120]
                hint = "the download is incomplete or damaged; fetch it again"
                raise InputError(f"{path.name}: {words}", hint) from None
            self._files |= dict.fromkeys(opened.keys(), opened)  # type: ignore[no-untyped-call]

    def names(self) -> tuple[str, ...]:
        return tuple(self._files)

    def _file(self, name: str) -> Any:
        if name not in self._files:
            raise InputError(f"tensor {name} is missing", "the download is incomplete or damaged; fetch it again")
        return self._files[name]

    def read(self, name: str) -> Tensor:
        """One tensor as stored. Raises InputError where there is none of that name."""
        tensor: Tensor = self._file(name).get_tensor(name)
        return tensor

    def outline(self, name: str) -> Tensor:
        """A tensor of the same dtype and shape on the meta device."""
        view = self._file(name).get_slice(name)
        dtype = DTYPES.get(view.get_dtype())
        if dtype is None:
            raise InputError(f"{name}: dtype {view.get_dtype()}", "quantize the model again")
        return torch.empty(view.get_shape(), dtype=dtype, device="meta")


def read_document(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises InputError where it is none."""
    document = read_json(path)
    if not isinstance(document, dict):
        raise InputError(f"{path.name}: not a JSON object", "give a model directory")
    return document
