"""A plain checkpoint: every weight dequantized, in bfloat16, float16 or float32, an adapter added."""

from pathlib import Path

import torch
from torch import Tensor

from llmcompress.compress.export.checkpoint import Checkpoint, Options, Written, relative_error, write_shards
from llmcompress.errors import InputError
from llmcompress.files import commit_json, read_json
from llmcompress.model.skeleton import Decode

TITLE = "plain safetensors"
TAG = "dequantized"
LIBRARY = "transformers"
OPTIONS = ("dtype",)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def write(checkpoint: Checkpoint, folder: Path, options: Options) -> Written:
    """Weights and config.json. Raises InputError where float16 is too small for a weight."""
    word = options.dtype or "bfloat16"
    errors: dict[str, float] = {}

    def make(name: str) -> dict[str, Tensor]:
        tensor = checkpoint.skeleton.read(name)
        if not tensor.is_floating_point():
            return {name: tensor}
        stored = tensor.to(DTYPES[word])
        if not torch.isfinite(stored).all():
            raise InputError(f"{name}: a value too large for {word}", "use --dtype bfloat16 or float32")
        errors[name] = relative_error(stored, tensor)
        return {name: stored}

    write_shards(checkpoint, folder, make)
    document = read_json(checkpoint.skeleton.files.folder / "config.json")
    for key in ("quantization_config", "torch_dtype"):
        document.pop(key, None)
    commit_json(folder / "config.json", document | {"dtype": word})
    return Written(errors, dict.fromkeys(errors, word))


def decode(folder: Path) -> Decode | None:
    """What shows the files as a plain checkpoint: they are one."""
    return None


def opens_with(folder: Path) -> str:
    """What opens it."""
    return "Opens with `AutoModelForCausalLM.from_pretrained` and with every program that reads the original."
