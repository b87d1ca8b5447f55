"""CUDA kernels, compiled by Triton."""
