"""Triton kernels of packed attention besides those that it shares with Spatial Sparse Attention."""
