"""Make a Hugging Face language model small without fooling anyone about what was lost."""

__version__ = "0.1.0"

__all__ = ["__version__"]
