"""Mean pooling of packed voxel features: Triton kernels on a GPU, plain PyTorch elsewhere."""

from .api import plan_sparse_mean_pool, sparse_mean_pool


__all__ = ["plan_sparse_mean_pool", "sparse_mean_pool"]
