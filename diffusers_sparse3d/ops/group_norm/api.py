"""Public functions of the group normalisation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..checks import check_at_least, check_eps, check_floating, check_rows, check_shape
from ..runtime.dispatch import runs_kernels
from .plan import plan_group_norm
from .reference import dense_group_norm_reference, sparse_group_norm_reference


if TYPE_CHECKING:
    from ...sparse_tensor import CoordinateCache


def plan_sparse_group_norm(feats: Tensor, cache: CoordinateCache) -> None:
    """Make the tables of coordinates that `sparse_group_norm` needs; `cache` keeps them.

    Without this, the first call of `sparse_group_norm` makes them. After this, it may be captured in a CUDA graph, and
    is traced by `torch.compile(fullgraph=True)`.

    Args:
        feats: `[*, C]`; only dtype and device matter.
        cache: of the coordinates of the voxels.
    """
    if runs_kernels(feats):
        plan_group_norm(cache)


def sparse_group_norm(
    feats: Tensor,
    cache: CoordinateCache,
    num_groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    silu: bool = False,
) -> Tensor:
    """Normalise each sample over its voxels and the channels of each group, computed in float32 or better.

    Differentiable (once) in `feats`, `weight` and `bias`. float16, bfloat16 and float32 on a GPU run Triton kernels if
    the package triton is installed; everything else runs the reference.

    Args:
        feats: `[N, C]` floating point.
        cache: of the coordinates of the N voxels, in any order; samples may be empty.
        num_groups: a divisor of C.
        weight: `[C]` scale.
        bias: `[C]` shift.
        eps: added to the (biased) variance.
        silu: whether to apply SiLU to the result.

    Returns:
        `[N, C]` in the dtype of `feats`.

    Raises:
        TypeError, ValueError: if an argument has another type, dtype or shape.
    """
    check_floating(feats=feats, weight=weight, bias=bias)
    check_shape("feats", feats, "N", "C")
    check_rows("feats", feats, cache)
    check_eps(eps)
    _check_groups(feats.shape[1], num_groups, weight, bias)
    if runs_kernels(feats) and feats.shape[0]:
        from . import operator

        return operator.sparse_group_norm(feats, cache, num_groups, weight, bias, eps, silu)
    batch_index = cache.coords[:, 0]
    return sparse_group_norm_reference(feats, batch_index, cache.batch_size, num_groups, weight, bias, eps, silu)


def dense_group_norm(
    hidden_states: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float = 1e-5, silu: bool = False
) -> Tensor:
    """Normalise each sample over its positions and the channels of each group, computed in float32 or better.

    The same as `torch.nn.functional.group_norm`, for patches of millions of voxels: PyTorch leaves all values of a
    group to one thread block of a GPU. Differentiable (once); kernels run as for `sparse_group_norm`.

    Args:
        hidden_states: `[B, C, *sizes]` floating point. The memory format channels last saves a copy.
        num_groups: a divisor of C.
        weight: `[C]` scale.
        bias: `[C]` shift.
        eps: added to the (biased) variance.
        silu: whether to apply SiLU to the result.

    Returns:
        `[B, C, *sizes]` in the dtype of `hidden_states`; channels last where kernels ran.

    Raises:
        TypeError, ValueError: if an argument has another type, dtype or shape.
    """
    check_floating(hidden_states=hidden_states, weight=weight, bias=bias)
    if hidden_states.ndim < 3:
        raise ValueError(f"`hidden_states` must have shape [B, C, *sizes], got {list(hidden_states.shape)}")
    check_eps(eps)
    _check_groups(hidden_states.shape[1], num_groups, weight, bias)
    if runs_kernels(hidden_states) and hidden_states.numel():
        from . import operator

        return operator.dense_group_norm(hidden_states, num_groups, weight, bias, eps, silu)
    return dense_group_norm_reference(hidden_states, num_groups, weight, bias, eps, silu)


def _check_groups(channels: int, num_groups: int, weight: Tensor, bias: Tensor) -> None:
    check_at_least(1, num_groups=num_groups)
    if channels % num_groups:
        raise ValueError(f"`num_groups` must divide the {channels} channels, got {num_groups}")
    check_shape("weight", weight, channels)
    check_shape("bias", bias, channels)
