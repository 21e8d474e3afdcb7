"""A filter of 27 taps for every voxel of dense patches: a Triton kernel on a GPU, plain PyTorch elsewhere."""

from .api import adaptive_filter


__all__ = ["adaptive_filter"]
