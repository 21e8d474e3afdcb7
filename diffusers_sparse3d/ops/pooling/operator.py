"""Mean pooling as an operator of PyTorch, with gradients. It needs the package triton.

To `torch.compile` it is opaque, and its plan is plain tensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..runtime.operators import operator
from .kernels.mean_pool import mean_pool
from .kernels.mean_pool_gradient import mean_pool_gradient
from .plan import plan_pooling


if TYPE_CHECKING:
    from ...sparse_tensor import CoordinateCache


@operator("diffusers_sparse3d::sparse_mean_pool", mutates_args=())
def _pool(feats: Tensor, parents: Tensor, order: Tensor, starts: Tensor, exact_mean: bool) -> Tensor:
    """`feats [N, C]` and the tables of `plan_pooling` -> `[M, C]`; `parents` is for the gradient alone."""
    return mean_pool(feats.contiguous(), order, starts, exact_mean)


@_pool.register_fake
def _(feats: Tensor, parents: Tensor, order: Tensor, starts: Tensor, exact_mean: bool) -> Tensor:
    return feats.new_empty(starts.shape[0] - 1, feats.shape[1])


@operator("diffusers_sparse3d::sparse_mean_pool_backward", mutates_args=())
def _pool_backward(grad_output: Tensor, parents: Tensor, starts: Tensor, exact_mean: bool) -> Tensor:
    """`grad_output [M, C]` and the tables of `plan_pooling` -> `[N, C]`."""
    return mean_pool_gradient(grad_output.contiguous(), parents, starts, exact_mean)


@_pool_backward.register_fake
def _(grad_output: Tensor, parents: Tensor, starts: Tensor, exact_mean: bool) -> Tensor:
    return grad_output.new_empty(parents.shape[0], grad_output.shape[1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, parents, _, starts, ctx.exact_mean = inputs
    ctx.save_for_backward(parents, starts)


def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    return _pool_backward(grad_output, *ctx.saved_tensors, ctx.exact_mean), None, None, None, None


_pool.register_autograd(_gradients, setup_context=_keep)


def sparse_mean_pool(feats: Tensor, cache: CoordinateCache, factor: int, exact_mean: bool) -> Tensor:
    """See `ops.pooling.sparse_mean_pool`; there is at least one row."""
    return _pool(feats, *plan_pooling(cache, factor), exact_mean)
