"""Make a Hugging Face language model small without fooling anyone about what was lost."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmcompress.runtime.adapting import lora as lora
    from llmcompress.runtime.load import load as load

__version__ = "0.1.0"

__all__ = ["__version__", "load", "lora"]


def __getattr__(name: str) -> Any:
    """Both need torch and transformers: they are imported when first asked for."""
    if name == "load":
        return importlib.import_module("llmcompress.runtime.load").load
    if name == "lora":
        return importlib.import_module("llmcompress.runtime.adapting").lora
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
