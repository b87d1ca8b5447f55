"""Runs the PTX that Triton compiles kernels to on CPU tensors; see `device.emulated_gpu`."""
