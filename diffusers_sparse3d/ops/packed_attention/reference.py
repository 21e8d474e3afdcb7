"""Attention over packed segments in plain PyTorch: the oracle of the kernels and the path of the CPU.

To PyTorch it is an operator: the batches depend on the lengths of the segments, which `torch.compile` cannot trace.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..gather import gather_rows
from ..runtime.operators import operator


# Segments are padded to the longest of their size class; neighbouring classes differ by a factor of 2^(1/3).
_CLASSES_PER_OCTAVE = 3
# Elements of the largest intermediate tensors: they fit in the caches of a CPU, or occupy all of a GPU.
_CHUNK_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 27}


def chunk_elements(device: torch.device) -> int:
    """The number of elements that an intermediate tensor should have at most."""
    return _CHUNK_ELEMENTS.get(device.type, _CHUNK_ELEMENTS["cpu"])


def size_classes(lengths: Tensor) -> Tensor:
    """A class number for each length, in ascending order of length; 0 is reserved for length 0."""
    return torch.where(lengths > 0, 1 + (lengths.clamp(min=1).double().log2() * _CLASSES_PER_OCTAVE).ceil().long(), 0)


def segment_rows(starts: Tensor, lengths: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Rows of `S` segments as an `[S, width]` table, and which of its entries are real (the others repeat a row)."""
    offsets = torch.arange(width, device=starts.device)
    valid = offsets < lengths[:, None]
    return starts[:, None] + torch.minimum(offsets, lengths[:, None] - 1), valid


