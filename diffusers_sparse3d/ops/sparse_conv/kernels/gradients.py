"""Gradient of the weights: for every offset, gathered inputs transposed times gradients of the output.

A program makes a tile of the matrices of a few offsets from a part of the rows; the parts are added up by a second
pass, so that nothing is added by atomics. Several offsets at once serve narrow layers: they share the rows of the
gradient, and make tiles that are worth a matrix unit. In wide layers a program takes one offset, and goes through the
pairs of rows that have it.

Both operands of the product are gathered in two dimensions. Only so do they go to the matrix unit from where they
arrive in shared memory, with more than one step on its way; tensors that are reshaped after they are loaded do not.

Floor in bytes: as of the forward pass, inputs and gradients once and the map once. What is read in fact, mostly from
caches: up to 27 inputs a voxel, and the gradients once for every group of offsets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import cdiv, dot_precision, next_power_of_2, num_multiprocessors, on_device_of_first_argument
from ...runtime.launch import Kernel
from .convolution import LARGE_TENSOR, SMALLEST, corner_offset, fit_stages
from .plan import NUM_OFFSETS, GradientPlan


# The parts that are added up hold at most so many float32 values, unless one part alone is larger.
_MOST_PARTIAL_VALUES = 1 << 26


@Kernel
@triton.jit
def _weight_gradient_kernel(
    feats,
    grad_output,
    parts,
    neighbours,
    input_rows,
    output_rows,
    starts,
    num_rows,
    num_splits,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    SPLIT: tl.constexpr,
    PAIRS: tl.constexpr,
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
    WIDTH: tl.constexpr = ENTRIES * DEPTH
    program = tl.program_id(0)
    split = tl.program_id(1)
    columns = program % COLUMN_TILES * COLUMNS + tl.arange(0, COLUMNS)
    channels = program // COLUMN_TILES % DEPTH_TILES * DEPTH + tl.arange(0, WIDTH) % DEPTH
    group = program // (COLUMN_TILES * DEPTH_TILES) % GROUPS
    child = program // (COLUMN_TILES * DEPTH_TILES * GROUPS)

    if PAIRS:
        # One entry only.
        offset = corner_offset(child, group) if SPLIT else group
        # The pairs of an offset are those of the opposite one, the other way round.
        swapped = offset > 13
        lower = tl.where(swapped, 26 - offset, offset)
        start = tl.load(starts + lower)
        count = tl.load(starts + lower + 1) - start
        input_list = tl.where(swapped, output_rows, input_rows) + start
        output_list = tl.where(swapped, input_rows, output_rows) + start
    else:
        entries = group * ENTRIES + tl.arange(0, ENTRIES)
        is_entry = entries < CHILD_ENTRIES
        offsets = tl.where(is_entry, corner_offset(child, entries) if SPLIT else entries, 0)
        maps = neighbours + offsets.to(tl.int64) * num_rows
        count = num_rows

    num_steps = tl.cdiv(count, ROWS)
    share = (num_steps + num_splits - 1) // num_splits
    total = tl.zeros((WIDTH, COLUMNS), tl.float32)
    for step in range(split * share, tl.minimum((split + 1) * share, num_steps)):
        places = step * ROWS + tl.arange(0, ROWS)
        valid = places < count
        if PAIRS:
            rows = tl.load(input_list + places, mask=valid, other=0)[:, None]
            outputs = tl.load(output_list + places, mask=valid, other=0)
            exists = valid[:, None]
        else:
            rows = tl.load(maps[None, :] + places[:, None], mask=valid[:, None] & is_entry[None, :], other=num_rows)
            # In two dimensions from here on: what is gathered goes straight to the matrix product.
            rows = tl.reshape(tl.broadcast_to(rows[:, :, None], (ROWS, ENTRIES, DEPTH)), (ROWS, WIDTH))
            # Else not every version of the compiler sees that neighbouring channels may be loaded together.
            rows = tl.max_constancy(rows, (1, DEPTH))
            outputs = places
            exists = rows < num_rows
        if SPLIT:
            outputs = outputs * 8 + child
        if LARGE:
            rows = rows.to(tl.int64)
            outputs = outputs.to(tl.int64)
        listed = valid[:, None]
        if IN % DEPTH != 0:
            exists = exists & (channels < IN)[None, :]
        if OUT % COLUMNS != 0:
            listed = listed & (columns < OUT)[None, :]
        inputs = tl.load(feats + (rows * IN + channels[None, :]), mask=exists, other=0.0)
        gradients = tl.load(grad_output + (outputs * OUT)[:, None] + columns[None, :], mask=listed, other=0.0)
        total = tl.dot(tl.trans(inputs), gradients, total, input_precision=PRECISION)

    matrices = child * CHILD_ENTRIES + group * ENTRIES + tl.arange(0, WIDTH) // DEPTH
    places = matrices * IN + channels
    is_value = (matrices < (child + 1) * CHILD_ENTRIES) & (channels < IN)
    parts += split.to(tl.int64) * (CHILDREN * CHILD_ENTRIES * IN * OUT)
    mask = is_value[:, None] & (columns < OUT)[None, :]
    tl.store(parts + (places * OUT)[:, None] + columns[None, :], total, mask=mask)


@dataclass(frozen=True)
class GradientShape:
    """How `weight_gradient` cuts its work.

    Attributes:
        entries: offsets (or corners of a child) of a program, a power of two; 1 where `by_pairs`.
        depth: input channels of a program.
        columns: output channels of a program.
        rows: voxels of a step.
        num_warps, num_stages: how a program runs.
        by_pairs: whether it goes through the pairs of rows of an offset, or through all rows.
    """

    entries: int
    depth: int
    columns: int
    rows: int
    num_warps: int
    num_stages: int
    by_pairs: bool


def gradient_shape(in_channels: int, out_channels: int, dtype: torch.dtype) -> GradientShape:
    """The tile shape for a layer."""
    depth = min(128, max(SMALLEST, next_power_of_2(in_channels)))
    columns = min(256, max(SMALLEST, next_power_of_2(out_channels)))
    wide = max(in_channels, out_channels) > 64
    if dtype == torch.float32:
        depth, columns = min(64, depth), min(64, columns)
        return GradientShape(1 if wide else 64 // depth, depth, columns, 32, 4, 3, by_pairs=wide)
    if wide:
        return GradientShape(1, depth, columns, 64, 8, 5, by_pairs=True)
    return GradientShape(min(8, 256 // depth), depth, columns, 64, 8, 3, by_pairs=False)


@on_device_of_first_argument
def weight_gradient(
    feats: Tensor, grad_output: Tensor, plan: GradientPlan, shape: GradientShape, split: bool = False
) -> Tensor:
    """
    Args:
        feats: `[N, Cin]`, contiguous.
        grad_output: `[N, Cout]` in the same dtype, contiguous; for the layer `SPLIT` of `convolve` `[8 N, Cout]`.
        plan: made with the `by_pairs` of the shape.
        shape: how the work is cut.
        split: whether the layer is `SPLIT`.

    Returns:
        `[27, Cin, Cout]` float32, or `[8 children, 8 corners, Cin, Cout]`.
    """
    in_channels, out_channels = feats.shape[1], grad_output.shape[1]
    matrices = (8, 8) if split else (NUM_OFFSETS,)
    num_rows = len(feats)
    groups = 8 * cdiv(8, shape.entries) if split else cdiv(NUM_OFFSETS, shape.entries)
    programs = cdiv(out_channels, shape.columns) * cdiv(in_channels, shape.depth) * groups
    values = (64 if split else NUM_OFFSETS) * in_channels * out_channels
    # Several rounds of programs, as offsets have different numbers of pairs. Otherwise programs are alike: whether one
    # to four of them share a multiprocessor, the last round should be a full one.
    wanted = (8 if shape.by_pairs else 12) * num_multiprocessors(feats.device) // programs
    splits = max(1, min(wanted, cdiv(num_rows, shape.rows), _MOST_PARTIAL_VALUES // values))
    parts = feats.new_empty(splits, *matrices, in_channels, out_channels, dtype=torch.float32)
    stage_bytes = (shape.entries * shape.depth + shape.columns + 4) * shape.rows * feats.element_size()
    _weight_gradient_kernel[programs, splits](
        feats,
        grad_output,
        parts,
        plan.neighbours,
        plan.input_rows,
        plan.output_rows,
        plan.starts,
        num_rows,
        splits,
        IN=in_channels,
        OUT=out_channels,
        SPLIT=split,
        PAIRS=shape.by_pairs,
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
