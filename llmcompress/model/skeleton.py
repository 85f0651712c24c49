"""A model without its weights: parameters on the meta device, filled a block at a time.

Names in a checkpoint are not module names: transformers renames and fuses while loading. All
naming goes through transformers' own conversion, and a parameter left on meta is an error.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llmcompress.errors import InputError
from llmcompress.experts import Experts, conversions_of, split_experts
from llmcompress.model.ahead import Direction, ReadAhead
from llmcompress.model.checkpoint import CheckpointReader, RoundingReader, TensorReader
from llmcompress.model.config import explained, read_config
from llmcompress.model.crew import ALONE, Crew
from llmcompress.model.heap import give_back, map_large_tensors
from llmcompress.model.shelf import Shelf
from llmcompress.preflight import SourceFiles, check_source

Decode = Callable[[TensorReader, Mapping[str, Any]], TensorReader]

HARMLESS = re.compile(r"(attn|attention)\.(masked_)?bias$|rotary_emb\.inv_freq$|position_ids$")


@dataclass(frozen=True)
class NameMap:
    """Where each tensor of the file goes in the model."""

    module_of: Mapping[str, str]  # tensor name in the file -> parameter name in the model
    converted: frozenset[str]  # tensor names that are merged or split on their way
    ignored: frozenset[str]


def find_blocks(model: nn.Module, count: int) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks: the one ModuleList of `count` members of one class."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and len({type(m) for m in module}) == 1
    ]
    if len(found) != 1:
        raise InputError(
            f"cannot tell the decoder blocks: {len(found)} lists of {count} equal modules", "report this model family"
        )
    return found[0]


class Skeleton:
    """A causal language model whose blocks are loaded and freed one at a time.

    `blocks[i]` is the i-th decoder block, on meta until `load_block(i)`; everything outside the
    blocks is loaded by `load_rest()`, what tokens enter and leave by alone by `load_entrance()` and `load_exit()`.
    Weights are float32 on `device`, without gradients. Hidden states wait on `shelf`. `crew` are the
    processes that run it together.
    """

    def __init__(self, files: SourceFiles, reader: TensorReader, device: str = "cpu") -> None:
        map_large_tensors()
        self.files = files
        self.reader = reader
        self.device = torch.device(device)
        self.shelf, self.crew = Shelf(), ALONE
        self._direction, self.ahead = Direction(), ReadAhead()
        self.config = read_config(files, tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
        with init_empty_weights(include_buffers=False), explained():
            self.model = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32)
        split_experts(self.model, reader.names())
        for module in self.model.modules():
            if isinstance(module, Experts):
                module.call_all = True
        self.model.eval()
        self.model.requires_grad_(False)
        layers = int(self.config.get_text_config().num_hidden_layers)
        self.blocks_name, self.blocks = find_blocks(self.model, layers)
        self.names = self._map_names()
        self._check_shapes()
        self._check_complete()
        if isinstance(reader, RoundingReader):
            reader.prepare(self.model, self.names.module_of)

    @classmethod
    def open(cls, folder: Path, device: str = "cpu", *, decode: Decode | None = None) -> Self:
        """Validate a model directory and build its skeleton. Raises InputError.

        With `decode` the directory may hold a packed checkpoint, which `decode` shows as a plain one.
        """
        files = check_source(folder, packed=decode is not None)
        reader: TensorReader = CheckpointReader(files.tensors)
        if decode is not None and "quantization_config" in files.config:
            reader = decode(reader, files.config)
        return cls(files, reader, device)

    def _conversions(self) -> tuple[list[WeightRenaming], list[WeightConverter]]:
        mapping = conversions_of(self.model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        return renamings, [entry for entry in mapping if isinstance(entry, WeightConverter)]

    def _map_names(self) -> NameMap:
        renamings, converters = self._conversions()
        state = self.model.state_dict()
        prefix = self.model.base_model_prefix
        module_of, converted, ignored, unknown = {}, set(), set(), []
        for name in self.reader.names():
            target, pattern = rename_source_key(name, renamings, converters, prefix, state)
            if target not in state and name in state:
                target, pattern = name, None
            if target in state:
                module_of[name] = target
                if pattern is not None:
                    converted.add(name)
            elif HARMLESS.search(name) or self._ignored_by_transformers(target):
                ignored.add(name)
            else:
                unknown.append(name)
        if unknown:
            raise InputError(
                f"{len(unknown)} tensor(s) do not belong to a {self.config.model_type} model: {unknown[0]}",
                "config.json and the weights are not of the same model",
            )
        return NameMap(module_of, frozenset(converted), frozenset(ignored))

    def _ignored_by_transformers(self, name: str) -> bool:
        patterns = getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ()
        return any(re.search(pattern, name) for pattern in patterns)

    def _check_shapes(self) -> None:
        """What goes into the model as it stands in the file has the shape the model has for it."""
        state, made_up = self.model.state_dict(), getattr(self.reader, "made_up", ())
        for name, target in self.names.module_of.items():
            entry = self.files.tensors.get(name)
            if entry is None or name in self.names.converted or name in made_up:
                continue
            if entry.shape != tuple(state[target].shape):
                raise InputError(
                    f"tensor {name} is {entry.shape}, {tuple(state[target].shape)} in a model of this config.json",
                    "config.json and the weights are not of the same model",
                )

    def _check_complete(self) -> None:
        """Every parameter must come from the file, be tied to one that does, or be made by a merge."""
        if self.names.converted:
            return  # merged names are only known while loading; `_fill` checks them then
        tied = self.tied()
        given = set(self.names.module_of.values())
        wanted = [name for name, _ in self.model.named_parameters(remove_duplicate=False)]
        missing = [name for name in wanted if name not in given and tied.get(name) not in given]
        if missing:
            raise InputError(
                f"{len(missing)} tensor(s) are missing from the checkpoint: {missing[0]}",
                "transformers would fill these with random numbers; download the model again",
            )

    def tied(self) -> dict[str, str]:
        """Parameters that are another parameter under a second name: name -> the name of the original."""
        return dict(getattr(self.model, "all_tied_weights_keys", None) or {})

    @property
    def parameters(self) -> int:
        """Numbers the model is made of; what is tied counts once, as it is stored and as it lies in memory."""
        tied = self.tied()
        found = self.model.named_parameters(remove_duplicate=False)
        return sum({id(p): p.numel() for name, p in found if name not in tied}.values())

    def block_name(self, index: int) -> str:
        """Module path of block `index`, e.g. `model.layers.3`."""
        return f"{self.blocks_name}.{index}"

    def block_tensors(self, index: int) -> tuple[str, ...]:
        """Names in the file of the tensors of one block."""
        start = self.block_name(index) + "."
        return tuple(name for name, module in self.names.module_of.items() if module.startswith(start))

    def rest_tensors(self) -> tuple[str, ...]:
        """Names in the file of the tensors outside the blocks, ignored ones included."""
        start = self.blocks_name + "."
        inside = {name for name, module in self.names.module_of.items() if module.startswith(start)}
        return tuple(name for name in self.reader.names() if name not in inside)

    def join(self, crew: Crew) -> None:
        """Be run by several processes together, this one's part of it on this skeleton's device."""
        self.crew = crew
        if crew.size > 1:
            crew.device = self.device

    def load_block(self, index: int) -> nn.Module:
        """Fill block `index` and return it, the next one being read meanwhile.

        Raises InputError when a tensor is missing or misshapen.
        """
        self._fill(self.block_tensors(index))
        self._check_filled(self.blocks[index], self.block_name(index))
        following = self._direction.after(index)
        if following is not None and 0 <= following < len(self.blocks):
            tensors = self.files.tensors
            self.ahead.begin(tensors[name] for name in self.block_tensors(following) if name in tensors)
        if isinstance(self.reader, RoundingReader):
            for name in self.block_tensors(index):
                module = self.names.module_of[name].rpartition(".")[0]
                self.reader.attach(name, self.model.get_submodule(module))
        return self.blocks[index]

    def load_rest(self) -> None:
        """Fill everything outside the blocks and tie what is tied. Raises InputError like `load_block`."""
        self._load_outside(None)

    def load_entrance(self) -> None:
        """Fill what lies before the blocks, and whatever else is not the head's."""
        self._load_outside(self.model.get_output_embeddings())

    def load_exit(self) -> None:
        """Fill what lies behind the blocks, and whatever else is not the embedding's."""
        self._load_outside(self.model.get_input_embeddings())

    def _load_outside(self, left_out: nn.Module | None) -> None:
        """What is outside the blocks and not there yet, without the weights of one module that no other shares."""
        give_back()
        tied, given = self.tied(), set(self.names.module_of.values())
        alone = {id(p) for p in left_out.parameters(recurse=False)} if left_out is not None else set()
        state = dict(self.model.named_parameters(remove_duplicate=False))
        apart = {name for name, parameter in state.items() if id(parameter) in alone}
        if any((name in apart) != (original in apart) for name, original in tied.items()):
            apart = set()
        wanted = {n for n in given if n not in apart and (n not in state or state[n].is_meta)}
        self._fill([name for name in self.rest_tensors() if self.names.module_of.get(name) in wanted])
        for name, original in tied.items():
            owner, _, leaf = name.rpartition(".")
            source = self.model.get_parameter(original)
            if not source.is_meta and self.model.get_parameter(name).is_meta:
                setattr(self.model.get_submodule(owner), leaf, source)
        for name, module in self.model.named_children():
            self._check_filled(module, name, skip=(self.blocks, left_out if apart else None))

    def free(self, module: nn.Module) -> None:
        """Give the memory of a module's parameters back."""
        if isinstance(self.reader, RoundingReader):
            self.reader.detach(module)
        for part in module.modules():
            self._free_own(part)
        give_back()

    def free_rest(self) -> None:
        """Give the memory of everything outside the blocks back."""
        inside = {id(part) for part in self.blocks.modules()}
        for part in self.model.modules():
            if id(part) not in inside:
                self._free_own(part)
        give_back()

    @staticmethod
    def _free_own(part: nn.Module) -> None:
        for leaf, parameter in list(part.named_parameters(recurse=False)):
            empty = torch.empty_like(parameter, device="meta")
            setattr(part, leaf, nn.Parameter(empty, requires_grad=False))

    def read(self, name: str) -> Tensor:
        """A tensor of the checkpoint as its module keeps it: packed weights dequantized, `Conv1D` transposed."""
        tensor = self.reader.read(name)
        if name in getattr(self.reader, "row_major", ()):
            module = self.model.get_submodule(self.names.module_of[name].rpartition(".")[0])
            return tensor if isinstance(module, nn.Linear) else tensor.T.contiguous()  # Conv1D keeps (in, out)
        return tensor

    def _read_float(self, name: str) -> Tensor:
        """`read`, in float32 at once where the reader can do that."""
        if name in getattr(self.reader, "row_major", ()):
            return self.read(name)
        return getattr(self.reader, "read_float", self.reader.read)(name)

    def _fill(self, names: Iterable[str]) -> None:
        """Read tensors and put them where they go: as they stand one at a time, what is merged or split together."""
        merged = {}
        for name in names:
            if name in self.names.converted:
                merged[name] = self.read(name)
            else:
                self._put(name, self.names.module_of[name], self._read_float(name))
        if not merged:
            return
        settings = LoadStateDictConfig(
            weight_mapping=conversions_of(self.model),
            dtype=torch.float32,
            device_map={"": self.device},
        )
        info, _ = convert_and_load_state_dict_in_model(self.model, merged, settings)
        wrong = [*info.mismatched_keys, *info.conversion_errors, *info.unexpected_keys]
        if wrong:
            self._misfit(wrong[0][0] if isinstance(wrong[0], tuple) else wrong[0])
        for target in {self.names.module_of[name] for name in merged}:
            self.model.get_parameter(target).requires_grad_(False)

    def _put(self, name: str, target: str, tensor: Tensor) -> None:
        """One tensor of the file in the place of a parameter or buffer."""
        owner, _, leaf = target.rpartition(".")
        module = self.model.get_submodule(owner)
        if getattr(module, leaf).shape != tensor.shape:
            self._misfit(name)
        placed = tensor.to(self.device, torch.float32 if tensor.is_floating_point() else tensor.dtype)
        if leaf in dict(module.named_buffers(recurse=False)):
            setattr(module, leaf, placed)
        else:
            setattr(module, leaf, nn.Parameter(placed, requires_grad=False))

    def _misfit(self, name: str) -> None:
        raise InputError(
            f"tensor {name} does not fit a {self.config.model_type} model of this config.json",
            "config.json and the weights are not of the same model",
        )

    def _check_filled(self, module: nn.Module, where: str, skip: tuple[nn.Module | None, ...] = ()) -> None:
        skipped = {id(p) for part in skip if part is not None for p in part.parameters()}
        for name, parameter in module.named_parameters():
            if parameter.is_meta and id(parameter) not in skipped:
                raise InputError(
                    f"tensor {where}.{name} is missing from the checkpoint",
                    "transformers would fill it with random numbers; download the model again",
                )
