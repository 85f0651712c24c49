"""Triton kernels for NVIDIA GPUs; see `kernels/triton`."""

from llmcompress.kernels.triton import linear, prepare, why_not

__all__ = ["linear", "prepare", "why_not"]
