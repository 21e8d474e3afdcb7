"""Forward pass of the convolution and gradient of its input: an implicit matrix product over the neighbour map.

A program makes a tile of rows by columns of the output. It goes through the offsets that its rows have and, of each,
through the input channels, and gathers the rows of the neighbours as it multiplies: nothing is stored in between. One
kernel serves three layers, which differ in the entries that its loop goes through:

- `SAME`: the 27 offsets of a voxel. The gradient of the input is the same layer with mirrored, transposed weights.
- `SUBDIVIDE`: a program makes the outputs of one child of each voxel; its entries are the 8 corners of that child,
  the different parents that the child's 27 neighbours have (`reference.corner_weight`).
- `MERGE`, the gradient of `SUBDIVIDE`: 8 children times 8 corners.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import cdiv, dot_precision, next_power_of_2, num_multiprocessors, on_device_of_first_argument
from ...runtime.launch import Kernel
from .common import LARGE_TENSOR, MERGE, SAME, SMALLEST, SUBDIVIDE, corner_offset, fit_stages, make_layer


if TYPE_CHECKING:
    from ..plan import ConvolutionPlan


# The offsets of a tile are shared out to at most so many programs.
_MOST_PARTS = 8


class Tile(NamedTuple):
    """Compile-time constants of a step: rows and columns of the output, and input channels."""

    ROWS: tl.constexpr
    COLUMNS: tl.constexpr
    DEPTH: tl.constexpr


@triton.jit
def _or(left, right):
    return left | right


@triton.jit
def _lowest_bit(bits):
    """The number of the lowest bit of a positive integer below 2^27, from the exponent of a float."""
    lowest = (bits & -bits).to(tl.float32)
    return (lowest.to(tl.int32, bitcast=True) >> 23) - 127


@Kernel
@triton.jit
def _convolve_kernel(
    feats,
    weight,
    bias,
    output,
    plan,
    num_rows,
    num_parts,
    layer,
    tile,
):
    """A tile of the output of one child (of the voxels themselves, but for SUBDIVIDE) from one part of the offsets.

    Args:
        feats: `[N, IN]` input; for MERGE `[8 N, IN]`.
        weight: `[27, IN, OUT]`; for SUBDIVIDE and MERGE `[8 children, 8 corners, IN, OUT]`.
        bias: `[OUT]`, or None.
        output: `[num_parts, N, OUT]`; for SUBDIVIDE `[num_parts, 8 N, OUT]`.
        plan: `ConvolutionPlan`, the neighbours and, where rows are sorted, their order and masks of offsets.
        num_rows: N, the voxels.
        num_parts: into how many parts the offsets of each tile are divided.
        layer: `Layer`, channels and kind.
        tile: `Tile`, the size of a step.
    """
    IN: tl.constexpr = layer.IN
    OUT: tl.constexpr = layer.OUT
    KIND: tl.constexpr = layer.KIND
    COLUMN_TILES: tl.constexpr = (OUT + tile.COLUMNS - 1) // tile.COLUMNS
    DEPTH_STEPS: tl.constexpr = (IN + tile.DEPTH - 1) // tile.DEPTH
    OUTPUT_CHILDREN: tl.constexpr = 8 if KIND == SUBDIVIDE else 1
    INPUT_CHILDREN: tl.constexpr = 8 if KIND == MERGE else 1
    ENTRIES: tl.constexpr = 32 if KIND == SAME else 8

    # Programs that gather the same rows follow one another.
    program = tl.program_id(0)
    part = tl.program_id(1)
    output_child = program // COLUMN_TILES % OUTPUT_CHILDREN
    # [COLUMNS]
    columns = program % COLUMN_TILES * tile.COLUMNS + tl.arange(0, tile.COLUMNS)
    is_column = columns < OUT
    # [ROWS]
    places = program // (COLUMN_TILES * OUTPUT_CHILDREN) * tile.ROWS + tl.arange(0, tile.ROWS)
    valid = places < num_rows
    tile_mask = (1 << 27) - 1
    if plan.masks is not None:
        tile_mask = tl.reduce(tl.load(plan.masks + places, mask=valid, other=0), 0, _or)

    # [ROWS, COLUMNS]
    total = tl.zeros((tile.ROWS, tile.COLUMNS), tl.float32)
    for input_child in range(INPUT_CHILDREN):
        child = input_child if KIND == MERGE else output_child
        # [ENTRIES]: entry e is offset e or, of a child, its corner e
        entries = tl.arange(0, ENTRIES)
        if KIND == SAME:
            offsets = entries
        elif KIND == SUBDIVIDE:
            offsets = corner_offset(child, entries)
        else:
            offsets = 26 - corner_offset(child, entries)
        present = tile_mask >> offsets & 1
        count = tl.sum(present)
        rank = tl.cumsum(present, 0) - present
        share = (count + num_parts - 1) // num_parts
        mine = present * ((rank >= part * share) & (rank < (part + 1) * share)).to(tl.int32)
        bits = tl.sum(mine << entries)

        for step in range(tl.sum(mine) * DEPTH_STEPS):
            entry = _lowest_bit(bits)
            if KIND == SAME:
                offset = entry
                matrix = entry
            elif KIND == SUBDIVIDE:
                offset = corner_offset(child, entry)
                matrix = child * 8 + entry
            else:
                offset = 26 - corner_offset(child, entry)
                matrix = child * 8 + entry
            # [ROWS]
            rows = tl.load(plan.neighbours + offset.to(tl.int64) * num_rows + places, mask=valid, other=num_rows)
            exists = rows < num_rows
            if KIND == MERGE:
                rows = rows * 8 + child
            if layer.LARGE:
                rows = rows.to(tl.int64)
            # The interpreter has no remainder of a number by a constant.
            depth_step = step - step // DEPTH_STEPS * DEPTH_STEPS
            # [DEPTH]
            channels = depth_step * tile.DEPTH + tl.arange(0, tile.DEPTH)
            is_channel = channels < IN
            # [ROWS, DEPTH]
            is_input = exists[:, None] if IN % tile.DEPTH == 0 else exists[:, None] & is_channel[None, :]
            inputs = tl.load(feats + (rows * IN)[:, None] + channels[None, :], mask=is_input, other=0.0)
            # [DEPTH, COLUMNS]
            matrices = tl.load(
                weight + (matrix * (IN * OUT) + channels * OUT)[:, None] + columns[None, :],
                mask=is_channel[:, None] & is_column[None, :],
                other=0.0,
            )
            # [ROWS, COLUMNS]
            total = tl.dot(inputs, matrices, total, input_precision=layer.PRECISION)
            bits = tl.where(depth_step == DEPTH_STEPS - 1, bits & (bits - 1), bits)

    if bias is not None:
        total += tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)[None, :]
    # [ROWS]
    rows = places
    if plan.order is not None:
        rows = tl.load(plan.order + places, mask=valid, other=0)
    if KIND == SUBDIVIDE:
        rows = rows * 8 + output_child
    if layer.LARGE:
        rows = rows.to(tl.int64)
    output += part.to(tl.int64) * num_rows * (OUTPUT_CHILDREN * OUT)
    mask = valid[:, None] & is_column[None, :]
    tl.store(output + (rows * OUT)[:, None] + columns[None, :], total.to(output.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class ConvolutionShape:
    """How `convolve` cuts its work.

    Attributes:
        rows: voxels of a tile.
        columns: output channels of a tile.
        depth: input channels of a step.
        num_warps: warps of a program.
        num_stages: stages of its pipeline.
        by_mask: whether rows are sorted by the offsets that they have.
    """

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    by_mask: bool

    @functools.cached_property
    def tile(self) -> Tile:
        return Tile(tl.constexpr(self.rows), tl.constexpr(self.columns), tl.constexpr(self.depth))


@functools.lru_cache
def convolution_shape(in_channels: int, out_channels: int, dtype: torch.dtype) -> ConvolutionShape:
    """The tile shape for a layer; wide layers, whose time is matrix products, sort their rows."""
    columns = min(128, max(SMALLEST, next_power_of_2(out_channels)))
    depth = min(64, max(SMALLEST, next_power_of_2(in_channels)))
    wide = max(in_channels, out_channels) > 64
    if dtype == torch.float32:
        return ConvolutionShape(64, min(64, columns), min(32, depth), 4, 2, by_mask=wide)
    return ConvolutionShape(128, columns, depth, 8 if columns == 128 else 4, 4, by_mask=wide)


def offset_parts(programs: int, device: torch.device) -> int:
    """Into how many parts the offsets are divided, so that few rows occupy all multiprocessors."""
    return max(1, min(_MOST_PARTS, 2 * num_multiprocessors(device) // max(1, programs)))


@on_device_of_first_argument
def convolve(
    feats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: ConvolutionPlan,
    shape: ConvolutionShape,
    kind: tl.constexpr = SAME,
) -> Tensor:
    """The output of a layer.

    Args:
        feats: `[N, Cin]`, contiguous; for `MERGE` `[8 N, Cin]`.
        weight: `[27, Cin, Cout]` in the dtype of `feats`, contiguous; for `SUBDIVIDE` and `MERGE` `[8 children,
            8 corners, Cin, Cout]`.
        bias: `[Cout]` or None.
        plan: made with the `by_mask` of the shape.
        shape: how the work is cut.
        kind: `SAME`, `SUBDIVIDE` or `MERGE`.

    Returns:
        `[N, Cout]`, for `SUBDIVIDE` `[8 N, Cout]`.
    """
    in_channels, out_channels = weight.shape[-2:]
    children = 8 if kind.value == SUBDIVIDE.value else 1
    output = feats.new_empty(children * plan.num_rows, out_channels)
    if plan.num_rows == 0:
        return output
    programs = cdiv(plan.num_rows, shape.rows) * cdiv(out_channels, shape.columns) * children
    num_parts = offset_parts(programs, feats.device)
    parts = output if num_parts == 1 else feats.new_empty(num_parts, *output.shape, dtype=torch.float32)
    large = max(feats.numel(), output.numel()) >= LARGE_TENSOR
    stage_bytes = (shape.rows + shape.columns) * shape.depth * feats.element_size() + 4 * shape.rows
    _convolve_kernel[programs, num_parts](
        feats,
        weight,
        bias if num_parts == 1 else None,
        parts,
        plan,
        plan.num_rows,
        num_parts,
        make_layer(in_channels, out_channels, kind.value, large, dot_precision(feats.dtype)),
        shape.tile,
        num_warps=shape.num_warps,
        num_stages=fit_stages(shape.num_stages, stage_bytes, feats.device),
    )
    if num_parts > 1:
        total = parts.sum(0)
        output = (total if bias is None else total + bias).to(feats.dtype)
    return output
