"""The public functions of Spatial Sparse Attention (arXiv 2505.17412, section 3.3)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...checks import check_number
from ..checks import check_at_least, check_floating, check_rows, check_scale, check_shape
from ..coordinates import check_coords
from ..runtime.dispatch import MOST_GROUPED_HEADS, WIDEST_HEAD, runs_kernels
from . import reference
from .reference import select_blocks, selected_attention


if TYPE_CHECKING:
    from ...sparse_tensor import CoordinateCache
    from .kernels.tuning import TuningReport


__all__ = [
    "plan_spatial_sparse_attention",
    "select_blocks",
    "selected_attention",
    "spatial_sparse_attention",
    "tune_spatial_sparse_attention",
]

# The kernels choose at most so many blocks: they compare all of them with each other, which is a tile of its square.
_MOST_CHOSEN = 256


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
    run Triton kernels if the package triton is installed, heads have at most 128 channels, at most 32 of queries share
    one of keys and values, `topk` is at most 256 and `scale` is positive; everything else runs the reference in plain
    PyTorch.

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
        window_size: edge of a window in voxels.
        window_shift: added to the coordinates before the division into windows.
        scale: factor of the scores; 1 / sqrt(D) if None.
        query_chunk_size: queries that are worked on at once, which bounds the memory; by a fixed budget if None.

    Returns:
        `[N, H, D_v]` in the dtype of `value`.

    Raises:
        TypeError, ValueError: if an argument has another type, dtype or shape, a size is out of range, or
            `selection_block_size` is not a multiple of `compression_block_size`.
    """
    check_at_least(1, topk=topk)
    _check_sizes(compression_block_size, selection_block_size, window_size, window_shift)
    inputs = (query, key, value, compressed_key, compressed_value, gate)
    _check_heads(*inputs, cache)
    check_scale(scale)
    if query.shape[0] == 0:
        return value.new_zeros(0, query.shape[1], value.shape[-1])
    # For the kernels, the coarse grid is part of the plan.
    coarse, _ = cache.downsample(compression_block_size)
    check_rows("compressed_key", compressed_key, coarse)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if not _runs_kernels(query, key, value, topk, scale):
        return reference.spatial_sparse_attention(
            *inputs,
            cache,
            compression_block_size,
            selection_block_size,
            topk,
            window_size,
            window_shift=window_shift,
            scale=scale,
            query_chunk_size=query_chunk_size,
        )
    from .operator import attend

    sizes = (compression_block_size, selection_block_size, window_size, window_shift)
    return attend(inputs, cache, sizes, topk, scale, query_chunk_size)


def plan_spatial_sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: CoordinateCache,
    compression_block_size: int,
    selection_block_size: int,
    window_size: int,
    window_shift: int = 0,
    topk: int = 1,
    scale: float | None = None,
) -> None:
    """Derive from the coordinates everything that `spatial_sparse_attention` needs; `cache` keeps it.

    Without this, `spatial_sparse_attention` does so at its first call, for which it waits for the GPU. After it, calls
    do not wait, may be captured in a CUDA graph, and are traced by `torch.compile(fullgraph=True)`.

    Args:
        query: `[*, H, D]`. Only the shapes, dtypes and devices of the three tensors matter, not the numbers of rows.
        key: `[*, H_kv, D]`.
        value: `[*, H_kv, D_v]`.
        cache: the coordinates of the tokens.
        compression_block_size, selection_block_size, window_size, window_shift: as in `spatial_sparse_attention`.
        topk, scale: those of the calls, which matter where they are such that kernels do not run.

    Raises:
        TypeError, ValueError: if a size is no integer, or out of range.
    """
    check_at_least(1, topk=topk)
    check_scale(scale)
    _check_sizes(compression_block_size, selection_block_size, window_size, window_shift)
    if not _runs_kernels(query, key, value, topk, scale):
        reference.plan_attention(cache, compression_block_size, selection_block_size, window_size, window_shift)
    elif len(cache.coords):
        from .kernels.arguments import HeadShape
        from .plan import flat_plan

        sizes = (compression_block_size, selection_block_size, window_size, window_shift)
        flat_plan(cache, sizes, HeadShape.of(query, key, value), value.dtype)


