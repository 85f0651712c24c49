"""GGUF: one file for llama.cpp, integer codes as Q4_0, Q5_0 and Q8_0 without loss; Llama, Mistral, Qwen, Gemma.

Everything that is not integers in groups of 32 or more (nf4, codebooks, float8, zero-points between codes) is
dequantized, or with `--requantize` quantized once more, and said so. What else differs between a family and its file
is in `families.py`.
"""

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import torch
from torch import Tensor

from llmcompress.compress.export import ggml
from llmcompress.compress.export.checkpoint import (
    Checkpoint,
    Options,
    Written,
    changed_scales,
    half_scales,
    relative_error,
)
from llmcompress.compress.export.families import Family, apart, family_of, interleaved, ropes_of
from llmcompress.compress.export.requantize import input_energies, rounded
from llmcompress.compress.export.vocabulary import Vocabulary, read_vocabulary
from llmcompress.errors import InputError
from llmcompress.model.skeleton import Skeleton

TITLE = "GGUF"
TAG = "gguf"
LIBRARY = "gguf"
OPTIONS = ("dtype", "requantize", "calibration")
FILE_NAME = "model.gguf"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
ROPE_BASE = 10_000.0


def library() -> ModuleType:
    """The package gguf. Raises InputError where it is not installed."""
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise InputError("export to gguf needs the package gguf", "pip install 'llmcompress[gguf]'") from None


def write(checkpoint: Checkpoint, folder: Path, options: Options) -> Written:
    """The one file. Raises InputError where the format, or this, cannot hold the model."""
    gguf, skeleton = library(), checkpoint.skeleton
    config = skeleton.config
    family = family_of(config)
    vocabulary = read_vocabulary(skeleton.files.folder, int(config.vocab_size))
    if checkpoint.adapted:
        next(checkpoint.every_code())  # says why not
    packer = _Packer(checkpoint, family, options)
    writer = gguf.GGUFWriter(folder / FILE_NAME, family.architecture, use_temp_file=True)
    _describe(writer, config, checkpoint.name, family)
    _describe_tokenizer(writer, config, vocabulary)
    for name in skeleton.reader.names():
        data, kind = packer.packed(name)
        place = family.name_of(skeleton.names.module_of[name])
        writer.add_tensor(place, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with (folder / FILE_NAME).open("rb") as stream:
        os.fsync(stream.fileno())
    return Written(packer.errors, packer.types, tuple(packer.notes()))


class _Packer:
    """Makes the bytes of every tensor, and keeps what became of it and how far it is meant to be off."""

    def __init__(self, checkpoint: Checkpoint, family: Family, options: Options) -> None:
        self._checkpoint, self._family = checkpoint, family
        self._dtype = options.dtype or "bfloat16"
        self._again = None if options.requantize is None else options.requantize.upper()
        if options.calibration is not None and self._again is None:
            raise InputError("--calibration weighs weights that are requantized", "give --requantize q8_0 as well")
        self._energies = None if options.calibration is None else input_energies(checkpoint, options.calibration)
        self.errors: dict[str, float] = {}
        self.types: dict[str, str] = {}
        self._changed, self._requantized, self._dense = 0, 0, 0

    def packed(self, name: str) -> tuple[numpy.ndarray[Any, Any], str]:
        """The bytes of a tensor and its type."""
        codes = self._checkpoint.codes(name)
        found = None if codes is None else ggml.integers_of(codes)
        kind = None if found is None else ggml.type_for(*found)
        if codes is not None and found is not None and kind is not None:
            self._changed += changed_scales(codes.scale)
            return self._integers(name, *found, kind=kind)
        tensor = self._checkpoint.skeleton.read(name)
        if codes is not None and self._again is not None and tensor.shape[1] % ggml.BLOCK == 0:
            self._requantized += 1
            energy = None if self._energies is None else self._energies.of.get(name)
            return self._integers(name, *rounded(tensor.float(), energy, self._again), kind=self._again)
        self._dense += codes is not None
        return self._plain(name, tensor)

    def _turned(self, name: str, rows: Tensor) -> Tensor:
        """Rows in the order of the file."""
        heads = self._family.heads_of(self._checkpoint.skeleton.config, self._parameter(name))
        return rows if heads is None else interleaved(rows, heads)

    def _parameter(self, name: str) -> str:
        return self._checkpoint.skeleton.names.module_of[name]

    def _integers(self, name: str, integers: Tensor, scale: Tensor, *, kind: str) -> tuple[Any, str]:
        half = half_scales(scale, name)
        size = integers.shape[1] // half.shape[1]
        meant = integers.float() * half.float().repeat_interleave(size, 1)
        self.errors[name] = relative_error(meant, self._checkpoint.skeleton.reader.read(name))
        self.types[name] = kind
        return ggml.encode(self._turned(name, integers), self._turned(name, half), kind).numpy(), kind

    def _plain(self, name: str, tensor: Tensor) -> tuple[numpy.ndarray[Any, Any], str]:
        word = "float32" if tensor.ndim == 1 else self._dtype
        offset = self._family.offset_of(self._parameter(name))
        stored = (tensor.float() + offset if offset else tensor).to(DTYPES[word])
        if not torch.isfinite(stored).all():
            raise InputError(f"{name}: a value too large for {word}", "use --dtype bfloat16 or float32")
        self.errors[name] = relative_error(stored.float() - offset, tensor)
        self.types[name] = TYPES[word]
        stored = self._turned(name, stored).contiguous()
        return (stored.view(torch.uint8) if word == "bfloat16" else stored).numpy(), TYPES[word]

    def notes(self) -> Iterator[str]:
        """What the user should know of what became of the weights."""
        if self._changed:
            yield f"{self._changed} scales are too small to be exact in float16."
        if self._dense:
            yield f"{self._dense} quantized linears have no type of their own in GGUF and are dequantized."
        if self._requantized:
            by = "all weights alike" if self._energies is None else f"weighed by inputs on {self._energies.source}"
            yield f"{self._requantized} linears have no type of their own in GGUF: quantized once more, {by}."


def _describe(writer: Any, config: Any, name: str, family: Family) -> None:
    """What the file says of the model."""
    heads = int(config.num_attention_heads)
    size = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    writer.add_name(name)
    writer.add_quantization_version(2)
    writer.add_vocab_size(int(config.vocab_size))
    writer.add_context_length(int(config.max_position_embeddings))
    writer.add_embedding_length(int(config.hidden_size))
    writer.add_block_count(int(config.num_hidden_layers))
    writer.add_feed_forward_length(int(config.intermediate_size))
    writer.add_head_count(heads)
    writer.add_head_count_kv(int(config.num_key_value_heads))
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_rope_dimension_count(size)
    writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
    ropes = ropes_of(config)
    writer.add_rope_freq_base(float(ropes["full_attention"].get("rope_theta", ROPE_BASE)))
    if "sliding_attention" in ropes:
        writer.add_rope_freq_base_swa(float(ropes["sliding_attention"].get("rope_theta", ROPE_BASE)))
    if family.windows:
        writer.add_sliding_window(int(config.sliding_window))
    for cap, add in (
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
    ):
        if (value := getattr(config, cap, None)) is not None:
            add(float(value))


def _describe_tokenizer(writer: Any, config: Any, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.types))
    if vocabulary.model == "gpt2":
        writer.add_token_merges(list(vocabulary.merges))
    else:
        writer.add_token_scores(list(vocabulary.scores))
        writer.add_add_space_prefix(vocabulary.add_space)
    for key, add in (
        ("bos", writer.add_bos_token_id),
        ("eos", writer.add_eos_token_id),
        ("pad", writer.add_pad_token_id),
    ):
        value = getattr(config, f"{key}_token_id", None)
        if (first := value[0] if isinstance(value, list) else value) is not None:
            add(int(first))
    writer.add_add_bos_token(vocabulary.add_bos)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


