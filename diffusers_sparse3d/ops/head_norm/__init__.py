"""RMS norm of the heads of queries and keys: Triton kernels on a GPU, plain PyTorch elsewhere."""

from .api import head_rms_norm


__all__ = ["head_rms_norm"]
