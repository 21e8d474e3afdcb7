"""Group normalisation of packed voxel features: Triton kernels on a GPU, plain PyTorch elsewhere."""

from .api import plan_sparse_group_norm, sparse_group_norm


__all__ = ["plan_sparse_group_norm", "sparse_group_norm"]
