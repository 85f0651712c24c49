"""What is trained: norm gains, quantization scales and corrections of tied blocks here, adapters in `lora.py`.

A tuning knows its trainable numbers by block, how the model looks once they are stored in a file (in the file's own
dtypes), and which tensors of the file that changes. Held-out text always judges the stored form.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from llmcompress.errors import InputError
from llmcompress.kernels import stored
from llmcompress.kernels.codes import Codes
from llmcompress.model.checkpoint import TORCH_DTYPES
from llmcompress.model.skeleton import Skeleton
from llmcompress.runtime.inputs import attach
from llmcompress.runtime.packed import PackedReader
from llmcompress.runtime.skipping import SkipRecord
from llmcompress.spec import FOUR_BIT

OUTSIDE = -1  # stands for what lies outside the blocks
NOT_NORMS = (nn.Linear, nn.Embedding)


class Tuning(Protocol):
    """Trainable numbers of a loaded model; those under `OUTSIDE` are trained all the time."""

    @property
    def trained(self) -> Mapping[int, Mapping[str, nn.Parameter]]: ...

    def as_stored(self) -> AbstractContextManager[None]: ...

    def tensors(self) -> dict[str, Tensor]: ...


class Scaled(nn.Module):
    """A weight as a function of gains `(rows, groups)` on its scales; `unit` is the weight where every scale is one.

    A low-rank correction is added as it is.

    While `stored` is set, those scales count instead, which are what a file would hold.
    """

    def __init__(self, codes: Codes, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed
        self.stored: Tensor | None = None
        self.correction: Tensor | None
        self.scale = nn.Buffer(codes.scale.float(), persistent=False)
        bare = replace(codes, scale=torch.ones_like(self.scale), up=None, down=None)
        self.unit = nn.Buffer(bare.dequantize(), persistent=False)
        self.register_buffer("correction", codes.correction(), persistent=False)

    def forward(self, gain: Tensor) -> Tensor:
        """The weight of the module."""
        scale = self.scale * gain if self.stored is None else self.stored
        grouped = self.unit.view(*scale.shape, -1) * scale.unsqueeze(-1)
        weight = grouped.view(self.unit.shape)
        weight = weight if self.correction is None else weight + self.correction
        return weight.T if self.transposed else weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        """A gain of one everywhere, whatever the weight."""
        return torch.ones_like(self.scale)


class Corrected(nn.Module):
    """The weight of a tied linear as a function of its factors; `shared` stays as it is."""

    def __init__(self, shared: Tensor, factors: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.shared = nn.Buffer(shared.float(), persistent=False)
        self._begun = tuple(factor.float() for factor in factors)

    def forward(self, up: Tensor, down: Tensor) -> Tensor:
        """The weight of the module."""
        return self.shared + up @ down

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The factors of the file, whatever the weight."""
        up, down = (factor.to(weight.device) for factor in self._begun)
        return up, down


def has_scales(codes: Codes) -> bool:
    """Whether the weight of a linear is proportional to scales that the file holds, group by group."""
    return codes.spec.kind not in FOUR_BIT and codes.codebook is None


