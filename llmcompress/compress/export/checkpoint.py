"""A checkpoint as an export sees it: tensors by name, and the codes of those that are packed."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmcompress.compress.shards import index_document, write_shard
from llmcompress.errors import InputError
from llmcompress.files import commit_json
from llmcompress.hub.source import Source
from llmcompress.kernels.codes import Codes
from llmcompress.kernels.stored import Layout
from llmcompress.model.checkpoint import DTYPE_NAMES
from llmcompress.model.skeleton import Skeleton
from llmcompress.preflight.weights import INDEX_NAME, SINGLE_NAME
from llmcompress.runtime.adapter import AdaptedReader, reader_of
from llmcompress.runtime.packed import PackedReader
from llmcompress.runtime.targets import block_of_expert
from llmcompress.spec import LinearSpec

TO_BF16 = "export it to bf16, which holds every weight"


@dataclass(frozen=True)
class Options:
    """What the user chose; None where nothing.

    dtype   bf16, gguf: of every tensor that is not packed, `bfloat16`, `float16` or `float32`
    kind    bnb: `nf4`, `fp4` or `int8`
    double  bnb: whether scales are quantized once more
    requantize   gguf: what packed weights become that have no type of their own, `q4_0`, `q5_0` or `q8_0`
    calibration  gguf: text on which inputs of linears are seen, which weighs what is requantized
    checkpoint_format  gptq: `gptq` (version 1) or `gptq_v2`
    """

    dtype: str | None = None
    kind: str | None = None
    double: bool | None = None
    requantize: str | None = None
    calibration: str | None = None
    checkpoint_format: str | None = None


@dataclass(frozen=True)
class Written:
    """What an export wrote.

    errors  how far a weight is meant to be from what the checkpoint says, `|difference| / |weight|`, by tensor
    types   what a weight became, in words, by tensor
    notes   what the user should know besides
    """

    errors: dict[str, float] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of ours, or a plain one, and what it is called."""

    skeleton: Skeleton
    name: str

    @classmethod
    def open(cls, source: Source) -> Self:
        """Validate and open a model. Raises InputError, also where activations are rounded: no export says so."""
        found = cls(Skeleton.open(source.path, decode=reader_of(source.path)), source.name)
        reader = found.skeleton.reader
        if isinstance(reader, PackedReader):
            if reader.attention:
                raise InputError("keys, values or attention weights are rounded, which no export can say", OURS)
            rounded = next((stem for stem in reader.stems() if reader.spec_of(stem).inputs is not None), None)
            if rounded is not None:
                raise InputError(f"{rounded}: its inputs are rounded, which no export can say", OURS)
        return found

    @property
    def adapted(self) -> bool:
        """Whether an adapter lies beside the packed weights, and is part of what they stand for."""
        return isinstance(self.skeleton.reader, AdaptedReader)

    def _packed(self, name: str) -> PackedReader | None:
        """What reads a tensor, where it is packed."""
        reader = self.skeleton.reader
        return reader if isinstance(reader, PackedReader) and name in reader.row_major else None

    def codes(self, name: str) -> Codes | None:
        """The codes of a weight, None for a tensor that is not packed."""
        reader = self._packed(name)
        return None if reader is None else reader.linear(name.removesuffix(".weight"))

    def spec_of(self, name: str) -> LinearSpec | None:
        """The format of a weight, None for a tensor that is not packed."""
        reader = self._packed(name)
        return None if reader is None else reader.spec_of(name.removesuffix(".weight"))

    def every_code(self) -> Iterator[tuple[str, Codes]]:
        """The packed weights by tensor, one at a time. Raises InputError where an adapter changes them."""
        if self.adapted:
            raise InputError("an adapter lies beside the codes, which cannot be added to them", TO_BF16)
        for name in self.skeleton.reader.names():
            if (codes := self.codes(name)) is not None:
                yield name, codes

    def module_name(self, tensor: str) -> str:
        """Name in the model of the module that a tensor of the file belongs to."""
        return self.skeleton.names.module_of[tensor].rpartition(".")[0]

    def require_linears(self, what: str) -> None:
        """Raises InputError where some packed weight belongs to a module that is not `nn.Linear`."""
        for name, _ in self.every_code():
            kind = type(self.skeleton.model.get_submodule(self.module_name(name)))
            if kind is not nn.Linear:
                raise InputError(f"{name} belongs to a {kind.__name__}, which {what} does not hold", TO_BF16)

    def refuse_experts(self, what: str) -> None:
        """Raises InputError where experts are packed: what reads other formats keeps them fused, and fills the fused
        ones with random numbers where it finds none."""
        stems = (name.removesuffix(".weight") for name in self.skeleton.reader.names() if self._packed(name))
        name = next((stem for stem in stems if block_of_expert(stem) is not None), None)
        if name is not None:
            raise InputError(f"{name}: packed experts, which programs that read {what} do not find", TO_BF16)

    def shards(self) -> dict[str, list[str]]:
        """The tensors of the checkpoint by the shard they lie in."""
        found: dict[str, list[str]] = {}
        for name in self.skeleton.reader.names():
            reader = self._packed(name)
            stored = name if reader is None else reader.parts(name.removesuffix(".weight"))[0]
            found.setdefault(self.skeleton.files.tensors[stored].path.name, []).append(name)
        return dict(sorted(found.items()))

    def linears_left_alone(self, quantized: Mapping[str, object]) -> list[str]:
        """Linears of the model, transposed ones too, that are not among the tensors `quantized`."""
        done = {self.module_name(name) for name in quantized}
        names = (n for n, module in self.skeleton.model.named_modules() if isinstance(module, nn.Linear | Conv1D))
        return sorted(set(names) - done)


