"""Timestep modulation of transformer tokens: Triton kernels on a GPU, plain PyTorch elsewhere."""

from .api import affine_layer_norm, gated_sum, modulated_layer_norm
from .samples import SampleRows


__all__ = ["SampleRows", "affine_layer_norm", "gated_sum", "modulated_layer_norm"]
