"""Triton kernels for NVIDIA GPUs; see `kernels/triton`."""

from llmcompress.kernels.triton import join, linear, part, prepare, why_not

__all__ = ["join", "linear", "part", "prepare", "why_not"]