OURS = "llmcompress.load opens the checkpoint as it is"


def write_shards(checkpoint: Checkpoint, folder: Path, make: Callable[[str], Mapping[str, Tensor]]) -> None:
    """Write what `make` makes of every tensor, shard by shard under the names they have, and the index."""
    layouts: list[tuple[str, Layout]] = []
    for shard, names in checkpoint.shards().items():
        tensors: dict[str, Tensor] = {}
        for name in names:
            tensors |= make(name)
        layout: Layout = {name: (DTYPE_NAMES[t.dtype], tuple(t.shape)) for name, t in tensors.items()}
        write_shard(folder / shard, layout, tensors)
        layouts.append((shard, layout))
    if [shard for shard, _ in layouts] != [SINGLE_NAME]:
        commit_json(folder / INDEX_NAME, index_document(layouts, checkpoint.skeleton.parameters))


@dataclass(frozen=True)
class Stored:
    """What an export makes of one packed weight: tensors by the ends of their names, what it is called, its error."""

    tensors: Mapping[str, Tensor]
    kind: str
    error: float


def write_packed(checkpoint: Checkpoint, folder: Path, store: Callable[[str, Codes], Stored]) -> Written:
    """`write_shards`, where `store` makes what is written of a packed weight of its codes; others stay as they are."""
    errors: dict[str, float] = {}
    types: dict[str, str] = {}

    def make(name: str) -> dict[str, Tensor]:
        codes = checkpoint.codes(name)
        if codes is None:
            return {name: checkpoint.skeleton.read(name)}
        stored = store(name, codes)
        errors[name], types[name] = stored.error, stored.kind
        stem = name.removesuffix(".weight")
        return {stem + end: tensor for end, tensor in stored.tensors.items()}

    write_shards(checkpoint, folder, make)
    return Written(errors, types)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """`|found - wanted| / |wanted|`, 0 where both are zeros."""
    found, wanted = found.double(), wanted.double()
    difference, size = float((found - wanted).norm()), float(wanted.norm())
    return difference / size if size else difference


def half_scales(scale: Tensor, where: str) -> Tensor:
    """Scales as float16. Raises InputError where one is too large for it."""
    half = scale.to(torch.float16)
    if not torch.isfinite(half).all():
        raise InputError(f"{where}: a scale above 65504, more than float16 holds", TO_BF16)
    return half


def changed_scales(scale: Tensor) -> int:
    """How many scales float16 does not hold exactly: those below 2**-17 that have more digits than it has there."""
    return int((scale.to(torch.float16).double() != scale.double()).sum())
