"""GGUF: one file for llama.cpp, integer codes as Q4_0, Q5_0 and Q8_0 without loss; Llama and Mistral.

Everything that is not integers in groups of 32 or more (nf4, codebooks, float8, zero-points between codes) is
dequantized, and said so. Rows of q and k are in another order there: rotary pairs lie side by side.
"""

import importlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import torch
from torch import Tensor

from llmcompress.compress.export import ggml
from llmcompress.compress.export.checkpoint import (
    TO_BF16,
    Checkpoint,
    Options,
    Written,
    changed_scales,
    half_scales,
    relative_error,
)
from llmcompress.compress.export.vocabulary import Vocabulary, read_vocabulary
from llmcompress.errors import InputError
from llmcompress.model.skeleton import Skeleton

TITLE = "GGUF"
TAG = "gguf"
LIBRARY = "gguf"
OPTIONS = ("dtype",)
FILE_NAME = "model.gguf"
FAMILIES = ("llama", "mistral")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
OUTSIDE = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
INSIDE = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def library() -> ModuleType:
    """The package gguf. Raises InputError where it is not installed."""
    try:
        return importlib.import_module("gguf")
    except ImportError:
        raise InputError("export to gguf needs the package gguf", "pip install 'llmcompress[gguf]'") from None


def name_of(parameter: str) -> str:
    """A parameter's name in the file. Raises InputError where there is none."""
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.weight", parameter)
    if parameter in OUTSIDE:
        return OUTSIDE[parameter]
    if found is None or found[2] not in INSIDE:
        raise InputError(f"{parameter}: a Llama in GGUF has no place for it", TO_BF16)
    return f"blk.{found[1]}.{INSIDE[found[2]]}.weight"


def heads_of(config: Any, parameter: str) -> int | None:
    """Heads whose rows are in another order, None for other weights."""
    if parameter.endswith("self_attn.q_proj.weight"):
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if parameter.endswith("self_attn.k_proj.weight") else None


def interleaved(rows: Tensor, heads: int) -> Tensor:
    """Rows with the two halves of each head taken in turn: 0, n / 2, 1, n / 2 + 1, ..."""
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def apart(rows: Tensor, heads: int) -> Tensor:
    """Inverse of `interleaved`."""
    return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _check_family(config: Any) -> None:
    rope = config.rope_parameters or {}
    if config.model_type not in FAMILIES:
        raise InputError(f"a {config.model_type} model: only {' and '.join(FAMILIES)} are exported to GGUF", TO_BF16)
    if getattr(config, "sliding_window", None):
        raise InputError("sliding windows, which a Llama in GGUF does not have", TO_BF16)
    if rope.get("rope_type", "default") != "default":
        raise InputError(f"rotary embeddings of type {rope['rope_type']!r} are not exported to GGUF", TO_BF16)


def write(checkpoint: Checkpoint, folder: Path, options: Options) -> Written:
    """The one file. Raises InputError where the format, or this, cannot hold the model."""
    gguf, skeleton = library(), checkpoint.skeleton
    config = skeleton.config
    _check_family(config)
    vocabulary = read_vocabulary(skeleton.files.folder, int(config.vocab_size))
    errors: dict[str, float] = {}
    types: dict[str, str] = {}
    changed = 0
    writer = gguf.GGUFWriter(folder / FILE_NAME, "llama", use_temp_file=True)
    _describe(writer, config, checkpoint.name)
    _describe_tokenizer(writer, config, vocabulary)
    if checkpoint.adapted:
        next(checkpoint.every_code())  # says why not
    for name in skeleton.reader.names():
        parameter = skeleton.names.module_of[name]
        heads = heads_of(config, parameter)
        data, types[name], errors[name] = _encoded(checkpoint, name, heads, options.dtype or "bfloat16")
        codes = checkpoint.codes(name)
        changed += 0 if codes is None or types[name] not in ggml.HALVES else changed_scales(codes.scale)
        writer.add_tensor(name_of(parameter), data, raw_dtype=gguf.GGMLQuantizationType[types[name]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with (folder / FILE_NAME).open("rb") as stream:
        os.fsync(stream.fileno())
    return Written(errors, types, _notes(checkpoint, types, changed))


def _encoded(
    checkpoint: Checkpoint, name: str, heads: int | None, dtype: str
) -> tuple[numpy.ndarray[Any, Any], str, float]:
    """The bytes of a tensor, its type, and how far it is meant to be off."""
    turn: Callable[[Tensor], Tensor] = (lambda rows: rows) if heads is None else lambda rows: interleaved(rows, heads)
    codes = checkpoint.codes(name)
    found = None if codes is None else ggml.integers_of(codes)
    if codes is not None and found is not None and (kind := ggml.type_for(*found)) is not None:
        half = half_scales(found[1], name)
        size = found[0].shape[1] // half.shape[1]
        meant = found[0].float() * half.float().repeat_interleave(size, 1)
        data = ggml.encode(turn(found[0]), turn(half), kind)
        return data.numpy(), kind, relative_error(meant, codes.dequantize())
    tensor = checkpoint.skeleton.read(name)
    word = "float32" if tensor.ndim == 1 else dtype
    stored = turn(tensor).to(DTYPES[word])
    if not torch.isfinite(stored).all():
        raise InputError(f"{name}: a value too large for {word}", "use --dtype bfloat16 or float32")
    error = relative_error(tensor.to(DTYPES[word]), tensor)
    bytes_ = stored.contiguous().view(torch.uint8).numpy() if word == "bfloat16" else stored.contiguous().numpy()
    return bytes_, TYPES[word], error


def _notes(checkpoint: Checkpoint, types: dict[str, str], changed: int) -> tuple[str, ...]:
    notes = [f"{changed} scales are too small to be exact in float16."] if changed else []
    dense = sum(1 for n, kind in types.items() if kind not in ggml.HALVES and checkpoint.spec_of(n) is not None)
    if dense:
        notes.append(f"{dense} quantized linears have no type of their own in GGUF and are dequantized.")
    return tuple(notes)


def _describe(writer: Any, config: Any, name: str) -> None:
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
    writer.add_rope_freq_base(float((config.rope_parameters or {}).get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))


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
        self._parameters = checkpoint.skeleton.names.module_of
        self._tensors = {tensor.name: tensor for tensor in self._library.GGUFReader(path).tensors}

    def names(self) -> tuple[str, ...]:
        return tuple(name for name, parameter in self._parameters.items() if name_of(parameter) in self._tensors)

    def read(self, name: str) -> Tensor:
        """A tensor in float32."""
        parameter = self._parameters[name]
        tensor = self._tensors[name_of(parameter)]
        values = self._library.dequantize(tensor.data, tensor.tensor_type)
        found = torch.from_numpy(numpy.array(values, dtype=numpy.float32))
        heads = heads_of(self._config, parameter)
        return found if heads is None else apart(found, heads)


def reopen(checkpoint: Checkpoint, folder: Path) -> Skeleton:
    """The model in the file."""
    return Skeleton(checkpoint.skeleton.files, GgufReader(folder / FILE_NAME, checkpoint))


def opens_with(folder: Path) -> str:
    """What opens it."""
    return f"llama.cpp and what is built on it open `{FILE_NAME}`; transformers does with `gguf_file=`, dequantized."
