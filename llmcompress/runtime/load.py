"""`llmcompress.load`: a quantized checkpoint as a transformers model, whatever its layout.

Packed weights are dequantized while loading, so that the model takes the memory of an unpacked one. Linears whose
inputs are rounded round them, and multiply integers where weights and inputs are 8-bit integers both.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmcompress.errors import InputError
from llmcompress.runtime.packed import PackedReader

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


class ShardReader:
    """Tensors by name from the shards of a directory, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, Any] = {}
        for shard in _shards(folder):
            try:
                opened = safe_open(folder / shard, framework="pt")
            except (OSError, SafetensorError) as error:
                words = " ".join(str(error).split())[:120]
                raise InputError(f"{shard}: {words}", "the download is incomplete or damaged; fetch it again") from None
            self._files |= dict.fromkeys(opened.keys(), opened)  # type: ignore[no-untyped-call]

    def names(self) -> tuple[str, ...]:
        return tuple(self._files)

    def read(self, name: str) -> Tensor:
        """One tensor as stored. Raises InputError where there is none of that name."""
        if name not in self._files:
            raise InputError(f"tensor {name} is missing", "the download is incomplete or damaged; fetch it again")
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor


def _shards(folder: Path) -> tuple[str, ...]:
    """File names of the shards, which must lie in the directory itself."""
    if (folder / SINGLE_NAME).is_file():
        return (SINGLE_NAME,)
    index = _document(folder / INDEX_NAME)
    names = index.get("weight_map")
    if not isinstance(names, Mapping) or not all(isinstance(n, str) and n == Path(n).name for n in names.values()):
        raise InputError(f"{INDEX_NAME}: does not map tensors to files of this directory", "do not trust this model")
    return tuple(sorted(set(names.values())))


def _document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError):
        raise InputError(f"{path.name}: missing or not JSON", "give a model directory") from None
    if not isinstance(document, dict):
        raise InputError(f"{path.name}: not a JSON object", "give a model directory")
    return document


def load(path: str | Path, *, dtype: torch.dtype | None = None, device: str = "cpu") -> nn.Module:
    """A checkpoint written by llmcompress as a transformers model, ready for inference.

    path   directory of the checkpoint: compressed-tensors, bitsandbytes 4-bit, or llmcompress's own layout
    dtype  of the weights in memory; what config.json says, where not given
    device where the model is put

    The weights are dequantized while loading. What `save_pretrained` writes of the model is an unquantized one.
    Raises InputError where the directory is not such a checkpoint, or is damaged.
    """
    folder = Path(path)
    document = _document(folder / "config.json")
    reader = PackedReader(ShardReader(folder), document)
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    del config.quantization_config
    wanted = dtype or config.dtype or torch.float32
    with init_empty_weights():
        empty = transformers.AutoModelForCausalLM.from_config(config)
    transposed = tuple(f"{name}.weight" for name, module in empty.named_modules() if isinstance(module, Conv1D))
    state = {}
    for name in reader.names():
        tensor = reader.read(name)
        if name in reader.row_major:
            if any(known == name or known.endswith("." + name) for known in transposed):
                tensor = tensor.T  # Conv1D keeps (columns, rows); the file may leave a prefix of the name out
            tensor = tensor.to(wanted).contiguous()
        state[name] = tensor
    model, report = type(empty).from_pretrained(
        None, config=config, state_dict=state, dtype=wanted, output_loading_info=True
    )
    for key in ("missing_keys", "mismatched_keys"):
        if report[key]:
            raise InputError(f"{key.replace('_', ' ')}: {sorted(map(str, report[key]))[0]}", "the files are damaged")
    found: nn.Module = model.to(device).eval()
    parameters = dict(found.named_parameters())
    # the file may leave a prefix of a name out
    module_of = {n: p for n in reader.row_major for p in parameters if p == n or p.endswith("." + n)}
    for weight, parameter in module_of.items():
        reader.attach(weight, found.get_submodule(parameter.rpartition(".")[0]))
    reader.prepare(found, module_of)
    return found
