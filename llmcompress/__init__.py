"""Make a Hugging Face language model small without fooling anyone about what was lost."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmcompress.runtime.load import load as load

__version__ = "0.1.0"

__all__ = ["__version__", "load"]


def __getattr__(name: str) -> Any:
    """`load` needs torch and transformers: it is imported when first asked for."""
    if name == "load":
        return importlib.import_module("llmcompress.runtime.load").load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