def tune_spatial_sparse_attention(
    num_heads: int = 32,
    num_kv_heads: int = 2,
    head_dim: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    coords: Tensor | None = None,
    compression_block_size: int = 4,
    selection_block_size: int = 8,
    topk: int = 8,
    window_size: int = 8,
    budget: float = 20.0,
) -> TuningReport:
    """Time other tile shapes of the kernels on this GPU, and keep on disk those that are at least 3 % faster.

    Tuning is optional: the shapes that ship are good ones. The result is for these heads, this dtype, model of GPU,
    and version of triton and of the kernels; it is used for all coordinates whose plan is not made yet, in this and in
    later processes. Files are in `huggingface_hub.cached_assets_path("diffusers_sparse3d", "tile_shapes")`.

    Args:
        num_heads, num_kv_heads, head_dim: sizes of the heads; the defaults are those of the published model.
        dtype: of queries, keys and values: float16, bfloat16 or float32.
        coords: `[N, 4]` int32 of typical tokens, on the GPU to tune for; by default the surface of a sphere, 46,000
            tokens, on the current GPU.
        compression_block_size, selection_block_size, topk, window_size: as in `spatial_sparse_attention`.
        budget: seconds for everything, compilation included; measurements under way at the end are finished.

    Raises:
        TypeError: if a size is no integer.
        ValueError: if an argument is out of range, or kernels do not run there: without a GPU or the package triton.
    """
    sizes = {
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "compression_block_size": compression_block_size,
        "selection_block_size": selection_block_size,
        "topk": topk,
        "window_size": window_size,
    }
    check_at_least(1, **sizes)
    check_number("budget", budget, 0)
    if num_heads % num_kv_heads:
        raise ValueError(f"`num_heads` must be a multiple of `num_kv_heads` {num_kv_heads}, got {num_heads}")
    if num_heads > MOST_GROUPED_HEADS * num_kv_heads:
        raise ValueError(
            f"`num_heads` must be at most {MOST_GROUPED_HEADS} times `num_kv_heads` {num_kv_heads} for the kernels,"
            f" got {num_heads}"
        )
    for name, size, most in (("head_dim", head_dim, WIDEST_HEAD), ("topk", topk, _MOST_CHOSEN)):
        if size > most:
            raise ValueError(f"`{name}` must be at most {most} for the kernels, got {size}")
    _check_block_sizes(compression_block_size, selection_block_size)
    if coords is not None:
        check_coords(coords)
        if not len(coords):
            raise ValueError("`coords` must have rows for the kernels to be timed, got none")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu") if coords is None else coords.device
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"`dtype` must be float16, bfloat16 or float32, got {dtype}")
    if not runs_kernels(torch.empty(0, dtype=dtype, device=device)):
        raise ValueError(
            f"tuning needs a GPU and the package triton; kernels do not run on device {str(device)!r} here"
        )

    from .kernels import tuning
    from .kernels.arguments import HeadShape

    coords = tuning.synthetic_coords(device) if coords is None else coords
    heads = HeadShape(num_kv_heads, num_heads // num_kv_heads, head_dim, head_dim)
    settings = (compression_block_size, selection_block_size, window_size, 0)
    return tuning.tune(coords, settings, topk, heads, dtype, budget)


def _runs_kernels(query: Tensor, key: Tensor, value: Tensor, topk: int, scale: float | None) -> bool:
    return (
        runs_kernels(value)
        and max(query.shape[-1], value.shape[-1]) <= WIDEST_HEAD
        and query.shape[-2] <= MOST_GROUPED_HEADS * key.shape[-2]
        and topk <= _MOST_CHOSEN
        and (scale is None or scale > 0)
    )


def _check_sizes(compression_block_size: int, selection_block_size: int, window_size: int, window_shift: int) -> None:
    check_at_least(
        1,
        compression_block_size=compression_block_size,
        selection_block_size=selection_block_size,
        window_size=window_size,
    )
    check_at_least(0, window_shift=window_shift)
    _check_block_sizes(compression_block_size, selection_block_size)


def _check_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    compressed_key: Tensor,
    compressed_value: Tensor,
    gate: Tensor,
    cache: CoordinateCache,
) -> None:
    check_floating(
        query=query,
        key=key,
        value=value,
        compressed_key=compressed_key,
        compressed_value=compressed_value,
        gate=gate,
    )
    check_shape("query", query, "N", "H", "D")
    check_rows("query", query, cache)
    (num_tokens, heads, dim), num_compressed = query.shape, compressed_key.shape[0]
    check_shape("key", key, num_tokens, "H_kv", dim)
    kv_heads = key.shape[1]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"`key` must have a number of heads that divides the {heads} of `query`, got {kv_heads}")
    check_shape("value", value, num_tokens, kv_heads, "D_v")
    check_shape("compressed_key", compressed_key, "M", kv_heads, dim)
    check_shape("compressed_value", compressed_value, num_compressed, kv_heads, value.shape[2])
    check_shape("gate", gate, num_tokens, 3)


def _check_block_sizes(compression_block_size: int, selection_block_size: int) -> None:
    if selection_block_size % compression_block_size:
        raise ValueError(
            f"`selection_block_size` must be a multiple of `compression_block_size` {compression_block_size}, "
            f"got {selection_block_size}"
        )
