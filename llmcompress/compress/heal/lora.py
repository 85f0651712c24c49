"""Low-rank adapters on the linears of some blocks (LoRA), by the `peft` library.

Where the file holds plain weights, the adapters are added to them; where it holds codes, they stay beside it, in the
layout of peft.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.compress.heal.places import number
from llmcompress.compress.heal.tuning import stored_names
from llmcompress.errors import InputError
from llmcompress.model.checkpoint import TORCH_DTYPES
from llmcompress.model.skeleton import Skeleton
from llmcompress.model.stream import steady_linears
from llmcompress.runtime.packed import PackedReader

ADAPTER = "default"  # what peft calls the only adapter of a model


@dataclass(frozen=True)
class LoraOptions:
    """`rank` of the adapters; they count `alpha / rank` times."""

    rank: int = 32
    alpha: float = 64.0


def peft_library() -> Any:
    """The library. Raises InputError naming the extra where it is missing."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a kernel that nothing here uses
    try:
        import peft  # lazy: an extra, and seconds to import
    except ImportError:
        raise InputError(
            "--method lora needs peft, which is not installed", "pip install 'llmcompress[heal]'"
        ) from None
    return peft


class LoraTuning:
    """Adapters on every linear of some blocks of a loaded model. The first matrix is random, the second zero."""

    def __init__(self, skeleton: Skeleton, blocks: Sequence[int], options: LoraOptions, *, seed: int) -> None:
        peft = peft_library()
        self._skeleton = skeleton
        self.packed = isinstance(skeleton.reader, PackedReader)
        targets = _targets(skeleton, blocks)
        transposed = {not isinstance(skeleton.model.get_submodule(name), nn.Linear) for name in targets}
        self.config = peft.LoraConfig(
            r=options.rank,
            lora_alpha=options.alpha,
            target_modules=sorted(targets),
            fan_in_fan_out=transposed == {True},
            task_type="CAUSAL_LM",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number(seed, "lora"))
            peft.inject_adapter_in_model(self.config, skeleton.model, ADAPTER)
        self._layers: dict[str, Any] = {name: skeleton.model.get_submodule(name) for name in targets}
        self._file_names = targets
        self.trained: dict[int, dict[str, nn.Parameter]] = {index: {} for index in blocks}
        for index in blocks:
            start = skeleton.block_name(index) + "."
            for name in (name for name in targets if name.startswith(start)):
                for part in ("lora_A", "lora_B"):
                    parameter = getattr(self._layers[name], part)[ADAPTER].weight
                    self.trained[index][f"{name}.{part}.weight"] = parameter

    def _dtype(self, name: str) -> torch.dtype:
        """Of the weight in the file, or of adapters beside codes."""
        return (
            torch.bfloat16 if self.packed else TORCH_DTYPES[self._skeleton.files.tensors[self._file_names[name]].dtype]
        )

    def _merged(self, name: str) -> Tensor:
        """A weight with its adapter added, in the dtype of the file."""
        layer = self._layers[name]
        found: Tensor = layer.base_layer.weight.detach() + layer.get_delta_weight(ADAPTER).detach()
        return found.to(self._dtype(name))

    @contextmanager
    def as_stored(self) -> Iterator[None]:
        """The model with merged and rounded weights, or with rounded adapters where they stay beside the file."""
        if self.packed:
            exact = {p: p.data for group in self.trained.values() for p in group.values()}
            try:
                for parameter, data in exact.items():
                    parameter.data = data.bfloat16().float()
                yield
            finally:
                for parameter, data in exact.items():
                    parameter.data = data
            return
        weights = {name: layer.base_layer.weight.data for name, layer in self._layers.items()}
        frozen = [p for group in self.trained.values() for p in group.values() if not p.requires_grad]
        merged = {name: self._merged(name).float() for name in self._layers}
        try:
            for name, layer in self._layers.items():
                layer.base_layer.weight.data = merged[name]
                layer.enable_adapters(False)
            yield
        finally:
            for name, layer in self._layers.items():
                layer.base_layer.weight.data = weights[name]
                layer.enable_adapters(True)  # which lets all of them be trained
            for parameter in frozen:
                parameter.requires_grad_(False)

    def tensors(self) -> dict[str, Tensor]:
        """Merged weights by their names in the file; nothing where the adapters stay beside it."""
        if self.packed:
            return {}
        return {self._file_names[name]: self._merged(name).cpu() for name in self._layers}

    def adapter(self) -> dict[str, Tensor]:
        """The adapters under the names that peft gives them in a file, bfloat16."""
        found = {name: parameter for group in self.trained.values() for name, parameter in group.items()}
        return {f"base_model.model.{name}": p.detach().bfloat16().cpu() for name, p in sorted(found.items())}

    def adapter_config(self) -> dict[str, Any]:
        """What peft's adapter_config.json says of them; the base is named by whoever opens it."""
        document: dict[str, Any] = {}
        for key, value in self.config.to_dict().items():
            document[key] = sorted(value) if isinstance(value, set) else getattr(value, "value", value)
        return document | {"base_model_name_or_path": None, "inference_mode": True}


def _targets(skeleton: Skeleton, blocks: Sequence[int]) -> dict[str, str]:
    """Linears of the blocks and the names of their weights in the file; those that are merged on their way stay out.

    So do experts, which other programs keep fused: an adapter for one of them has no place there. Raises InputError
    where there are none, or where linears round what they read.
    """
    by_parameter = stored_names(skeleton)
    found: dict[str, str] = {}
    for index in blocks:
        for leaf in steady_linears(skeleton.blocks[index]):
            name = f"{skeleton.block_name(index)}.{leaf}"
            weight = by_parameter.get(f"{name}.weight")
            if weight is not None and weight not in skeleton.names.converted:
                found[name] = weight
    if not found:
        raise InputError("no linears in these blocks that an adapter can be put on", "use --method norms")
    reader = skeleton.reader
    if isinstance(reader, PackedReader) and any(
        reader.spec_of(weight.removesuffix(".weight")).inputs is not None
        for weight in found.values()
        if weight in reader.row_major
    ):
        raise InputError("linears of this checkpoint round what they read, adapters do not", "use --method norms")
    return found
