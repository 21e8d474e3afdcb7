"""Gradient of the weights: for every offset, gathered inputs transposed times gradients of the output.

A program makes a tile of the matrices of a few offsets from a part of the rows; the parts are added up by a second
pass, so that nothing is added by atomics. Several offsets at once serve narrow layers: they share the rows of the
gradient, and make tiles that are worth a matrix unit. Where rows are sorted by their offsets, a program takes one
offset, and only the tiles of rows that have it.

Floor in bytes: as of the forward pass, inputs and gradients once and the map once. What is read in fact, mostly from
caches: up to 27 inputs a voxel, and the gradients once for every group of offsets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton_dispatch import dot_precision, num_multiprocessors, on_device_of_first_argument
from .convolution import LARGE_TENSOR, SMALLEST, corner_offset, fit_stages
from .plan import NUM_OFFSETS, ConvPlan


# The parts that are added up hold at most so many float32 values, unless one part alone is larger.
_MOST_PARTIAL_VALUES = 1 << 26


@triton.jit
def _weight_gradient_kernel(
    feats,
    grad_output,
    parts,
    neighbours,
    order,
    tile_lists,
    tile_counts,
    num_rows,
    num_tiles,
    num_splits,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    SPLIT: tl.constexpr,
    SORTED: tl.constexpr,
    LARGE: tl.constexpr,
    PRECISION: tl.constexpr,
    ENTRIES: tl.constexpr,
    DEPTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    CHILDREN: tl.constexpr = 8 if SPLIT else 1
    CHILD_ENTRIES: tl.constexpr = 8 if SPLIT else 27
    COLUMN_TILES: tl.constexpr = (OUT + COLUMNS - 1) // COLUMNS
    DEPTH_TILES: tl.constexpr = (IN + DEPTH - 1) // DEPTH
    GROUPS: tl.constexpr = (CHILD_ENTRIES + ENTRIES - 1) // ENTRIES
    program = tl.program_id(0)
    split = tl.program_id(1)
    columns = program % COLUMN_TILES * COLUMNS + tl.arange(0, COLUMNS)
    channels = program // COLUMN_TILES % DEPTH_TILES * DEPTH + tl.arange(0, DEPTH)
    group = program // (COLUMN_TILES * DEPTH_TILES) % GROUPS
    child = program // (COLUMN_TILES * DEPTH_TILES * GROUPS)

    entries = group * ENTRIES + tl.arange(0, ENTRIES)
    is_entry = entries < CHILD_ENTRIES
    offsets = tl.where(is_entry, corner_offset(child, entries) if SPLIT else entries, 0)
    maps = neighbours + offsets.to(tl.int64) * num_rows

    count = num_tiles
    if SORTED:
        # One entry only: its tiles are listed.
        offset = tl.sum(offsets)
        tile_lists += offset * num_tiles
        count = tl.load(tile_counts + offset)
    share = (count + num_splits - 1) // num_splits
    total = tl.zeros((ENTRIES * DEPTH, COLUMNS), tl.float32)
    for number in range(split * share, tl.minimum((split + 1) * share, count)):
        tile = number
        if SORTED:
            tile = tl.load(tile_lists + number)
        places = tile * ROWS + tl.arange(0, ROWS)
        valid = places < num_rows
        rows = tl.load(maps[None, :] + places[:, None], mask=valid[:, None] & is_entry[None, :], other=num_rows)
        exists = (rows < num_rows)[:, :, None] & (channels < IN)[None, None, :]
        if LARGE:
            rows = rows.to(tl.int64)
        inputs = tl.load(feats + (rows * IN)[:, :, None] + channels[None, None, :], mask=exists, other=0.0)
        inputs = tl.reshape(inputs, (ROWS, ENTRIES * DEPTH))

        outputs = places
        if SORTED:
            outputs = tl.load(order + places, mask=valid, other=0)
        if SPLIT:
            outputs = outputs * 8 + child
        if LARGE:
            outputs = outputs.to(tl.int64)
        gradients = tl.load(
            grad_output + (outputs * OUT)[:, None] + columns[None, :],
            mask=valid[:, None] & (columns < OUT)[None, :],
            other=0.0,
        )
        total = tl.dot(tl.trans(inputs), gradients, total, input_precision=PRECISION)

    matrices = child * CHILD_ENTRIES + entries
    places = tl.reshape(matrices[:, None] * IN + channels[None, :], (ENTRIES * DEPTH,))
    mask = tl.reshape(is_entry[:, None] & (channels < IN)[None, :], (ENTRIES * DEPTH,))
    parts += split.to(tl.int64) * (CHILDREN * CHILD_ENTRIES * IN * OUT)
    tl.store(parts + (places * OUT)[:, None] + columns[None, :], total, mask=mask[:, None] & (columns < OUT)[None, :])


@dataclass(frozen=True)
class GradientShape:
    """How `weight_gradient` cuts its work.

    Attributes:
        entries: offsets (or corners of a child) of a program, a power of two; 1 where `by_mask`.
        depth: input channels of a program.
        columns: output channels of a program.
        rows: voxels of a step.
        num_warps, num_stages: how a program runs.
        by_mask: whether rows are sorted by their offsets.
    """

    entries: int
    depth: int
    columns: int
    rows: int
    num_warps: int
    num_stages: int
    by_mask: bool


def gradient_shape(in_channels: int, out_channels: int, dtype: torch.dtype) -> GradientShape:
    """The tile shape for a layer."""
    depth = min(128, max(SMALLEST, triton.next_power_of_2(in_channels)))
    columns = min(128, max(SMALLEST, triton.next_power_of_2(out_channels)))
    wide = max(in_channels, out_channels) > 64
    if dtype == torch.float32:
        depth, columns = min(64, depth), min(64, columns)
        return GradientShape(1 if wide else 64 // depth, depth, columns, 32, 4, 2, by_mask=wide)
    return GradientShape(1 if wide else min(8, 256 // depth), depth, columns, 64, 8, 4, by_mask=wide)


@on_device_of_first_argument
def weight_gradient(
    feats: Tensor, grad_output: Tensor, plan: ConvPlan, shape: GradientShape, split: bool = False
) -> Tensor:
    """
    Args:
        feats: `[N, Cin]`, contiguous.
        grad_output: `[N, Cout]` in the same dtype, contiguous; for the layer `SPLIT` of `convolve` `[8 N, Cout]`.
        plan: made with the `by_mask` of the shape, with lists of tiles of its `rows`.
        shape: how the work is cut.
        split: whether the layer is `SPLIT`.

    Returns:
        `[27, Cin, Cout]` float32, or `[8 children, 8 corners, Cin, Cout]`.
    """
    in_channels, out_channels = feats.shape[1], grad_output.shape[1]
    matrices = (8, 8) if split else (NUM_OFFSETS,)
    num_tiles = triton.cdiv(plan.num_rows, shape.rows)
    groups = 8 * triton.cdiv(8, shape.entries) if split else triton.cdiv(NUM_OFFSETS, shape.entries)
    programs = triton.cdiv(out_channels, shape.columns) * triton.cdiv(in_channels, shape.depth) * groups
    values = (64 if split else NUM_OFFSETS) * in_channels * out_channels
    # Several rounds of programs: offsets have different numbers of tiles.
    wanted = triton.cdiv(8 * num_multiprocessors(feats.device), programs)
    splits = max(1, min(wanted, num_tiles, _MOST_PARTIAL_VALUES // values))
    parts = feats.new_empty(splits, *matrices, in_channels, out_channels, dtype=torch.float32)
    stage_bytes = (shape.entries * shape.depth + shape.columns + 4) * shape.rows * feats.element_size()
    _weight_gradient_kernel[programs, splits](
        feats,
        grad_output,
        parts,
        plan.neighbours,
        plan.order,
        plan.tile_lists,
        plan.tile_counts,
        plan.num_rows,
        num_tiles,
        splits,
        IN=in_channels,
        OUT=out_channels,
        SPLIT=split,
        SORTED=plan.order is not None,
        LARGE=max(feats.numel(), grad_output.numel()) >= LARGE_TENSOR,
        PRECISION=dot_precision(feats.dtype),
        ENTRIES=shape.entries,
        DEPTH=shape.depth,
        COLUMNS=shape.columns,
        ROWS=shape.rows,
        num_warps=shape.num_warps,
        num_stages=fit_stages(shape.num_stages, stage_bytes, feats.device),
    )
    return parts[0] if splits == 1 else parts.sum(0)