class GgufReader:
    """The tensors of a file, dequantized by the package gguf, under the names they have in a checkpoint."""

    def __init__(self, path: Path, checkpoint: Checkpoint) -> None:
        self._library = library()
        self._config = checkpoint.skeleton.config
        self._family = family_of(self._config)
        self._parameters = checkpoint.skeleton.names.module_of
        # whatever shape stands in the checkpoint's own files, where its reader unpacks or makes up a weight
        self.made_up: frozenset[str] = getattr(checkpoint.skeleton.reader, "made_up", frozenset())
        self._tensors = {tensor.name: tensor for tensor in self._library.GGUFReader(path).tensors}

    def names(self) -> tuple[str, ...]:
        """The tensors of the checkpoint that the file has."""
        names = self._parameters.items()
        return tuple(name for name, parameter in names if self._family.name_of(parameter) in self._tensors)

    def read(self, name: str) -> Tensor:
        """A tensor in float32."""
        parameter = self._parameters[name]
        tensor = self._tensors[self._family.name_of(parameter)]
        values = self._library.dequantize(tensor.data, tensor.tensor_type)
        found = torch.from_numpy(numpy.array(values, dtype=numpy.float32))
        if offset := self._family.offset_of(parameter):
            return found - offset
        heads = self._family.heads_of(self._config, parameter)
        return found if heads is None else apart(found, heads)


def reopen(checkpoint: Checkpoint, folder: Path) -> Skeleton:
    """The model in the file."""
    return Skeleton(checkpoint.skeleton.files, GgufReader(folder / FILE_NAME, checkpoint))


def available() -> bool:
    """Whether the package that reads the file is installed."""
    try:
        library()
    except InputError:
        return False
    return True


def tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the file by the name it has there, in float32."""
    gguf = library()
    for tensor in gguf.GGUFReader(folder / FILE_NAME).tensors:
        yield (
            tensor.name,
            torch.from_numpy(numpy.array(gguf.dequantize(tensor.data, tensor.tensor_type), numpy.float32)),
        )


def opens_with(folder: Path) -> str:
    """What opens it."""
    return f"llama.cpp and what is built on it open `{FILE_NAME}`; transformers does with `gguf_file=`, dequantized."
