"""Attention over packed segments of different lengths, in plain PyTorch: the oracle and the CPU path."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


# Segments are padded to the longest of their size class; neighbouring classes differ by a factor of 2^(1/3).
_CLASSES_PER_OCTAVE = 3


def size_classes(lengths: Tensor) -> Tensor:
    """A class number for each length, in ascending order of length; 0 is reserved for length 0."""
    return torch.where(lengths > 0, 1 + (lengths.clamp(min=1).double().log2() * _CLASSES_PER_OCTAVE).ceil().long(), 0)


def segment_rows(starts: Tensor, lengths: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Rows of `S` segments as an `[S, width]` table, and which of its entries are real (the others repeat a row)."""
    offsets = torch.arange(width, device=starts.device)
    valid = offsets < lengths[:, None]
    return starts[:, None] + torch.minimum(offsets, lengths[:, None] - 1), valid


def gather_rows(table: Tensor, rows: Tensor) -> Tensor:
    """`[R, ...]` and rows `[A, B]` -> `[A, B, ...]`; `index_select` copies whole rows, indexing does not."""
    return table.index_select(0, rows.flatten()).unflatten(0, rows.shape)


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    scale: float | None = None,
) -> Tensor:
    """Softmax attention inside each segment: segments of similar size are padded to a batch and attended at once.

    Shapes as in `ops.packed_attention.packed_attention`. Any floating dtype; differentiable.
    """
    num_heads, num_kv_heads = query.shape[1], key.shape[1]
    boundaries = torch.stack([cu_seqlens_q, cu_seqlens_k]).long()
    lengths = boundaries.diff()
    # The one transfer to the host: how many batches there are, and their widths.
    host_lengths = lengths.cpu()
    class_q, class_k = size_classes(host_lengths)
    keys = torch.where((class_q == 0) | (class_k == 0), -1, class_q << 32 | class_k)
    bucket_keys, bucket = keys.unique(return_inverse=True)
    members_of_bucket = bucket.argsort(stable=True).split(bucket.bincount(minlength=bucket_keys.numel()).tolist())

    rows, outputs = [], []
    for bucket_key, host_members in zip(bucket_keys.tolist(), members_of_bucket):
        if bucket_key < 0:
            continue
        (width_q, width_k), (shortest_q, shortest_k) = (
            host_lengths[:, host_members].amax(1).tolist(),
            host_lengths[:, host_members].amin(1).tolist(),
        )
        members = host_members.to(query.device)
        rows_q, valid_q = segment_rows(boundaries[0, members], lengths[0, members], width_q)
        rows_k, valid_k = segment_rows(boundaries[1, members], lengths[1, members], width_k)

        # The query heads that share a key/value head become further query rows: keys need not be repeated.
        segment_query = (
            gather_rows(query, rows_q).unflatten(2, (num_kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        )
        segment_key, segment_value = (
            gather_rows(key, rows_k).transpose(1, 2),
            gather_rows(value, rows_k).transpose(1, 2),
        )
        attention_mask = valid_k[:, None, None] if shortest_k < width_k else None
        output = F.scaled_dot_product_attention(
            segment_query, segment_key, segment_value, attn_mask=attention_mask, scale=scale
        )
        output = output.unflatten(2, (-1, width_q)).permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1, 2)
        if shortest_q < width_q:
            rows_q, output = rows_q[valid_q], output[valid_q.flatten()]
        rows.append(rows_q.flatten())
        outputs.append(output)

    # Rows of segments without a key attend to nothing and stay zero.
    result = value.new_zeros(query.shape[0], num_heads, value.shape[-1])
    return result.index_copy(0, torch.cat(rows), torch.cat(outputs)) if rows else result
