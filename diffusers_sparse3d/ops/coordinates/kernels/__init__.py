"""Triton kernels of neighbour maps, each with its launcher. They need the package triton."""
