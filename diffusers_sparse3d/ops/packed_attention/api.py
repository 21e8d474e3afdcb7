"""Public functions of packed attention, and the choice of how it is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from ..runtime.dispatch import WIDEST_HEAD, runs_kernels
from . import reference
from .varlen import is_varlen_available, varlen_packed_attention


if TYPE_CHECKING:
    from ..coordinates import Partition


# The kernels take at most so many query heads per key/value head: the rows of their smallest tile of queries.
_MOST_GROUPED_HEADS = 32


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

    float16 and bfloat16 on a GPU use PyTorch's variable-length flash attention if the installed version has it and
    takes the heads. Otherwise float16, bfloat16 and float32 on a GPU run Triton kernels, if the package triton is
    installed, heads have at most 128 channels and at most 32 query heads share a key/value head. Everything else is
    padded to batches of segments of similar size. All of them are differentiable (once).

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
    if not _runs_varlen(query, key, value):
        attend = _without_varlen(query, key, value, scale)
        return attend(query, key, value, cu_seqlens_q, cu_seqlens_k, scale)
    if max_seqlen_q is None:
        max_seqlen_q = int(cu_seqlens_q.diff().max())
    if max_seqlen_k is None:
        max_seqlen_k = int(cu_seqlens_k.diff().max())
    return varlen_packed_attention(query, key, value, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale)


def partitioned_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    partition: Partition,
    key_partition: Partition,
    scale: float | None = None,
) -> Tensor:
    """`packed_attention` of rows in any order: the groups of two partitions are the segments.

    Args:
        query: `[M, H, D]`.
        key: `[N, H_kv, D]`.
        value: `[N, H_kv, D_v]`.
        partition: of the M queries.
        key_partition: of the N keys. It has at least as many groups as `partition`; no query attends to those beyond.
        scale: factor of the scores; 1 / sqrt(D) if None.

    Returns:
        `[M, H, D_v]` in the row order of `query`.
    """
    cu_seqlens_k = key_partition.cu_seqlens[: partition.cu_seqlens.numel()]
    if not _runs_varlen(query, key, value):
        attend = _without_varlen(query, key, value, scale)
        orders = (partition.order, key_partition.order)
        return attend(query, key, value, partition.cu_seqlens, cu_seqlens_k, scale, *orders)
    output = packed_attention(
        query.index_select(0, partition.order),
        key.index_select(0, key_partition.order),
        value.index_select(0, key_partition.order),
        partition.cu_seqlens,
        cu_seqlens_k,
        max_seqlen_q=partition.max_seqlen,
        max_seqlen_k=key_partition.max_seqlen,
        scale=scale,
    )
    return output.index_select(0, partition.inverse)


def _runs_varlen(query: Tensor, key: Tensor, value: Tensor) -> bool:
    return is_varlen_available(query, value) and query.shape[0] > 0 and key.shape[0] > 0


def _runs_kernels(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> bool:
    return (
        runs_kernels(value)
        and max(query.shape[-1], value.shape[-1]) <= WIDEST_HEAD
        and query.shape[1] <= _MOST_GROUPED_HEADS * key.shape[1]
        and (scale is None or scale > 0)
    )


def _without_varlen(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Callable[..., Tensor]:
    if _runs_kernels(query, key, value, scale):
        from . import operator

        return operator.packed_attention
    return reference.packed_attention
