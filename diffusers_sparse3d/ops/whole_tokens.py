"""Tensors of heads as kernels read them."""

from __future__ import annotations

from torch import Tensor


def with_whole_tokens(tensor: Tensor) -> Tensor:
    """`[N, H, D]` whose tokens are contiguous, a copy if need be.

    Tokens may be apart, as the keys of one projection to keys and values are.
    """
    _, num_heads, dim = tensor.shape
    _, head_stride, stride = tensor.stride()
    contiguous = (stride == 1 or dim == 1) and (head_stride == dim or num_heads == 1)
    return tensor if contiguous else tensor.contiguous()
