"""`llmcompress.load`: a quantized checkpoint as a transformers model, whatever its layout."""

from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers.pytorch_utils import Conv1D

from llmcompress.errors import InputError
from llmcompress.runtime.hf import packed_config
from llmcompress.runtime.packed import PackedReader
from llmcompress.runtime.shards import ShardReader, read_document, shards_of


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    device_map: Any = None,
    dense: bool = False,
) -> nn.Module:
    """A checkpoint written by llmcompress as a transformers model, ready for inference.

    path        directory of the checkpoint: compressed-tensors, bitsandbytes 4-bit, or llmcompress's own layout
    dtype       of everything that is not packed, and of what flows; what config.json says, where not given
    device      where the model is put
    device_map  in its place, what accelerate takes: "auto", or modules and their devices
    dense       dequantize while loading: the memory and the speed of the unpacked model, linears with a `weight`

    Weights stay packed, so that the model takes the memory of its file; `save_pretrained` writes the same tensors
    again. Linears whose inputs are rounded round them, and multiply integers where both sides are 8-bit integers.
    Raises InputError where the directory is not such a checkpoint, or is damaged.
    """
    folder = Path(path)
    document = read_document(folder / "config.json")
    shards = ShardReader(shards_of(folder))
    reader = PackedReader(shards, document)
    if dense:
        model, report = _dense(folder, reader, dtype)
        model = model.to(device)
    else:
        where = device_map if device_map is not None else None if device == "cpu" else {"": device}
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder, config=packed_config(folder), dtype=dtype or "auto", device_map=where, output_loading_info=True
        )
    for key in ("missing_keys", "mismatched_keys"):
        if report[key]:
            raise InputError(f"{key.replace('_', ' ')}: {sorted(map(str, report[key]))[0]}", "the files are damaged")
    found: nn.Module = model.eval()
    return found


def _dense(folder: Path, reader: PackedReader, dtype: torch.dtype | None) -> tuple[Any, Any]:
    """The model with its weights dequantized, and what transformers says of it."""
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
    parameters = dict(model.named_parameters())
    # the file may leave a prefix of a name out
    module_of = {n: p for n in reader.row_major for p in parameters if p == n or p.endswith("." + n)}
    for weight, parameter in module_of.items():
        reader.attach(weight, model.get_submodule(parameter.rpartition(".")[0]))
    reader.prepare(model, module_of)
    return model, report
