"""Triton kernels of the sparse convolution, each with its launcher. They need the package triton."""
