"""Triton kernels of the RMS norm of heads: one kernel with its launcher a file."""