def _buckets(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, order_q: Tensor | None, order_k: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Batches of segments of similar size; segments without queries or without keys are left out.

    Yields:
        Rows of queries `[S, W_q]` and which of them are real, then the same of keys, as `segment_rows` gives them; the
        last is None if all keys are real.
    """
    boundaries = torch.stack([cu_seqlens_q, cu_seqlens_k]).long()
    lengths = boundaries.diff()
    # The only transfer to the host: the number of batches and their widths follow from the lengths.
    host_lengths = lengths.cpu()
    class_q, class_k = size_classes(host_lengths)
    keys = torch.where((class_q == 0) | (class_k == 0), -1, class_q << 32 | class_k)
    bucket_keys, bucket = keys.unique(return_inverse=True)
    members_of_bucket = bucket.argsort(stable=True).split(bucket.bincount(minlength=bucket_keys.numel()).tolist())
    for bucket_key, host_members in zip(bucket_keys.tolist(), members_of_bucket):
        if bucket_key < 0:
            continue
        width_q, width_k = host_lengths[:, host_members].amax(1).tolist()
        shortest_k = int(host_lengths[1, host_members].min())
        members = host_members.to(boundaries.device)
        rows_q, valid_q = segment_rows(boundaries[0, members], lengths[0, members], width_q)
        rows_k, valid_k = segment_rows(boundaries[1, members], lengths[1, members], width_k)
        rows_q = rows_q if order_q is None else order_q[rows_q]
        rows_k = rows_k if order_k is None else order_k[rows_k]
        yield rows_q, valid_q, rows_k, valid_k if shortest_k < width_k else None


def _group_heads(rows: Tensor, num_kv_heads: int) -> Tensor:
    """`[S, W, H, D]` -> `[S, H_kv, G * W, D]`: query heads that share a key/value head become further query rows."""
    return rows.unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _ungroup_heads(grouped: Tensor, width: int) -> Tensor:
    """The inverse of `_group_heads`, with segments and rows in one axis: -> `[S * W, H, D]`."""
    return grouped.unflatten(2, (-1, width)).permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1, 2)


@operator("diffusers_sparse3d::packed_attention", kept_by_checkpoints=True, mutates_args=())
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    order_q: Tensor | None,
    order_k: Tensor | None,
    scale: float,
) -> Tensor:
    """`packed_attention` of operands of one dtype."""
    num_kv_heads = key.shape[1]
    # Rows of segments without a key attend to nothing and stay zero.
    result = value.new_zeros(*query.shape[:2], value.shape[2])
    for rows_q, _, rows_k, valid_k in _buckets(cu_seqlens_q, cu_seqlens_k, order_q, order_k):
        output = F.scaled_dot_product_attention(
            _group_heads(gather_rows(query, rows_q), num_kv_heads),
            gather_rows(key, rows_k).transpose(1, 2),
            gather_rows(value, rows_k).transpose(1, 2),
            attn_mask=None if valid_k is None else valid_k[:, None, None],
            scale=scale,
        )
        # A row that fills up a segment repeats another one, and gets the same result.
        result.index_copy_(0, rows_q.flatten(), _ungroup_heads(output, rows_q.shape[1]))
    return result


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *segments: Any) -> Tensor:
    return value.new_empty(query.shape[0], query.shape[1], value.shape[2])


@operator("diffusers_sparse3d::packed_attention_backward", mutates_args=())
def _attend_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    order_q: Tensor | None,
    order_k: Tensor | None,
    output: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value: the probabilities are computed again, for a bounded chunk at a time."""
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    dtype, budget = torch.promote_types(query.dtype, torch.float32), chunk_elements(query.device)
    # Queries without a key, and keys without a query, have no influence. The last row takes the values of rows that
    # only fill up a segment.
    grad_query, grad_key, grad_value = (
        tensor.new_zeros(len(tensor) + 1, *tensor.shape[1:]) for tensor in (query, key, value)
    )
    product = (grad_output.to(dtype) * output.to(dtype)).sum(-1, keepdim=True)
    for rows_q, valid_q, rows_k, valid_k in _buckets(cu_seqlens_q, cu_seqlens_k, order_q, order_k):
        width_q, width_k = rows_q.shape[1], rows_k.shape[1]
        step_q = max(1, min(width_q, budget // (num_heads * width_k)))
        step = max(1, budget // (num_heads * width_k * step_q))
        for start in range(0, len(rows_q), step):
            segments = slice(start, start + step)
            padding = None
            if valid_k is not None:
                padding = torch.where(valid_k[segments, None, None], 0.0, float("-inf")).to(dtype)
            keys, values = (gather_rows(tensor, rows_k[segments]).to(dtype).transpose(1, 2) for tensor in (key, value))
            grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
            for rows, valid in zip(rows_q[segments].split(step_q, 1), valid_q[segments].split(step_q, 1)):
                queries = _group_heads(gather_rows(query, rows).to(dtype) * scale, num_kv_heads)
                # Rows that only fill up a segment have no gradient, and so add nothing.
                gradients, products = (
                    _group_heads(gather_rows(tensor, rows).to(dtype) * valid[..., None, None], num_kv_heads)
                    for tensor in (grad_output, product)
                )
                scores = queries @ keys.transpose(-1, -2)
                if padding is not None:
                    scores += padding
                weights = scores.softmax(-1)
                grad_values += weights.transpose(-1, -2) @ gradients
                grad_scores = (gradients @ values.transpose(-1, -2)).sub_(products).mul_(weights)
                grad_keys += grad_scores.transpose(-1, -2) @ queries
                rows = torch.where(valid, rows, len(query)).flatten()
                grad_queries = _ungroup_heads(grad_scores @ keys, valid.shape[1]) * scale
                grad_query.index_copy_(0, rows, grad_queries.to(query.dtype))
            # A key belongs to one segment.
            rows = rows_k[segments]
            rows = rows if valid_k is None else torch.where(valid_k[segments], rows, len(key))
            for grad, grads in ((grad_key, grad_keys), (grad_value, grad_values)):
                grad.index_copy_(0, rows.flatten(), grads.transpose(1, 2).flatten(0, 1).to(grad.dtype))
    return grad_query[:-1], grad_key[:-1], grad_value[:-1]


@_attend_backward.register_fake
def fake_gradients(
    grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value without values, for tracing."""
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, output)


def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    with torch.autocast(grad_output.device.type, enabled=False):
        gradients = _attend_backward(grad_output, *ctx.saved_tensors, ctx.scale)
    return *gradients, *(None,) * 5


_attend.register_autograd(_gradients, setup_context=_keep)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float | None = None,
    order_q: Tensor | None = None,
    order_k: Tensor | None = None,
) -> Tensor:
    """Softmax attention inside each segment: segments of similar size are padded to a batch and attended at once.

    It takes any floating dtype, computes in that of `value`, and is differentiable (once).

    Args:
        query, key, value, cu_seqlens_q, cu_seqlens_k, scale: as in `ops.packed_attention.packed_attention`.
        order_q: `[M]` int64, the rows of the queries grouped by segment; None if they are grouped already.
        order_k: `[N]` int64, the same of the keys.

    Returns:
        `[M, H, D_v]` in the row order of `query`.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(query.device.type, enabled=False):
        return _attend(
            query.to(value.dtype), key.to(value.dtype), value, cu_seqlens_q, cu_seqlens_k, order_q, order_k, scale
        )