class NormTuning:
    """Weights and biases of norms in some blocks and after the last, and in the blocks the scales of packed linears and
    the low-rank corrections of tied ones.

    The numbers trained are float32; those of the file keep their dtypes.
    """

    def __init__(self, skeleton: Skeleton, blocks: Sequence[int]) -> None:
        self._skeleton = skeleton
        self._names: dict[nn.Parameter, str] = {}  # in the file
        self._scaled: dict[nn.Parameter, Scaled] = {}
        by_parameter = stored_names(skeleton)
        self.trained: dict[int, dict[str, nn.Parameter]] = {}
        for index in blocks:
            prefix = skeleton.block_name(index)
            found = self._norms(skeleton.blocks[index], prefix, by_parameter)
            self.trained[index] = found | self._scales(skeleton.blocks[index], prefix, by_parameter)
            self.trained[index] |= self._factors(skeleton.blocks[index], prefix, by_parameter)
        outside = _outside_norms(skeleton)
        self.trained[OUTSIDE] = {}
        for name, module in outside.items():
            self.trained[OUTSIDE] |= self._norms(module, name, by_parameter)
        if not any(self.trained.values()):
            raise InputError("no norms and no scales to tune in these blocks", "use --method lora")

    def _norms(self, root: nn.Module, prefix: str, by_parameter: Mapping[str, str]) -> dict[str, nn.Parameter]:
        found = {}
        for name, parameter in _norm_parameters(root, prefix):
            if name in by_parameter:
                parameter.requires_grad_(True)
                self._names[parameter] = by_parameter[name]
                found[name] = parameter
        return found

    def _scales(self, block: nn.Module, prefix: str, by_parameter: Mapping[str, str]) -> dict[str, nn.Parameter]:
        reader, found = self._skeleton.reader, {}
        if not isinstance(reader, PackedReader):
            return {}
        for name, module in list(block.named_modules(prefix=prefix)):
            weight = by_parameter.get(f"{name}.weight", "")
            if weight not in reader.row_major:
                continue
            stem = weight.removesuffix(".weight")
            codes = reader.linear(stem)
            if has_scales(codes):
                scaled = Scaled(codes, transposed=not isinstance(module, nn.Linear)).to(self._skeleton.device)
                parametrize.register_parametrization(module, "weight", scaled, unsafe=True)
                parameter = module.parametrizations.weight.original
                parameter.requires_grad_(True)
                self._names[parameter], self._scaled[parameter] = stem + stored.SCALE, scaled
                found[f"{name}.scale"] = parameter
        return found

    def _factors(self, block: nn.Module, prefix: str, by_parameter: Mapping[str, str]) -> dict[str, nn.Parameter]:
        reader, found = self._skeleton.reader, {}
        if not isinstance(reader, PackedReader) or reader.tied is None:
            return {}
        for name, module in list(block.named_modules(prefix=prefix)):
            stem = by_parameter.get(f"{name}.weight", "").removesuffix(stored.WEIGHT)
            if stem not in reader.tied.with_factors:
                continue
            weight = Corrected(reader.tied.shared(stem), reader.tied.factors(stem)).to(self._skeleton.device)
            parametrize.register_parametrization(module, "weight", weight)
            for part, leaf in ((stored.UP, "original0"), (stored.DOWN, "original1")):
                parameter = getattr(module.parametrizations.weight, leaf)
                parameter.requires_grad_(True)
                self._names[parameter] = stem + part
                found[name + part.removeprefix(stored.WEIGHT)] = parameter
        return found

    def _rounded(self, parameter: nn.Parameter) -> Tensor:
        """What the file holds for a parameter: itself, or the scales that it is the gain of."""
        exact, scaled = parameter.detach(), self._scaled.get(parameter)
        exact = exact if scaled is None else scaled.scale * exact
        return exact.to(TORCH_DTYPES[self._skeleton.files.tensors[self._names[parameter]].dtype])

    @contextmanager
    def as_stored(self) -> Iterator[None]:
        """The model with its trained numbers rounded to the dtypes of the file."""
        norms = {parameter: parameter.data for parameter in self._names if parameter not in self._scaled}
        try:
            for parameter in norms:
                parameter.data = self._rounded(parameter).float()
            for parameter, scaled in self._scaled.items():
                scaled.stored = self._rounded(parameter).float()
            yield
        finally:
            for parameter, data in norms.items():
                parameter.data = data
            for scaled in self._scaled.values():
                scaled.stored = None

    def tensors(self) -> dict[str, Tensor]:
        """The trained tensors as the file holds them, by their names in it."""
        shapes = self._skeleton.files.tensors
        return {name: self._rounded(p).cpu().view(shapes[name].shape) for p, name in self._names.items()}


def stored_names(skeleton: Skeleton) -> dict[str, str]:
    """Names in the file by those of parameters; skipped halves of blocks are zeros, stay so, and are left out."""
    record, names = SkipRecord.of(skeleton.files.config), skeleton.names.module_of
    return {module: name for name, module in names.items() if record is None or not record.covers(module)}


def by_name(trained: Mapping[int, Mapping[str, nn.Parameter]], blocks: Iterable[int]) -> dict[str, nn.Parameter]:
    """The trainable numbers of some blocks, and of what lies outside them, in a fixed order."""
    return {name: p for index in sorted({OUTSIDE, *blocks}) for name, p in sorted(trained.get(index, {}).items())}


def _norm_parameters(root: nn.Module, prefix: str) -> list[tuple[str, nn.Parameter]]:
    """Parameters of modules that have nothing but vectors, and are no linears or embeddings."""
    found = []
    for name, module in root.named_modules(prefix=prefix):
        own = list(module.named_parameters(recurse=False))
        if own and all(p.ndim == 1 for _, p in own) and not isinstance(module, NOT_NORMS):
            found += [(f"{name}.{leaf}", parameter) for leaf, parameter in own]
    return found


def _outside_norms(skeleton: Skeleton) -> dict[str, nn.Module]:
    """Modules outside the blocks, without their children's blocks: the final norm is among them."""
    inside = {id(module) for module in skeleton.blocks.modules()}
    return {
        name: module
        for name, module in skeleton.model.named_modules()
        if id(module) not in inside and not list(module.children())
    }


def gradients_pass(skeleton: Skeleton) -> None:
    """Let gradients through linears that multiply integers: their inputs are rounded, their products are float32."""
    reader = skeleton.reader
    if not isinstance(reader, PackedReader):
        return
    for weight in reader.row_major:
        inputs = reader.linear(weight.removesuffix(".weight")).inputs
        if inputs is not None:
            attach(skeleton.model.get_submodule(skeleton.names.module_of[weight].rpartition(".")[0]), inputs)
