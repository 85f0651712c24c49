"""Packed linears through transformers' own loader. Importing this module registers `quant_method: llmcompress`.

After that, `AutoModelForCausalLM.from_pretrained` opens checkpoints in our own layout. The other layouts have methods
that transformers knows itself; `packed_config(path)` is a config that opens them with packed linears as well.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from llmcompress.errors import InputError
from llmcompress.experts import conversions_of, split_experts, unmerged
from llmcompress.kernels import stored
from llmcompress.runtime.modules import PackedLinear, buffer_name
from llmcompress.runtime.packed import PackedReader
from llmcompress.runtime.shards import ShardReader
from llmcompress.runtime.siblings import introduce
from llmcompress.runtime.skipping import SkipRecord
from llmcompress.runtime.targets import block_of_expert
from llmcompress.runtime.tying import TieRecord, on_one_device, tie_modules
from llmcompress.spec import FOUR_BIT, PER_ROW

METHOD = "llmcompress"
NOT_OURS = "config.json and the shards are not of one run"


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of a checkpoint, kept as it is: what is saved again says what it said before."""

    def __init__(self, section: dict[str, Any] | None = None, **own: Any) -> None:
        self.quant_method = METHOD
        self.section = section if section is not None else own

    def to_dict(self) -> dict[str, Any]:
        """The section as config.json has it."""
        return dict(self.section)


def packed_config(path: str | Path) -> Any:
    """The config of a checkpoint of ours, for `from_pretrained(path, config=...)` with packed linears."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    config.quantization_config = {"quant_method": METHOD, "section": config.quantization_config}
    return config


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts packed linears in place of those that the shards have codes for; transformers fills them."""

    requires_calibration = True  # there is nothing here that quantizes

    def validate_environment(self, *_: Any, **given: Any) -> None:
        """Called again with the map that `auto` stands for, which may spread a model over several devices."""
        if TieRecord.of({"quantization_config": self.quantization_config.to_dict()}) is not None:
            on_one_device(given.get("device_map"))

    def _process_model_before_weight_loading(self, model: nn.Module, **given: Any) -> None:
        files = given.get("checkpoint_files")
        if not files or not all(str(name).endswith(".safetensors") for name in files):
            raise InputError("packed weights are read from safetensors files only", "give a directory or a hub name")
        shards = ShardReader(Path(name) for name in files)
        self._reader = PackedReader(shards, {"quantization_config": self.quantization_config.to_dict()})
        self._names = pack_modules(model, shards, self._reader)
        record = TieRecord.of({"quantization_config": self.quantization_config.to_dict()})
        if record is not None:
            on_one_device(given.get("device_map"))
            tie_modules(model, shards, record, _module_names(model, record.stems))
        self._standing_in = _stand_in(model)

    def _process_model_after_weight_loading(self, model: nn.Module, **given: Any) -> nn.Module:
        for module in self._standing_in:
            del module.weight
        self._reader.prepare(model, {f"{stem}.weight": f"{name}.weight" for stem, name in self._names.items()})
        introduce(model)
        for packed in [module for module in model.modules() if isinstance(module, PackedLinear)]:
            packed.stand_alone()
        del self._reader, self._names, self._standing_in  # the model keeps its quantizer; open files cannot be copied
        return model

    def get_weight_conversions(self) -> list[Any]:
        """Names with dots, which no buffer can have: `weight.absmax` is `weight_absmax` in memory."""
        parts = [part for part in stored.FOUR_BIT_PARTS if part.count(".") > 1]
        return [WeightRenaming(part.lstrip(".").replace(".", r"\."), buffer_name(part)) for part in parts]

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[Any]:
        """Those of the family, but for a merge of experts that are apart."""
        found: list[Any] = super().update_weight_conversions(unmerged(model, weight_conversions), model)
        return found

    def is_serializable(self) -> bool:
        """Yes: buffers are the tensors of the file."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters are: gradients go through."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Yes."""
        return True


