"""Submanifold 3x3x3 convolution in plain PyTorch: the oracle of the kernels and the path of the CPU.

It gathers the neighbourhoods of a chunk of rows and multiplies them by the weights in one matrix product. To PyTorch
it is an operator: traced by `torch.compile`, the loop over chunks would fix the number of voxels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..gather import gather_rows
from ..runtime.operators import operator


# Elements of the gathered neighbourhoods [rows, 27 * Cin] held at a time. They fit in the caches of a CPU; on an
# accelerator they occupy all of it while memory stays bounded.
_CHUNK_ELEMENTS_CPU = 1 << 22
_CHUNK_ELEMENTS_ACCELERATOR = 1 << 27


class _Neighbourhoods:
    """Iterates over `(rows, columns)`: slices of the voxels and their gathered neighbourhoods `[rows, 27 * C]`.

    On the CPU, `columns` is one buffer that every step overwrites.
    """

    def __init__(self, feats: Tensor, neighbours: Tensor):
        self.feats = torch.cat([feats, feats.new_zeros(1, feats.shape[1])])  # row N stands for missing voxels
        self.neighbours = neighbours

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        num_offsets, num_voxels = self.neighbours.shape
        channels = self.feats.shape[1]
        on_cpu = self.feats.device.type == "cpu"
        elements = _CHUNK_ELEMENTS_CPU if on_cpu else _CHUNK_ELEMENTS_ACCELERATOR
        chunk = max(1, min(num_voxels, elements // (num_offsets * channels)))
        buffer = self.feats.new_empty(chunk * num_offsets, channels) if on_cpu else None
        for start in range(0, num_voxels, chunk):
            rows = slice(start, min(start + chunk, num_voxels))
            index = self.neighbours[:, rows].T.reshape(-1)
            gathered = gather_rows(self.feats, index, out=None if buffer is None else buffer[: index.numel()])
            yield rows, gathered.view(-1, num_offsets * channels)


@operator("diffusers_sparse3d::sparse_conv3d", mutates_args=())
def _convolve(feats: Tensor, weight: Tensor, neighbours: Tensor) -> Tensor:
    """`feats [N, Cin]`, `weight [27, Cin, Cout]` of the same dtype and `neighbours [27, N]` -> `[N, Cout]`."""
    matrix = weight.reshape(-1, weight.shape[-1])
    output = feats.new_empty(neighbours.shape[1], matrix.shape[1])
    for rows, columns in _Neighbourhoods(feats, neighbours):
        torch.mm(columns, matrix, out=output[rows])
    return output


@_convolve.register_fake
def _(feats: Tensor, weight: Tensor, neighbours: Tensor) -> Tensor:
    return feats.new_empty(neighbours.shape[1], weight.shape[-1])


@operator("diffusers_sparse3d::sparse_conv3d_weight_gradient", mutates_args=())
def _weight_gradient(feats: Tensor, grad_output: Tensor, neighbours: Tensor) -> Tensor:
    """`feats [N, Cin]`, `grad_output [N, Cout]` and `neighbours [27, N]` -> `[27, Cin, Cout]`, added up in float32."""
    num_offsets, (_, channels) = neighbours.shape[0], feats.shape
    dtype = torch.promote_types(feats.dtype, torch.float32)
    gradient = torch.zeros(num_offsets * channels, grad_output.shape[1], dtype=dtype, device=feats.device)
    for rows, columns in _Neighbourhoods(feats, neighbours):
        gradient += columns.T @ grad_output[rows]
    return gradient.view(num_offsets, channels, -1).to(feats.dtype)


@_weight_gradient.register_fake
def _(feats: Tensor, grad_output: Tensor, neighbours: Tensor) -> Tensor:
    return feats.new_empty(neighbours.shape[0], feats.shape[1], grad_output.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    # The gathered neighbourhoods, 27 copies of every row, are not kept: the backward pass gathers again.
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    # The neighbour relation is symmetric, so the gradient of the input is the convolution of the gradient of the
    # output with the mirrored, transposed weight: no scatter, and the same result every time.
    feats, weight, neighbours = ctx.saved_tensors
    grad_feats = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_feats = _convolve(grad_output, weight.flip(0).transpose(1, 2), neighbours)
    if ctx.needs_input_grad[1]:
        grad_weight = _weight_gradient(feats, grad_output, neighbours)
    return grad_feats, grad_weight, None


_convolve.register_autograd(_gradients, setup_context=_keep)


def sparse_conv3d_reference(feats: Tensor, weight: Tensor, bias: Tensor | None, neighbours: Tensor) -> Tensor:
    """See `ops.sparse_conv.sparse_conv3d`; `neighbours` is `CoordinateCache.neighbour_map()`, `[27, N]`."""
    output = _convolve(feats, weight, neighbours)
    # In place: the backward does not need the output, which is the largest tensor here.
    return output if bias is None else output.add_(bias.to(output.dtype))


def _split_offsets(weight: Tensor, padded: bool) -> Tensor:
    """The weights with which the eight children of a voxel meet the parents around it.

    A convolution after a nearest split into eight children reads the same parent several times, so the weights that
    meet the same parent are summed, for each child. Axis by axis, a lower child finds its lower neighbour in the
    parent before, and itself and its upper neighbour in its own parent. An upper child finds itself and its lower
    neighbour in its own parent, and its upper neighbour in the parent after.

    Args:
        weight: `[27, Cin, Cout]` of the convolution on the children.
        padded: whether all 27 parents around a voxel are listed, with zeros for those that a child does not meet;
            otherwise the 8 that it meets.

    Returns:
        `[parents, Cin, 8, Cout]`.
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
    return output if bias is None else output.add_(bias.to(output.dtype))
