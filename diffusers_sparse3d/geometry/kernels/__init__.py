"""Triton kernels of the geometry; each has the same in plain PyTorch beside it."""
