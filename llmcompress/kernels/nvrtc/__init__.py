"""CUDA C++ kernels, compiled when first needed by the NVRTC library that CUDA builds of PyTorch bring along."""
