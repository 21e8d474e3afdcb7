"""Public functions of the sparse convolution."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..checks import check_floating, check_is_cache, check_shape
from ..runtime.dispatch import runs_kernels
from .reference import sparse_conv3d_reference, sparse_subdivide_conv3d_reference


if TYPE_CHECKING:
    from ...sparse_tensor import CoordinateCache


def plan_sparse_conv3d(feats: Tensor, weight: Tensor, cache: CoordinateCache) -> None:
    """Make the tables of coordinates that `sparse_conv3d` and `sparse_subdivide_conv3d` need; `cache` keeps them.

    Without this, the first call makes them. After this, the functions may be captured in a CUDA graph, and are traced
    by `torch.compile(fullgraph=True)`.

    Args:
        feats: `[*, Cin]`; only dtype and device matter. Under autocast, the tables are made for the autocast dtype.
        weight: `[27, Cin, Cout]`, or `[Cin, Cout]`, which needs no tables. The tables of its gradient are made if it
            requires a gradient and gradients are enabled.
        cache: of the coordinates of the voxels.
    """
    if weight.ndim == 2:
        return
    cache.neighbour_map()
    dtype = _compute_dtype(feats)
    if runs_kernels(feats.new_empty(0, dtype=dtype)):
        from . import plan

        plan.plan_convolution(cache, weight, dtype)


def sparse_conv3d(
    feats: Tensor, weight: Tensor, bias: Tensor | None = None, cache: CoordinateCache | None = None
) -> Tensor:
    """Submanifold convolution of kernel size 3 or 1: out[p] = bias + sum_k in[p + offset_k] @ weight[k].

    The convolution of the sparse SDF VAE (arXiv 2505.17412, section 3.1). Voxels that do not exist count as zeros.
    Differentiable (once) in `feats`, `weight` and `bias`. Under autocast it runs in the autocast dtype, as the dense
    convolutions do. float16, bfloat16 and float32 on a GPU run Triton kernels if the package triton is installed;
    everything else runs the reference.

    Args:
        feats: `[N, Cin]` floating point.
        weight: `[27, Cin, Cout]`, offset k = (k % 3 - 1, k // 3 % 3 - 1, k // 9 - 1) in (x, y, z); `[Cin, Cout]` for
            kernel size 1.
        bias: `[Cout]` or None.
        cache: of the coordinates of the N voxels; not used for kernel size 1.

    Returns:
        `[N, Cout]` in the dtype of `feats`.

    Raises:
        TypeError: if features or weights are no tensors.
        ValueError: if a dtype or shape does not fit, or the kernel size is 3 and `cache` is missing or has another
            number of voxels.
    """
    _check_weights(feats, weight, bias)
    feats, weight = _autocast(feats, weight)
    if weight.ndim == 2:
        output = feats @ weight
        return output if bias is None else output + bias.to(output.dtype)
    cache = _checked_cache(feats, cache)
    if runs_kernels(feats):
        from . import operator

        return operator.sparse_conv3d(feats, weight, bias, cache)
    return sparse_conv3d_reference(feats, weight, bias, cache.neighbour_map())


def sparse_subdivide_conv3d(feats: Tensor, weight: Tensor, bias: Tensor | None, cache: CoordinateCache) -> Tensor:
    """Split every voxel into its eight children, which take over its features, then convolve the children.

    The same as `sparse_conv3d(feats.repeat_interleave(8, 0), weight, bias, cache.subdivide())`, but computed from the
    parents: of a child's 27 neighbours at most 8 have different parents. Neither the features nor the neighbour map of
    the children are made.

    Args:
        feats: `[N, Cin]` features of the parents.
        weight: `[27, Cin, Cout]` of the convolution on the children.
        bias: `[Cout]` or None.
        cache: of the coordinates of the parents.

    Returns:
        `[8 N, Cout]`: the children of voxel i are rows 8 i .. 8 i + 7 in the order of `subdivide_coords`.

    Raises:
        TypeError: if features or weights are no tensors.
        ValueError: if a dtype or shape does not fit, or `cache` has another number of voxels.
    """
    _check_weights(feats, weight, bias)
    check_shape("weight", weight, 27, "Cin", "Cout")
    feats, weight = _autocast(feats, weight)
    cache = _checked_cache(feats, cache)
    if runs_kernels(feats):
        from . import operator

        return operator.sparse_subdivide_conv3d(feats, weight, bias, cache)
    return sparse_subdivide_conv3d_reference(feats, weight, bias, cache.neighbour_map())


def _check_weights(feats: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_floating(feats=feats, weight=weight)
    check_shape("feats", feats, "N", "Cin")
    if weight.ndim == 2:
        check_shape("weight", weight, feats.shape[1], "Cout")
    else:
        check_shape("weight", weight, 27, feats.shape[1], "Cout")
    if bias is not None:
        check_floating(bias=bias)
        check_shape("bias", bias, weight.shape[-1])
    if weight.dtype != feats.dtype and not torch.is_autocast_enabled(feats.device.type):
        raise ValueError(f"`weight` must have the dtype of `feats`, {feats.dtype}, got {weight.dtype}")


def _autocast(feats: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    if torch.is_autocast_enabled(feats.device.type):
        dtype = _compute_dtype(feats)
        return feats.to(dtype), weight.to(dtype)
    return feats, weight


def _compute_dtype(feats: Tensor) -> torch.dtype:
    device_type = feats.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else feats.dtype


def _checked_cache(feats: Tensor, cache: CoordinateCache | None) -> CoordinateCache:
    """The cache, which must have as many voxels as there are rows of features."""
    if cache is not None:
        check_is_cache(cache)
    if cache is None or cache.coords.shape[0] != feats.shape[0]:
        voxels = "missing" if cache is None else f"one of {cache.coords.shape[0]} voxels"
        raise ValueError(f"`cache` must be of the {feats.shape[0]} voxels of `feats`, got {voxels}")
    return cache
