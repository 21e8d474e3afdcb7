"""Attention over packed segments through PyTorch's variable-length flash attention."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..runtime.dispatch import compute_capability


try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # torch < 2.10
    varlen_attn = None  # type: ignore[assignment]


def takes_scale(function: Callable[..., Any] | None) -> bool:
    """Whether `varlen_attn` is there and has a `scale`, which it lacks in torch 2.10."""
    return function is not None and "scale" in inspect.signature(function).parameters


_HAS_VARLEN = takes_scale(varlen_attn) and torch.backends.cuda.is_flash_attention_available()


def is_varlen_available(query: Tensor, value: Tensor) -> bool:
    """Whether the installed torch has variable-length attention for these operands, and the GPU runs it."""
    return (
        _HAS_VARLEN
        and query.is_cuda
        and (torch.version.hip is not None or compute_capability(query.device) >= (8, 0))
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] == value.shape[-1]
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
    )


def varlen_packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scale: float | None = None,
) -> Tensor:
    """See `ops.packed_attention.packed_attention`; on CUDA, float16 or bfloat16, differentiable."""
    # Not every version takes grouped heads: the query heads that share a key/value head become further query rows.
    num_queries, group_size = query.shape[0], query.shape[1] // key.shape[1]
    if group_size > 1:
        query = query.unflatten(1, (key.shape[1], group_size)).transpose(1, 2).flatten(0, 1)
        cu_seqlens_q, max_seqlen_q = cu_seqlens_q * group_size, max_seqlen_q * group_size
    output: Any = varlen_attn(
        query.contiguous(),
        key.contiguous(),
        value.contiguous(),
        cu_seqlens_q.int(),
        cu_seqlens_k.int(),
        max_seqlen_q,
        max_seqlen_k,
        scale=scale,
    )
    if group_size == 1:
        return output
    return output.unflatten(0, (num_queries, group_size)).transpose(1, 2).flatten(1, 2)
