"""Submanifold sparse convolution on packed voxel features: Triton kernels on a GPU, plain PyTorch elsewhere."""

from .api import plan_sparse_conv3d, sparse_conv3d, sparse_subdivide_conv3d


__all__ = ["plan_sparse_conv3d", "sparse_conv3d", "sparse_subdivide_conv3d"]
