"""Submanifold 3x3x3 convolution in plain PyTorch: gather the neighbourhoods of a chunk of rows, one matrix product."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..gather import gather_rows


# Elements of the gathered neighbourhoods [rows, 27 * Cin] held at a time: what fits a CPU's caches, respectively what
# fills an accelerator while its memory stays bounded.
_CHUNK_ELEMENTS_CPU = 1 << 22
_CHUNK_ELEMENTS_ACCELERATOR = 1 << 27


class _Neighbourhoods:
    """Iterates over `(rows, columns)`: slices of the voxels and their gathered neighbourhoods `[rows, 27 * C]`.

    On the CPU, `columns` is one buffer that every step overwrites.
    """

    def __init__(self, feats: Tensor, neighbours: Tensor):
        self.feats = torch.cat([feats, feats.new_zeros(1, feats.shape[1])])  # row N stands for missing voxels
        self.neighbours = neighbours

    def __iter__(self):
        num_offsets, num_voxels = self.neighbours.shape
        channels = self.feats.shape[1]
        on_cpu = self.feats.device.type == "cpu"
        elements = _CHUNK_ELEMENTS_CPU if on_cpu else _CHUNK_ELEMENTS_ACCELERATOR
        chunk = max(1, min(num_voxels, elements // (num_offsets * channels)))
        buffer = self.feats.new_empty(chunk * num_offsets, channels) if on_cpu else None
        for start in range(0, num_voxels, chunk):
            rows = slice(start, min(start + chunk, num_voxels))
            index = self.neighbours[:, rows].T.reshape(-1)
            gathered = gather_rows(self.feats, index, out=buffer[: index.numel()] if on_cpu else None)
            yield rows, gathered.view(-1, num_offsets * channels)


def _convolve(feats: Tensor, weight: Tensor, neighbours: Tensor) -> Tensor:
    matrix = weight.reshape(-1, weight.shape[-1])
    output = feats.new_empty(neighbours.shape[1], matrix.shape[1])
    for rows, columns in _Neighbourhoods(feats, neighbours):
        torch.mm(columns, matrix, out=output[rows])
    return output


class _SparseConv3d(torch.autograd.Function):
    """Keeps `feats` alone for the backward and gathers again, instead of keeping 27 copies of every row.

    The neighbour relation is symmetric, so the gradient of the input is the convolution of the gradient of the output
    with the mirrored, transposed weight: no scatter, the same result every time.
    """

    @staticmethod
    def forward(ctx: Any, feats: Tensor, weight: Tensor, neighbours: Tensor) -> Tensor:
        ctx.save_for_backward(feats, weight, neighbours)
        return _convolve(feats, weight, neighbours)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        feats, weight, neighbours = ctx.saved_tensors
        grad_feats = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_feats = _convolve(grad_output, weight.flip(0).transpose(1, 2), neighbours)
        if ctx.needs_input_grad[1]:
            accumulator = torch.promote_types(weight.dtype, torch.float32)
            grad_weight = torch.zeros(weight.shape, dtype=accumulator, device=weight.device).flatten(0, 1)
            for rows, columns in _Neighbourhoods(feats, neighbours):
                grad_weight += columns.T @ grad_output[rows]
            grad_weight = grad_weight.view(weight.shape).to(weight.dtype)
        return grad_feats, grad_weight, None


def sparse_conv3d_reference(feats: Tensor, weight: Tensor, bias: Tensor | None, neighbours: Tensor) -> Tensor:
    """See `ops.sparse_conv.sparse_conv3d`; `neighbours` is `CoordinateCache.neighbour_map()`, `[27, N]`."""
    output = _SparseConv3d.apply(feats, weight, neighbours)
    return output if bias is None else output + bias.to(output.dtype)


def _split_offsets(weight: Tensor, padded: bool) -> Tensor:
    """`[27, Cin, Cout]` for children -> `[parents, Cin, 8, Cout]`, for each child the weights of the parents it meets.

    A convolution that follows a nearest split into eight children reads the same parent several times: the weights
    that meet the same parent are summed, for each child. It works axis by axis: a lower child finds its lower
    neighbour in the parent before and itself and its upper neighbour in its own parent; an upper child finds itself
    and its lower neighbour in its own parent and its upper neighbour in the one after.
    """
    weight = weight.unflatten(0, (3, 3, 3))
    for axis in (2, 1, 0):  # x, y, z: x runs fastest in the offsets and slowest in the children
        lower, middle, upper = weight.unbind(axis)
        zero = [torch.zeros_like(middle)] if padded else []
        lower_child = torch.stack([lower, middle + upper, *zero], axis)
        upper_child = torch.stack([*zero, lower + middle, upper], axis)
        weight = torch.stack([lower_child, upper_child], -2)
    return weight.flatten(-4, -2).flatten(0, 2)


def subdivide_weight(weight: Tensor) -> Tensor:
    """`[27, Cin, Cout]` for the children of a grid -> `[27, Cin, 8 * Cout]` on the grid itself, many of them zeros."""
    return _split_offsets(weight, padded=True).flatten(2)


def corner_weight(weight: Tensor) -> Tensor:
    """The weights of `subdivide_weight` that are not zeros by definition: `[8 corners, Cin, 8 children, Cout]`.

    Corner (cx, cy, cz) of 0 and 1, number cx + 2 cy + 4 cz, of child (bx, by, bz), is the parent at the offset
    (bx + cx - 1, by + cy - 1, bz + cz - 1).
    """
    return _split_offsets(weight, padded=False)


def sparse_subdivide_conv3d_reference(
    feats: Tensor, weight: Tensor, bias: Tensor | None, neighbours: Tensor
) -> Tensor:
    """See `ops.sparse_conv.sparse_subdivide_conv3d`."""
    output = sparse_conv3d_reference(feats, subdivide_weight(weight), None, neighbours)
    output = output.view(8 * feats.shape[0], weight.shape[-1])
    return output if bias is None else output + bias.to(output.dtype)
