"""bitsandbytes: 4-bit weights in its format are carried over, all others quantized once more to nf4, fp4 or int8.

Quantizing once more adds an error of its own, which is measured and said: `quantize --recipe nf4` from the original is
better. A weight whose rows are not whole blocks of 64 is dequantized to the source's dtype instead.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from llmcompress.compress.export import int8
from llmcompress.compress.export.checkpoint import (
    Checkpoint,
    Options,
    Stored,
    Written,
    relative_error,
    write_packed,
    write_shards,
)
from llmcompress.compress.exporters import bnb
from llmcompress.compress.grid import table_codes, table_format
from llmcompress.errors import InputError
from llmcompress.files import commit_json, parse_json, read_json
from llmcompress.kernels import stored
from llmcompress.kernels.codes import Codes
from llmcompress.model.checkpoint import TORCH_DTYPES
from llmcompress.model.skeleton import Decode
from llmcompress.runtime.packed import PackedReader
from llmcompress.spec import FOUR_BIT, LinearSpec

TITLE = bnb.TITLE
TAG = bnb.TAG
LIBRARY = bnb.LIBRARY
OPTIONS = ("kind", "double")
BETTER = "llmcompress quantize MODEL --recipe nf4 quantizes the original"


def _wanted(checkpoint: Checkpoint, options: Options) -> tuple[Literal["nf4", "fp4"], bool]:
    """The one kind of the file: what was asked for, else what the checkpoint has, else nf4 with scales in 8 bits."""
    every = [spec for name in checkpoint.skeleton.reader.names() if (spec := checkpoint.spec_of(name)) is not None]
    if not every:
        raise InputError("nothing in it is quantized", BETTER)
    usual = next((spec for spec in every if spec.kind in FOUR_BIT), None)
    word = options.kind or (usual.kind if usual is not None else "nf4")
    double = options.double if options.double is not None else usual is None or usual.double
    return "fp4" if word == "fp4" else "nf4", double


def write(checkpoint: Checkpoint, folder: Path, options: Options) -> Written:
    """Weights and config.json. Raises InputError where nothing is quantized."""
    checkpoint.refuse_experts(TITLE)
    if options.kind == "int8":
        if options.double is not None:
            raise InputError("--double is for nf4 and fp4: int8 has one scale per row", "leave it out")
        return _write_rows(checkpoint, folder)
    kind, double = _wanted(checkpoint, options)
    document = read_json(checkpoint.skeleton.files.folder / "config.json")
    errors: dict[str, float] = {}
    types: dict[str, str] = {}
    specs: dict[str, LinearSpec] = {}
    again: set[str] = set()
    dtype = document.get("dtype") or document.get("torch_dtype") or "float32"

    def make(name: str) -> dict[str, Tensor]:
        if checkpoint.spec_of(name) is None:
            return {name: checkpoint.skeleton.read(name)}
        weight = checkpoint.skeleton.reader.read(name)  # with what an adapter adds
        spec = table_format(kind, 4, weight.shape[1], double=double)
        if spec is None:
            dense = _dense_dtype(checkpoint)
            types[name] = f"dequantized, {dense}"
            tensor = checkpoint.skeleton.read(name)
            errors[name] = relative_error(tensor.to(TORCH_DTYPES[dense]), tensor)
            return {name: tensor.to(TORCH_DTYPES[dense])}
        codes = _carried(checkpoint, name, spec)
        if codes is None:
            codes = table_codes(weight, spec)
            again.add(name)
        specs[name], types[name] = spec, f"{kind}{', scales in 8 bits' if double else ''}"
        found = _with_record(stored.tensors_of(name.removesuffix(".weight"), codes), str(dtype))
        errors[name] = relative_error(_as_stored(found, name, spec), weight)
        return found

    write_shards(checkpoint, folder, make)
    if not specs:
        raise InputError("no weight has rows of whole blocks of 64", "export it to bf16")
    section = bnb.section(next(iter(specs.values())), document, checkpoint.linears_left_alone(specs))
    commit_json(folder / "config.json", document | {"quantization_config": section})
    lossy = sum(errors[name] > 0 for name in again)
    return Written(errors, types, (_note(lossy, bool(again)),))


def _note(lossy: int, again: bool) -> str:
    if lossy:
        return f"{lossy} weights were quantized once more; {BETTER}, which loses less."
    return f"Every weight was {'of this kind' if again else 'in this format'} already, and none has changed."


def _write_rows(checkpoint: Checkpoint, folder: Path) -> Written:
    """The same with a byte for each weight and a scale for each row."""
    checkpoint.require_linears(TITLE)
    again = 0

    def store(name: str, codes: Codes) -> Stored:
        nonlocal again
        weight = checkpoint.skeleton.reader.read(name)
        carried = int8.carried(codes)
        again += carried is None
        rows, scale = carried or int8.rows_of(weight)
        error = relative_error(int8.weight_of(rows, scale), weight)
        return Stored(int8.tensors_of("", rows, scale), "int8 rows", error)

    written = write_packed(checkpoint, folder, store)
    if not written.types:
        raise InputError("nothing in it is quantized", BETTER)
    document = read_json(checkpoint.skeleton.files.folder / "config.json")
    section = int8.section(checkpoint.linears_left_alone(written.types))
    commit_json(folder / "config.json", document | {"quantization_config": section})
    notes = [f"{again} weights were quantized once more, to 8 bits by rows."] if again else []
    notes.append("bitsandbytes rounds inputs to 8 bits as well while it runs, which the figures above do not count.")
    return replace(written, notes=tuple(notes))


def _with_record(tensors: dict[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """The tensors of a linear with the record that bitsandbytes writes: no padding, and the dtype of the model."""

    def record(tensor: Tensor) -> Tensor:
        said = parse_json(tensor.numpy().tobytes(), "quant_state") | {"dtype": dtype}
        if "nested_offset" in said:
            said["nested_offset"] = float(torch.tensor(said["nested_offset"], dtype=torch.float32))
        return torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)

    return {name: record(tensor) if stored.STATE in name else tensor for name, tensor in tensors.items()}


def _carried(checkpoint: Checkpoint, name: str, spec: LinearSpec) -> Codes | None:
    """The codes as they are, where they are of this format already and no adapter changes them."""
    return checkpoint.codes(name) if checkpoint.spec_of(name) == spec and not checkpoint.adapted else None


def _as_stored(tensors: dict[str, Tensor], name: str, spec: LinearSpec) -> Tensor:
    """The weight that tensors stand for: the offset of scales is rounded in their record."""
    return stored.codes_of(name.removesuffix(".weight"), spec, lambda part: tensors[part]).dequantize()


def _dense_dtype(checkpoint: Checkpoint) -> str:
    """The commonest dtype of floats in the checkpoint that are no part of a packed weight."""
    entries = checkpoint.skeleton.files.tensors
    plain = (name for name in checkpoint.skeleton.reader.names() if checkpoint.spec_of(name) is None)
    sizes: dict[str, int] = {}
    for entry in (entries[name] for name in plain):
        if TORCH_DTYPES[entry.dtype].is_floating_point:
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.elements
    return max(sizes, key=sizes.__getitem__, default="BF16")


def decode(folder: Path) -> Decode | None:
    """What shows the files as a plain checkpoint."""
    rows = read_json(folder / "config.json")["quantization_config"]["load_in_8bit"]
    return int8.Int8Reader if rows else PackedReader


def opens_with(folder: Path) -> str:
    """What opens it."""
    return bnb.opens_with(False)
