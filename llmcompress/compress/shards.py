"""Which tensor goes into which shard, what a shard weighs before it exists, and writing one.

Shard 1 holds everything outside the blocks, shard `i + 2` holds block `i`; a head that is to be quantized
has the last shard to itself. Their number is known from the start, so every shard is written once, under
its final name.
"""

import hashlib
import json
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from llmcompress.compress.attention import attention_layout
from llmcompress.compress.formats import exporter_of
from llmcompress.files import commit_pieces
from llmcompress.kernels.stored import Layout as Layout
from llmcompress.model.checkpoint import read_tensor
from llmcompress.model.skeleton import Skeleton
from llmcompress.preflight.header import DTYPE_BYTES, TensorEntry
from llmcompress.types import LinearInfo, LinearSpec, ModelTrace, QuantizerOptions

INDEX_NAME = "model.safetensors.index.json"


@dataclass(frozen=True)
class ShardMap:
    """The tensors of the source by the shard of the output they end up in, `[0]` for outside the blocks.

    `head` is the head where it is to be quantized: its weight is then the one tensor of the last shard. `options` say
    what is rounded inside attention, and `attention` which tensors that adds to each shard.
    """

    shards: tuple[tuple[str, ...], ...]
    entries: Mapping[str, TensorEntry]
    linears: Mapping[str, LinearInfo]  # by the name of their weight in the file
    scale_dtype: str
    head: LinearInfo | None = None
    options: QuantizerOptions = field(default_factory=QuantizerOptions)
    attention: Mapping[int, Layout] = field(default_factory=dict)

    def name(self, shard: int) -> str:
        """File name of a shard."""
        return f"model-{shard + 1:05d}-of-{len(self.shards):05d}.safetensors"

    def layout(self, shard: int, specs: Mapping[str, LinearSpec], left: Container[str] = ()) -> Layout:
        """Dtype and shape of every tensor of one shard.

        `specs`, by linear name, are those of the whole checkpoint, which decide its layout; absent ones are copied,
        and those `left` out after all.
        """
        found = dict(self.attention.get(shard, {}))
        experts = any(x.expert is not None and x.name in specs for x in self.linears.values())
        exporter = exporter_of(specs.values(), self.options, experts=experts)
        for tensor in self.shards[shard]:
            linear = self.linears.get(tensor)
            if linear is not None and linear.name in specs and linear.name not in left:
                found |= exporter.packed_layout(linear, specs[linear.name], self.scale_dtype)
            else:
                entry = self.entries[tensor]
                found[tensor] = (entry.dtype, entry.shape)
        return found

    def file_bytes(self, specs: Mapping[str, LinearSpec], left: Container[str] = ()) -> int:
        """Exact total size of all shards for an allocation; `left` as in `layout`."""
        return sum(shard_bytes(self.layout(shard, specs, left)) for shard in range(len(self.shards)))


def shard_map(
    skeleton: Skeleton,
    trace: ModelTrace,
    scale_dtype: str,
    *,
    quantized: Container[str] = (),
    options: QuantizerOptions | None = None,
) -> ShardMap:
    """Assign the source's tensors to shards; `quantized` names linears, and matters for the head alone."""
    options = options or QuantizerOptions()
    attention = attention_layout(skeleton, trace, options, scale_dtype)
    rest = skeleton.rest_tensors()
    blocks = tuple(skeleton.block_tensors(index) for index in range(len(skeleton.blocks)))
    linears = {linear.tensor: linear for linear in trace.every}
    head = trace.head
    if head is None or head.name not in quantized:
        return ShardMap(
            (rest, *blocks), skeleton.files.tensors, linears, scale_dtype, options=options, attention=attention
        )
    others = tuple(name for name in rest if name != head.tensor)
    shards = (others, *blocks, (head.tensor,))
    return ShardMap(shards, skeleton.files.tensors, linears, scale_dtype, head, options, attention)


def scale_dtype(tensors: Mapping[str, TensorEntry]) -> str:
    """The dtype of scales: that of most tensors of the source where it is float16, bfloat16 otherwise."""
    halves = sum(1 for entry in tensors.values() if entry.dtype == "F16")
    return "F16" if halves * 2 > len(tensors) else "BF16"


def _elements(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def shard_header(layout: Layout) -> tuple[bytes, tuple[str, ...]]:
    """The first bytes of a safetensors file with these tensors, and the order of its payload.

    Payload is ordered by alignment, widest first, then by name; the header is padded to 8 bytes.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    order = tuple(sorted(layout, key=lambda name: (-DTYPE_BYTES[layout[name][0]], name)))
    position = 0
    for name in order:
        dtype, shape = layout[name]
        stop = position + _elements(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order


def shard_bytes(layout: Layout) -> int:
    """Exact size of a safetensors file with these tensors."""
    return len(shard_header(layout)[0]) + sum(_elements(shape) * DTYPE_BYTES[d] for d, shape in layout.values())


def _raw(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def write_shard(path: Path, layout: Layout, tensors: Mapping[str, Tensor | TensorEntry]) -> str:
    """Write the tensors of `layout` durably; returns the sha256 of the file.

    Entries of a source are read when it is their turn, and let go. Raises InputError where one has NaN or infinity.
    """
    header, order = shard_header(layout)
    state = hashlib.sha256()

    def pieces() -> Iterator[memoryview]:
        yield memoryview(header)
        for name in order:
            tensor = tensors[name]
            yield _raw(read_tensor(tensor) if isinstance(tensor, TensorEntry) else tensor)

    def hashed() -> Iterator[memoryview]:
        for piece in pieces():
            state.update(piece)
            yield piece

    commit_pieces(path, hashed())
    return state.hexdigest()


def index_document(shards: Iterable[tuple[str, Layout]], parameters: int) -> dict[str, object]:
    """The index: which shard holds each tensor, with the totals readers expect."""
    weight_map: dict[str, str] = {}
    total = 0
    for name, layout in shards:
        for tensor, (dtype, shape) in layout.items():
            weight_map[tensor] = name
            total += _elements(shape) * DTYPE_BYTES[dtype]
    return {
        "metadata": {"total_parameters": parameters, "total_size": total},
        "weight_map": dict(sorted(weight_map.items())),
    }


def outside_linears(skeleton: Skeleton) -> tuple[str, ...]:
    """Linears outside the blocks, the head among them: left alone and named so in config.json, unless planned."""
    inside = {id(module) for module in skeleton.blocks.modules()}
    return tuple(
        name
        for name, module in skeleton.model.named_modules()
        if isinstance(module, nn.Linear) and id(module) not in inside
    )
