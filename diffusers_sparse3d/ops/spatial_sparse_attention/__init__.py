"""Spatial Sparse Attention: Triton kernels on a GPU, plain PyTorch elsewhere."""

from .api import (
    plan_spatial_sparse_attention,
    select_blocks,
    selected_attention,
    spatial_sparse_attention,
    tune_spatial_sparse_attention,
)


__all__ = [
    "plan_spatial_sparse_attention",
    "select_blocks",
    "selected_attention",
    "spatial_sparse_attention",
    "tune_spatial_sparse_attention",
]