def _stand_in(model: nn.Module) -> list[PackedLinear]:
    """Give packed linears a `weight` that transformers takes for filled, and those that got one.

    Families that start weights from the module above a linear (Mamba) ask it for its own before anything is filled.
    """
    found = [m for m in model.modules() if isinstance(m, PackedLinear) and not hasattr(m, "weight")]
    for module in found:
        module.weight = torch.empty(0)
        module.weight._is_hf_initialized = True  # type: ignore[attr-defined]
    return found


def pack_modules(model: Any, shards: ShardReader, reader: PackedReader) -> dict[str, str]:
    """Replace every linear of a model on the meta device that a checkpoint has codes for; their names by stem.

    Experts that have codes are taken apart first. Raises InputError where the model has no such linear, or the tensors
    are not what the format needs.
    """
    if any(block_of_expert(stem) is not None for stem in reader.stems()):
        split_experts(model, reader.names())
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    names = _module_names(model, reader.stems())
    record = SkipRecord.of(model.config.to_dict())
    for stem, name in names.items():
        if record is not None and record.covers(name) and name not in linears:
            continue  # skipped, and nothing is left to fill
        old = linears.get(name)
        if old is None:
            raise InputError(f"{stem}: the model has no linear of this name", "load(path, dense=True) may open it")
        rows, columns = reversed(old.weight.shape) if isinstance(old, Conv1D) else old.weight.shape
        parent, _, leaf = name.rpartition(".")
        new = _outline(stem, shards, reader, (int(rows), int(columns)))
        new.register_parameter("bias", old.bias)
        new._is_hf_initialized = True  # type: ignore[assignment]
        setattr(model.get_submodule(parent), leaf, new)
    for stem, parts in reader.attention.items():
        for part in parts:  # kept so that they are saved again
            module = model.get_submodule(reader.attention_name(stem, names))
            module.register_buffer(buffer_name(part), shards.outline(stem + part))
    return names


def _module_names(model: Any, stems: tuple[str, ...]) -> dict[str, str]:
    """Which module each stem belongs to, renamed as the loader will rename its tensors."""
    known = conversions_of(model)
    renamings = [entry for entry in known if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in known if isinstance(entry, WeightConverter)]
    state = model.state_dict()
    found = {}
    for stem in stems:
        name, converted = rename_source_key(f"{stem}.weight", renamings, converters, model.base_model_prefix, state)
        if converted is not None:
            raise InputError(f"{stem}: transformers merges this weight with others", "use load(path, dense=True)")
        found[stem] = name.removesuffix(".weight")
    return found


def _outline(stem: str, shards: ShardReader, reader: PackedReader, size: tuple[int, int]) -> PackedLinear:
    """A packed linear whose buffers have the dtypes and shapes of the file, and no contents."""
    spec = reader.spec_of(stem)
    if reader.size_of(stem) != size:
        raise InputError(f"{stem}: {reader.size_of(stem)} weights, the model has {size}", NOT_OURS)
    tensors = {part: shards.outline(stem + part) for part in stored.parts_of(spec, size[1])}
    for name, (_, shape) in stored.layout_of(stem, spec, size, "BF16").items():
        part = name.removeprefix(stem)
        found = tuple(tensors[part].shape)
        if part == stored.WEIGHT and spec.kind in PER_ROW:  # flat where strangers are to stop at it
            found, shape = (math.prod(found),), (math.prod(shape),)
        if found != shape and not part.startswith(stored.STATE):
            raise InputError(f"{name}: shape {found}, not {shape}", NOT_OURS)
    made = PackedLinear(spec, tensors, size)
    if spec.kind not in (*FOUR_BIT, *PER_ROW) and stem + stored.WEIGHT in shards.names():
        made.register_buffer("weight", shards.outline(stem + stored.WEIGHT))  # the empty one that stops strangers
    return made
