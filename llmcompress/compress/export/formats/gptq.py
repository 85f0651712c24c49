"""GPTQ: integer codes of 2, 3, 4 or 8 bits as GPTQModel, vLLM and SGLang read them, without loss.

    .qweight  int32 (columns * bits / 32, rows)   codes, packed along columns, dense and little-endian
    .qzeros   int32 (groups, rows * bits / 32)    zero-points, packed along rows; less 1 in version 1 (`gptq`)
    .scales   float16 (groups, rows)
    .g_idx    int32 (columns,)                    the group of each column

A weight is `(code - zero) * scale`. Version 1 cannot say a zero-point of 0, so files with zero-points of their own are
of version 2 (`gptq_v2`) unless version 1 is asked for, which is refused where there is such a zero-point. Widths that
differ from most are in `dynamic`, a table of patterns for names of modules.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcompress import __version__
from llmcompress.compress.export.checkpoint import (
    TO_BF16,
    Checkpoint,
    Options,
    Stored,
    Written,
    changed_scales,
    half_scales,
    relative_error,
    write_packed,
)
from llmcompress.errors import InputError
from llmcompress.files import commit_json, read_json
from llmcompress.kernels import words
from llmcompress.kernels.codes import Codes
from llmcompress.model.checkpoint import TensorReader
from llmcompress.model.skeleton import Decode
from llmcompress.spec import WORD_BITS, ZERO_BITS, LinearSpec

TITLE = "GPTQ"
TAG = "gptq"
LIBRARY = "transformers"
OPTIONS = ("checkpoint_format",)
VERSIONS = {"gptq": 1, "gptq_v2": 2}
WIDTHS = (2, 3, 4, 8)
GROUPS = (16, 32, 64, 128, 256, 512, 1024)
WHOLE_ROW = -1
PARTS = (".qweight", ".qzeros", ".scales", ".g_idx")


@dataclass(frozen=True)
class Layer:
    """How the format says one linear: width, group size (-1 a whole row), and whether zero-points are in the middle."""

    bits: int
    group_size: int
    sym: bool

    @classmethod
    def of(cls, spec: LinearSpec, columns: int) -> "Layer":
        """That of a linear."""
        return cls(spec.bits, WHOLE_ROW if spec.group_size == columns else spec.group_size, spec.kind != "asymmetric")

    def document(self) -> dict[str, Any]:
        """As config.json has it."""
        return {"bits": self.bits, "group_size": self.group_size, "sym": self.sym}


def refusal(spec: LinearSpec, rows: int, columns: int) -> str | None:
    """Why the format cannot hold a linear, None where it can, but for zero-points between codes."""
    if spec.kind not in ("int", "int8", "asymmetric"):
        return f"{spec.label}: not integers in equal steps"
    if spec.high_share:
        return f"{spec.label}: two widths in one linear"
    if spec.rank:
        return f"{spec.label}: a low-rank correction beside the codes"
    if spec.bits not in WIDTHS:
        return f"{spec.bits}-bit codes: the format has 2, 3, 4 and 8 bits"
    if spec.group_size != columns and spec.group_size not in GROUPS:
        return f"groups of {spec.group_size}: the format has whole rows and {', '.join(map(str, GROUPS))}"
    if rows * spec.bits % WORD_BITS or columns * spec.bits % WORD_BITS:
        return f"{rows} x {columns} codes of {spec.bits} bits do not fill words of 32 bits"
    return None


def zeros_of(codes: Codes) -> Tensor | None:
    """The zero-point of every group as a code, uint8 `(rows, groups)`, None where some lie between codes."""
    if codes.zero is None:
        return torch.full(codes.scale.shape, 1 << (codes.spec.bits - 1), dtype=torch.uint8)
    steps = 1 << (ZERO_BITS - codes.spec.bits)
    return None if bool((codes.zero % steps).any()) else codes.zero // steps


def _layers(checkpoint: Checkpoint, version: int | None) -> dict[str, Layer]:
    """How the format, in a version that was asked for, says every packed weight, by tensor.

    Raises InputError with the reason where it cannot.
    """
    found = {}
    checkpoint.require_linears(TITLE)
    checkpoint.refuse_experts(TITLE)
    for name, codes in checkpoint.every_code():
        rows, columns = codes.codes.shape
        why = refusal(codes.spec, rows, columns)
        zeros = None if why is not None else zeros_of(codes)
        if why is None and zeros is None:
            why = f"{codes.spec.label}: zero-points that lie between codes"
        if zeros is not None and version == 1 and bool((zeros == 0).any()):
            raise InputError(
                f"{name}: a zero-point of 0, which version 1 cannot say", "--checkpoint-format gptq_v2 can"
            )
        if why is not None:
            raise InputError(f"{name} cannot be said in GPTQ: {why}", f"{TO_BF16}; or quantize with {ADVICE}")
        found[name] = Layer.of(codes.spec, columns)
    if not found:
        raise InputError("nothing in it is quantized", "quantize it first, with " + ADVICE)
    return found


ADVICE = "--set plan.bits=[2,3,4,8] and a quantizer of symmetric integers"


def tensors_of(codes: Codes, *, version: int) -> dict[str, Tensor]:
    """The four tensors of a linear by the ends of their names. `codes.scale` is float16; version 1 has no zero of 0."""
    zeros, bits, columns = zeros_of(codes), codes.spec.bits, codes.codes.shape[1]
    if zeros is None:
        raise InputError("zero-points that lie between codes", TO_BF16)
    said = zeros - (2 - version)
    size = columns // codes.scale.shape[1]
    return {
        ".qweight": words.pack(codes.codes, bits).T.contiguous(),
        ".qzeros": words.pack(said.T.contiguous(), bits),
        ".scales": codes.scale.T.contiguous(),
        ".g_idx": torch.arange(columns, dtype=torch.int32) // size,
    }


def write(checkpoint: Checkpoint, folder: Path, options: Options) -> Written:
    """Weights and config.json. Raises InputError where the format cannot hold them."""
    asked = None if options.checkpoint_format is None else VERSIONS[options.checkpoint_format]
    layers = _layers(checkpoint, asked)
    version = asked or (1 if all(layer.sym for layer in layers.values()) else 2)
    changed = 0

    def store(name: str, codes: Codes) -> Stored:
        nonlocal changed
        half = replace(codes, scale=half_scales(codes.scale, name))
        changed += changed_scales(codes.scale)
        error = relative_error(half.dequantize(), codes.dequantize())
        return Stored(tensors_of(half, version=version), f"{codes.spec.bits} bits", error)

    written = write_packed(checkpoint, folder, store)
    document = read_json(checkpoint.skeleton.files.folder / "config.json")
    commit_json(folder / "config.json", document | {"quantization_config": _section(checkpoint, layers, version)})
    notes = [f"{changed} scales are too small to be exact in float16."] if changed else []
    if len(set(layers.values())) > 1:
        notes.append("Formats differ between linears (`dynamic`), which plain transformers does not read.")
    return replace(written, notes=tuple(notes))


def _section(checkpoint: Checkpoint, layers: Mapping[str, Layer], version: int) -> dict[str, Any]:
    """The `quantization_config`: the commonest format at the top, others by exact names in `dynamic`."""
    usual = Counter(layers.values()).most_common(1)[0][0]
    modules = {checkpoint.module_name(name): layer for name, layer in layers.items()}
    inside = checkpoint.skeleton.blocks_name + "."  # what lies outside is left alone without saying
    alone = (name for name in checkpoint.linears_left_alone(layers) if name.startswith(inside))
    dynamic: dict[str, Any] = {f"-:^{re.escape(name)}$": {} for name in alone}
    for name, layer in sorted(modules.items()):
        if layer != usual:
            dynamic[f"+:^{re.escape(name)}$"] = layer.document()
    word = "gptq" if version == 1 else "gptq_v2"
    return {
        "quant_method": "gptq",
        **usual.document(),
        "desc_act": False,
        "lm_head": "lm_head" in modules,
        "checkpoint_format": word,
        "format": word,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"llmcompress:{__version__}"]},
        **({"dynamic": dynamic} if dynamic else {}),
    }


class GptqReader:
    """A reader that hides the tensors of the format and shows the weights they stand for."""

    def __init__(self, base: TensorReader, config: Mapping[str, Any]) -> None:
        self._base = base
        section = config["quantization_config"]
        self._first = 1 if section["checkpoint_format"] == "gptq" else 0  # what zero-points are short of
        stems = [name.removesuffix(PARTS[0]) for name in base.names() if name.endswith(PARTS[0])]
        hidden = {stem + part for stem in stems for part in PARTS}
        self.row_major = frozenset(f"{stem}.weight" for stem in stems)
        self._names = (*(name for name in base.names() if name not in hidden), *sorted(self.row_major))

    def names(self) -> tuple[str, ...]:
        return self._names

    def read(self, name: str) -> Tensor:
        """A tensor as stored, or a weight dequantized to float32."""
        if name not in self.row_major:
            return self._base.read(name)
        stem = name.removesuffix(".weight")
        packed, packed_zeros, scales, group = (self._base.read(stem + part) for part in PARTS)
        columns, rows = len(group), scales.shape[1]
        bits = packed.shape[0] * WORD_BITS // columns
        codes = words.unpack(packed.T.contiguous(), bits, columns).T.int()
        zeros = words.unpack(packed_zeros, bits, rows).int() + self._first
        return ((codes - zeros[group]).float() * scales.float()[group]).T.contiguous()


def decode(folder: Path) -> Decode | None:
    """What shows the files as a plain checkpoint."""
    return GptqReader


def opens_with(folder: Path) -> str:
    """What opens it."""
    section = read_json(folder / "config.json")["quantization_config"]
    mixed = any(pattern.startswith("+") for pattern in section.get("dynamic", {}))
    plain = (
        "Plain transformers refuses it, because widths differ."
        if mixed
        else "Plain transformers needs gptqmodel and optimum."
    )
    return f"`GPTQModel.load` opens it; vLLM and SGLang read 4 and 8 bits. {plain}"
