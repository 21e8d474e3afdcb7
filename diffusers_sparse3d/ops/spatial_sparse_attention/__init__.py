"""Spatial Sparse Attention: Triton kernels on a GPU, plain PyTorch elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..triton_dispatch import runs_kernels
from . import reference
from .reference import select_blocks, selected_attention


if TYPE_CHECKING:
    from ...sparse_tensor import CoordinateCache


__all__ = ["plan_spatial_sparse_attention", "select_blocks", "selected_attention", "spatial_sparse_attention"]


# Of queries, keys and values; beyond it, tiles no longer fit in shared memory.
_WIDEST_HEAD = 128


def _runs_kernels(query: Tensor, value: Tensor) -> bool:
    return runs_kernels(value) and max(query.shape[-1], value.shape[-1]) <= _WIDEST_HEAD


def plan_spatial_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: CoordinateCache,
    compression_block_size: int,
    selection_block_size: int,
    window_size: int,
    window_shift: int = 0,
) -> None:
    """Derive all from the coordinates that `spatial_sparse_attention` needs; `cache` keeps it.

    `spatial_sparse_attention` would do so at its first call, and wait for the GPU then. After this, it does not wait,
    may be captured in a CUDA graph, and is traced by `torch.compile(fullgraph=True)`.

    Args:
        query: `[*, H, D]`; only shape, dtype and device of the three are looked at, and not the number of rows.
        key: `[*, H_kv, D]`.
        value: `[*, H_kv, D_v]`.
        cache: the coordinates of the tokens.
        compression_block_size, selection_block_size, window_size, window_shift: as in `spatial_sparse_attention`.
    """
    settings = (cache, compression_block_size, selection_block_size, window_size, window_shift)
    if not _runs_kernels(query, value):
        reference.plan_attention(*settings)
    elif len(cache.coords):
        from . import kernels

        kernels.plan_attention(*settings, kernels.HeadShape.of(query, key, value), value.dtype)


def spatial_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    compressed_key: Tensor,
    compressed_value: Tensor,
    gate: Tensor,
    cache: CoordinateCache,
    compression_block_size: int,
    selection_block_size: int,
    topk: int,
    window_size: int,
    window_shift: int = 0,
    scale: float | None = None,
    query_chunk_size: int | None = None,
) -> Tensor:
    """Sum of compressed, selected and window attention, weighted per token (arXiv 2505.17412, section 3.3).

    1. Compression: attention to all compressed keys of the same sample.
    2. Selection: attention to all tokens of the `topk` selection blocks whose compressed keys are the most probable
       ones, chosen per query and key/value head. No gradient goes through the choice.
    3. Window: attention inside the window (x, y, z + `window_shift`) // `window_size`.

    Differentiable (once). The order of the rows has no influence on the result. float16, bfloat16 and float32 on a GPU
    run Triton kernels if the package triton is installed and heads have at most 128 channels; everything else runs the
    reference.

    Args:
        query: `[N, H, D]`.
        key: `[N, H_kv, D]`; H is a multiple of H_kv, query head h uses key head h // (H / H_kv).
        value: `[N, H_kv, D_v]`.
        compressed_key: `[M, H_kv, D]`, rows as in `cache.downsample(compression_block_size)`.
        compressed_value: `[M, H_kv, D_v]`.
        gate: `[N, 3]` weights of compression, selection and window.
        cache: the coordinates of the N tokens.
        compression_block_size: edge of a compression block in voxels.
        selection_block_size: edge of a selection block, a multiple of `compression_block_size`.
        topk: selection blocks per query and key/value head; all of them where a sample has fewer.
        window_size: edge of a window.
        window_shift: added to the coordinates before the division into windows.
        scale: factor of the scores; 1 / sqrt(D) if None.
        query_chunk_size: queries that are worked on at once, which bounds the memory; by a fixed budget if None.

    Returns:
        `[N, H, D_v]`.

    Raises:
        ValueError: if `selection_block_size` is not a multiple of `compression_block_size`.
    """
    if selection_block_size % compression_block_size:
        raise ValueError(
            f"`selection_block_size` {selection_block_size} is not a multiple of "
            f"`compression_block_size` {compression_block_size}"
        )
    if _runs_kernels(query, value):
        from . import kernels

        attend = kernels.spatial_sparse_attention
    else:
        attend = reference.spatial_sparse_attention
    return attend(
        query,
        key,
        value,
        compressed_key,
        compressed_value,
        gate,
        cache,
        compression_block_size,
        selection_block_size,
        topk,
        window_size,
        window_shift=window_shift,
        scale=scale,
        query_chunk_size=query_chunk_size,
    )
