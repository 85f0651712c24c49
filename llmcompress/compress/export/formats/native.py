"""Our own layout: the same codes as `llmcompress.load` keeps them, whatever layout they were written in."""

from pathlib import Path

from torch import Tensor

from llmcompress.compress.export.checkpoint import TO_BF16, Checkpoint, Options, Written, write_shards
from llmcompress.compress.exporters import native
from llmcompress.errors import InputError
from llmcompress.files import commit_json, read_json
from llmcompress.model.skeleton import Decode
from llmcompress.runtime.packed import PackedReader
from llmcompress.spec import LinearSpec
from llmcompress.types import QuantizerOptions

TITLE = native.TITLE
TAG = native.TAG
LIBRARY = native.LIBRARY
OPTIONS = ()


def write(checkpoint: Checkpoint, folder: Path, options: Options) -> Written:
    """Weights and config.json. Raises InputError where nothing or experts are quantized, or with an adapter."""
    specs: dict[str, LinearSpec] = {}
    types: dict[str, str] = {}
    checkpoint.refuse_experts(TITLE)
    if checkpoint.adapted:
        raise InputError("an adapter lies beside the codes, which cannot be added to them", TO_BF16)

    def make(name: str) -> dict[str, Tensor]:
        codes = checkpoint.codes(name)
        if codes is None:
            return {name: checkpoint.skeleton.read(name)}
        specs[checkpoint.module_name(name)] = codes.spec
        types[name] = codes.spec.label
        return native.tensors_of(name, codes)

    write_shards(checkpoint, folder, make)
    if not specs:
        raise InputError("nothing in it is quantized", "quantize it first")
    document = read_json(checkpoint.skeleton.files.folder / "config.json")
    section = native.section(specs, QuantizerOptions(), checkpoint.linears_left_alone(types))
    commit_json(folder / "config.json", document | {"quantization_config": section})
    return Written(types=types)


def decode(folder: Path) -> Decode | None:
    """What shows the files as a plain checkpoint."""
    return PackedReader


def opens_with(folder: Path) -> str:
    """What opens it."""
    return native.opens_with(False)
