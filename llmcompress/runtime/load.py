"""`llmcompress.load`: a quantized checkpoint as a transformers model, whatever its layout."""

import re
from pathlib import Path
from threading import Lock
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from llmcompress.errors import InputError
from llmcompress.hub.source import resolve
from llmcompress.preflight import check_source
from llmcompress.runtime.hf import packed_config
from llmcompress.runtime.packed import PackedReader
from llmcompress.runtime.shards import ShardReader
from llmcompress.runtime.skipping import SkipRecord, skip

LOADING = Lock()  # transformers changes its classes while it loads: two at once leave heads untied, for good


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    device_map: Any = None,
    dense: bool = False,
) -> nn.Module:
    """A checkpoint written by llmcompress as a transformers model, ready for inference.

    path        directory of the checkpoint, or org/name[@revision] on the Hub: compressed-tensors, bitsandbytes 4-bit,
                llmcompress's own layout, or a model that is not quantized, some halves of whose blocks
                `prune --sublayers` left out
    dtype       of everything that is not packed, and of what flows; what config.json says, where not given
    device      where the model is put
    device_map  in its place, what accelerate takes: "auto", or modules and their devices
    dense       dequantize while loading: the memory and the speed of the unpacked model, linears with a `weight`

    Weights stay packed, so that the model takes the memory of its file; `save_pretrained` writes the same tensors
    again. Linears whose inputs are rounded round them, and multiply integers where both sides are 8-bit integers.
    Skipped halves of blocks are not computed, and their weights are not in memory.
    An adapter that `heal` left beside the checkpoint is not added: peft opens it over a dense model.
    Raises InputError where the directory is not such a checkpoint, is damaged, or may not be had from the Hub, or there
    is no such device, and MachineError where the way there fails.
    """
    if device_map is None:
        _check_device(device)
    folder = resolve(path).path if isinstance(path, str) else path
    files = check_source(folder, packed=True)
    document = files.config
    record = SkipRecord.of(document)
    packed = "quantization_config" in document or record is None
    with LOADING:
        if dense and packed:
            model, report = _dense(folder, PackedReader(ShardReader(files.paths), document), dtype)
            if record is not None:
                skip(model, record)
            model = model.to(device)
        else:
            if packed:
                PackedReader(ShardReader(files.paths), document)  # refuses what is not ours
            config = packed_config(folder) if packed else AutoConfig.from_pretrained(folder, trust_remote_code=False)
            where = device_map if device_map is not None else None if device == "cpu" else {"": device}
            model, report = _open(folder, config, record, {"dtype": dtype or "auto", "device_map": where})
    if record is not None:
        model.save_pretrained = _refuse_to_save
    for key in ("missing_keys", "mismatched_keys"):
        if report[key]:
            raise InputError(f"{key.replace('_', ' ')}: {sorted(map(str, report[key]))[0]}", "the files are damaged")
    found: nn.Module = model.eval()
    return found


def _check_device(device: str) -> None:
    """Raises InputError before anything is read."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise InputError(f"device {device!r}: no such device", "give cpu, cuda or cuda:0") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device {device!r}: no CUDA device of that name here", "leave device out to use the CPU")


def _open(folder: Path, config: Any, record: SkipRecord | None, options: dict[str, Any]) -> tuple[Any, Any]:
    """A model through transformers' own loader, without its skipped halves, and what transformers says of it."""
    if record is None:
        return transformers.AutoModelForCausalLM.from_pretrained(  # type: ignore[no-any-return]
            folder, config=config, output_loading_info=True, trust_remote_code=False, use_safetensors=True, **options
        )
    with init_empty_weights():
        plain = type(transformers.AutoModelForCausalLM.from_config(config))

    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        plain.__init__(self, *args, **kwargs)
        skip(self, record)

    passed = [rf"^{re.escape(module)}\." for module in (*record.zero, *record.idle)]  # zeros of the file
    known = [*(plain._keys_to_ignore_on_load_unexpected or ()), *passed]
    own = {"__init__": build, "__module__": plain.__module__, "_keys_to_ignore_on_load_unexpected": known}
    shorter: Any = type(plain.__name__, (plain,), own)
    model, report = shorter.from_pretrained(
        folder, config=config, output_loading_info=True, use_safetensors=True, **options
    )
    model.__class__ = plain
    return model, report


def _refuse_to_save(*_: Any, **__: Any) -> None:
    """In place of `save_pretrained`: without the zeros, plain transformers would fill in random numbers."""
    raise InputError("the weights of skipped halves are not in memory", "copy the directory the model was loaded from")


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
        None, config=config, state_dict=state, dtype=wanted, output_loading_info=True, use_safetensors=True
    )
    parameters = dict(model.named_parameters())
    # the file may leave a prefix of a name out
    module_of = {n: p for n in reader.row_major for p in parameters if p == n or p.endswith("." + n)}
    for weight, parameter in module_of.items():
        reader.attach(weight, model.get_submodule(parameter.rpartition(".")[0]))
    reader.prepare(model, module_of)
    return model, report
