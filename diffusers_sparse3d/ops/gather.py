"""Copies of rows by index: the inner step of the operators in plain PyTorch, and permutations with gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


# Types of elements to copy rows by, the widest first.
_ELEMENTS = (torch.complex128, torch.int64, torch.int32)


def gather_rows(feats: Tensor, index: Tensor, out: Tensor | None = None) -> Tensor:
    """`feats[index]`, without a gradient.

    Args:
        feats: `[N, ...]`.
        index: int32 or int64, of any shape.
        out: `[index.numel(), ...]`, contiguous: memory for the result, on the CPU only.

    Returns:
        `[*index.shape, ...]`.
    """
    if feats.device.type == "cpu":
        gathered = torch.index_select(feats, 0, index.flatten(), out=out)
    else:
        rows = feats.contiguous().view(len(feats), feats.shape[1:].numel())
        gathered = take_rows(rows, index.flatten()).unflatten(1, feats.shape[1:])
    return gathered.unflatten(0, index.shape)


def take_rows(feats: Tensor, index: Tensor) -> Tensor:
    """`feats[index]` of contiguous rows `[N, C]` and a flat index, copied element by element.

    CUDA's `index_select` spends a thread block on each row, whatever its width: for rows of 32 half-precision
    channels, copying a few wide elements is seven times as fast.
    """
    row_bytes = feats.shape[1] * feats.element_size()
    for dtype in _ELEMENTS:
        if row_bytes and row_bytes % dtype.itemsize == 0 and dtype.itemsize >= feats.element_size():
            elements = feats.view(dtype)
            width = elements.shape[1]
            flat = index[:, None].long() * width + torch.arange(width, device=index.device)
            return torch.take(elements, flat).view(feats.dtype)
    return torch.index_select(feats, 0, index)


def permute_rows(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
    """`rows[order]` for a permutation of all rows, differentiable any number of times.

    The gradient gathers too. That of `index_select` adds each row to zeros with atomic operations, which takes a GPU
    several times as long.

    Args:
        rows: `[N, ...]`.
        order: `[N]` int64, each row once.
        inverse: `[N]` int64, the place of each row in `order`.
    """
    if not (torch.is_grad_enabled() and rows.requires_grad):
        return rows.index_select(0, order)
    return _Permuted.apply(rows, order, inverse)


class _Permuted(torch.autograd.Function):
    """`permute_rows` with its gradient."""

    @staticmethod
    def forward(rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        return rows.index_select(0, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        # Apart from `forward`, as `torch.func.grad` wants it.
        _, order, inverse = inputs
        ctx.save_for_backward(order, inverse)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        order, inverse = ctx.saved_tensors
        return permute_rows(gradient, inverse, order), None, None
