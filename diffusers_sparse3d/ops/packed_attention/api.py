"""Public functions of packed attention, and the choice of how it is computed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from ..checks import check_floating, check_scale, check_shape
from ..coordinates import Partition
from ..gather import permute_rows
from ..runtime.dispatch import MOST_GROUPED_HEADS, WIDEST_HEAD, compute_capability, runs_kernels
from . import reference
from .varlen import is_varlen_available, varlen_packed_attention


# On Hopper, flash attention of PyTorch waits between products and exponentials, most with narrow heads: 1.48 ms where
# the kernels take 0.95, and 4.2 where they take 2.3 backward (2 segments of 43,700 queries and 700 keys, 32 heads of
# 32 channels, bfloat16, H200).
_NARROW_HEAD = 32
_LONG_SEGMENT = 1024


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
    installed, heads have at most 128 channels and at most 32 query heads share a key/value head. From compute
    capability 9.0 on, the kernels also run where they are faster than flash attention: in few segments, with heads of
    at most 32 channels. Everything else is padded to batches of segments of similar size. All
    of them are differentiable (once).

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

    Raises:
        TypeError, ValueError: if an argument has another type, dtype or shape; on a CPU also if boundaries do not
            start at 0, fall, or do not end at the number of rows. Boundaries on a GPU are not looked at.
    """
    _check_heads(query, key, value)
    check_scale(scale)
    for name, boundaries, rows in (("cu_seqlens_q", cu_seqlens_q, query), ("cu_seqlens_k", cu_seqlens_k, key)):
        _check_boundaries(name, boundaries, rows.shape[0])
    if len(cu_seqlens_q) != len(cu_seqlens_k):
        raise ValueError(
            f"`cu_seqlens_k` must have the {len(cu_seqlens_q)} boundaries of `cu_seqlens_q`, got {len(cu_seqlens_k)}"
        )
    if not _runs_varlen(query, key, value, cu_seqlens_q, scale):
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

    Raises:
        TypeError, ValueError: if an argument has another type, dtype or shape, or a partition another number of rows.
    """
    _check_heads(query, key, value)
    check_scale(scale)
    for name, groups, rows in (("partition", partition, query), ("key_partition", key_partition, key)):
        if not isinstance(groups, Partition):
            raise TypeError(f"`{name}` must be a Partition, got {type(groups).__name__}")
        if groups.order.shape[0] != rows.shape[0]:
            raise ValueError(f"`{name}` must be one of {rows.shape[0]} rows, got {groups.order.shape[0]}")
    if len(key_partition.cu_seqlens) < len(partition.cu_seqlens):
        raise ValueError(
            f"`key_partition` must have at least the {len(partition.cu_seqlens) - 1} groups of `partition`, got"
            f" {len(key_partition.cu_seqlens) - 1}"
        )
    cu_seqlens_q, cu_seqlens_k = partition.cu_seqlens, key_partition.cu_seqlens[: partition.cu_seqlens.numel()]
    order_q = None if partition.in_order else partition.order
    order_k = None if key_partition.in_order else key_partition.order
    if not _runs_varlen(query, key, value, cu_seqlens_q, scale):
        attend = _without_varlen(query, key, value, scale)
        return attend(query, key, value, cu_seqlens_q, cu_seqlens_k, scale, order_q, order_k)
    output = varlen_packed_attention(
        query if order_q is None else permute_rows(query, order_q, partition.inverse),
        key if order_k is None else permute_rows(key, order_k, key_partition.inverse),
        value if order_k is None else permute_rows(value, order_k, key_partition.inverse),
        cu_seqlens_q,
        cu_seqlens_k,
        partition.max_seqlen,
        key_partition.max_seqlen,
        scale,
    )
    return output if order_q is None else permute_rows(output, partition.inverse, order_q)


def _check_heads(query: Tensor, key: Tensor, value: Tensor) -> None:
    check_floating(query=query, key=key, value=value)
    check_shape("query", query, "M", "H", "D")
    check_shape("key", key, "N", "H_kv", query.shape[2])
    if not query.shape[2]:
        raise ValueError(f"`query` must have channels, got shape {list(query.shape)}")
    heads, kv_heads = query.shape[1], key.shape[1]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"`key` must have a number of heads that divides the {heads} of `query`, got {kv_heads}")
    check_shape("value", value, key.shape[0], kv_heads, "D_v")


def _check_boundaries(name: str, boundaries: Tensor, num_rows: int) -> None:
    if not isinstance(boundaries, Tensor):
        raise TypeError(f"`{name}` must be a tensor, got {type(boundaries).__name__}")
    if boundaries.ndim != 1 or not len(boundaries) or boundaries.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"`{name}` must be integers of shape [S + 1], got {boundaries.dtype} of shape {list(boundaries.shape)}"
        )
    # Elsewhere the host would have to wait for the values, or while tracing has none.
    if boundaries.device.type != "cpu" or torch.compiler.is_compiling() or is_fake(boundaries):
        return
    if boundaries[0] != 0 or boundaries[-1] != num_rows or (boundaries.diff() < 0).any():
        raise ValueError(f"`{name}` must rise from 0 to the {num_rows} rows, got {boundaries.tolist()!s:.100}")


def _runs_varlen(query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, scale: float | None) -> bool:
    if not is_varlen_available(query, value) or query.shape[0] == 0 or key.shape[0] == 0:
        return False
    return not (_has_narrow_heads(query, cu_seqlens_q) and _runs_kernels(query, key, value, scale))


def _has_narrow_heads(query: Tensor, cu_seqlens_q: Tensor) -> bool:
    """Whether the kernels are the faster ones although flash attention is available."""
    if torch.compiler.is_compiling():
        return False
    is_long = query.shape[0] >= _LONG_SEGMENT * (cu_seqlens_q.shape[0] - 1)
    return is_long and query.shape[-1] <= _NARROW_HEAD and compute_capability(query.device) >= (9, 0)


def _runs_kernels(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> bool:
    return (
        runs_kernels(value)
        and max(query.shape[-1], value.shape[-1]) <= WIDEST_HEAD
        and query.shape[1] <= MOST_GROUPED_HEADS * key.shape[1]
        and (scale is None or scale > 0)
    )


def _without_varlen(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Callable[..., Tensor]:
    if _runs_kernels(query, key, value, scale):
        from . import operator

        return operator.packed_attention
    return reference.packed_attention
