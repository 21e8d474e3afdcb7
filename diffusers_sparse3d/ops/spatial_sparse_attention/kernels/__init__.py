"""Triton kernels of Spatial Sparse Attention, one kernel with its launcher a file. They need the package triton."""
