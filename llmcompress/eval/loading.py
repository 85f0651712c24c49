"""Models as users run them: whole, packed where they are packed."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from llmcompress.errors import InputError
from llmcompress.preflight import check_source
from llmcompress.runtime.adapter import adapter_bytes
from llmcompress.runtime.load import load


def opened(folder: Path, device: str, dtype: torch.dtype | None = None) -> Any:
    """A model directory as a transformers model: through `llmcompress.load` where it is quantized.

    dtype  of everything that is not packed, and of what flows; what config.json says, where not given

    Raises InputError where a quantized checkpoint is not one that `load` reads, or has an adapter beside it.
    """
    files = check_source(folder, packed=True)
    if adapter_bytes(folder):
        what = f"{folder.name} has an adapter, which sampling, speed and tasks would leave out"
        raise InputError(what, "leave --sweep, --speed and --tasks out")
    if "quantization_config" in files.config:
        return load(folder, dtype=dtype, device=device)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype or "auto", trust_remote_code=False, use_safetensors=True, local_files_only=True
    )
    return model.to(device).eval()


def context_of(model: Any) -> int | None:
    """The most tokens a model reads, where its config says so."""
    found: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found
