"""Triton kernels of packed attention besides those for segments, which Spatial Sparse Attention has too."""
