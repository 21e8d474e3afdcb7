"""Attention over packed (variable-length) segments."""

from __future__ import annotations

from torch import Tensor

from . import reference
from .varlen import is_varlen_available, varlen_packed_attention


__all__ = ["packed_attention"]


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention of the queries of each segment to the keys of the same segment.

    float16 and bfloat16 on CUDA use PyTorch's variable-length flash attention where the installed version has it;
    everything else segments padded to batches of similar size. Both are differentiable.

    Args:
        query: `[M, H, D]`, rows grouped by segment.
        key: `[N, H_kv, D]`, rows grouped by segment; H is a multiple of H_kv, query head h uses key head
            h // (H / H_kv).
        value: `[N, H_kv, D_v]`.
        cu_seqlens_q: `[S + 1]` int32, where each segment starts among the queries. Segments may be empty.
        cu_seqlens_k: `[S + 1]` int32, the same for keys and values.
        max_seqlen_q: longest query segment, if known (spares a transfer from the GPU).
        max_seqlen_k: longest key segment, if known.
        scale: factor of the scores; 1 / sqrt(D) if None.

    Returns:
        `[M, H, D_v]` in the dtype of `value`; zero for queries whose segment has no key.
    """
    if not is_varlen_available(query, value) or query.shape[0] == 0 or key.shape[0] == 0:
        return reference.packed_attention(query, key, value, cu_seqlens_q, cu_seqlens_k, scale)
    if max_seqlen_q is None:
        max_seqlen_q = int(cu_seqlens_q.diff().max())
    if max_seqlen_k is None:
        max_seqlen_k = int(cu_seqlens_k.diff().max())
    return varlen_packed_attention(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale)
