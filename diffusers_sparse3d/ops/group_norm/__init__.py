"""Group normalisation of packed features and dense patches: Triton kernels on a GPU, plain PyTorch elsewhere."""

from .api import dense_group_norm, plan_sparse_group_norm, sparse_group_norm


__all__ = ["dense_group_norm", "plan_sparse_group_norm", "sparse_group_norm"]
