"""Gradient of the weights: for every offset, gathered inputs transposed times gradients of the output.

A program makes a tile of the matrices of a few offsets from a part of the rows; the parts are added up by a second
pass, so that nothing is added by atomics. Several offsets at once serve narrow layers: they share the rows of the
gradient, and make tiles that are worth a matrix unit. In wide layers a program takes one offset, and goes through the
pairs of rows that have it.

Both operands of the product are gathered in two dimensions. Only then does the compiler feed the matrix unit from
where they arrive in shared memory, with more than one step on its way; a tensor that is reshaped after it is loaded
goes through registers.
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
from .common import LARGE_TENSOR, NUM_OFFSETS, SAME, SMALLEST, SUBDIVIDE, corner_offset, fit_stages, make_layer


if TYPE_CHECKING:
    from ..plan import GradientPlan


# The parts that are added up hold at most so many float32 values, unless one part alone is larger.
_MOST_PARTIAL_VALUES = 1 << 26


class Tile(NamedTuple):
    """Compile-time constants of a step: entries (offsets or corners), input and output channels, rows."""

    ENTRIES: tl.constexpr
    DEPTH: tl.constexpr
    COLUMNS: tl.constexpr
    ROWS: tl.constexpr


# Not `num_rows`, by which rows of the neighbour map are apart: where 16 divides it, fewer registers are needed.
@Kernel
@triton.jit(do_not_specialize=["num_parts"])
def _weight_gradient_kernel(
    feats,
    grad_output,
    parts,
    plan,
    num_rows,
    num_parts,
    layer,
    tile,
):
    """A tile of the gradients of a few entries (offsets or, for SUBDIVIDE, corners of a child), from one part of rows.

    Args:
        feats: `[N, IN]` input.
        grad_output: `[N, OUT]` gradient of the output; for SUBDIVIDE `[8 N, OUT]`.
        parts: `[num_parts, 27, IN, OUT]` float32; for SUBDIVIDE `[num_parts, 8 children, 8 corners, IN, OUT]`.
        plan: `GradientPlan`, the neighbours, and lists of pairs where a program has one entry.
        num_rows: N, the voxels.
        num_parts: into how many parts the rows are divided.
        layer: `Layer`, channels and kind.
        tile: `Tile`, the size of a step.
    """
    IN: tl.constexpr = layer.IN
    OUT: tl.constexpr = layer.OUT
    ROWS: tl.constexpr = tile.ROWS
    CHILDREN: tl.constexpr = 8 if layer.KIND == SUBDIVIDE else 1
    CHILD_ENTRIES: tl.constexpr = 8 if layer.KIND == SUBDIVIDE else 27
    COLUMN_TILES: tl.constexpr = (OUT + tile.COLUMNS - 1) // tile.COLUMNS
    DEPTH_TILES: tl.constexpr = (IN + tile.DEPTH - 1) // tile.DEPTH
    GROUPS: tl.constexpr = (CHILD_ENTRIES + tile.ENTRIES - 1) // tile.ENTRIES
    WIDTH: tl.constexpr = tile.ENTRIES * tile.DEPTH

    program = tl.program_id(0)
    part = tl.program_id(1)
    group = program // (COLUMN_TILES * DEPTH_TILES) % GROUPS
    child = program // (COLUMN_TILES * DEPTH_TILES * GROUPS)
    # [COLUMNS]
    columns = program % COLUMN_TILES * tile.COLUMNS + tl.arange(0, tile.COLUMNS)
    # [WIDTH]: the channels of the first entry, then those of the second, ...
    channels = program // COLUMN_TILES % DEPTH_TILES * tile.DEPTH + tl.arange(0, WIDTH) % tile.DEPTH

    if plan.starts is not None:
        offset = corner_offset(child, group) if layer.KIND == SUBDIVIDE else group
        # The pairs of an offset are those of the opposite one, the other way round.
        swapped = offset > 13
        listed = tl.where(swapped, 26 - offset, offset)
        start = tl.load(plan.starts + listed)
        count = tl.load(plan.starts + listed + 1) - start
        input_list = tl.where(swapped, plan.output_rows, plan.input_rows) + start
        output_list = tl.where(swapped, plan.input_rows, plan.output_rows) + start
    else:
        # [ENTRIES]
        entries = group * tile.ENTRIES + tl.arange(0, tile.ENTRIES)
        is_entry = entries < CHILD_ENTRIES
        offsets = tl.where(is_entry, corner_offset(child, entries) if layer.KIND == SUBDIVIDE else entries, 0)
        maps = plan.neighbours + offsets.to(tl.int64) * num_rows
        count = num_rows

    num_steps = tl.cdiv(count, ROWS)
    share = (num_steps + num_parts - 1) // num_parts
    # [WIDTH, COLUMNS]
    total = tl.zeros((WIDTH, tile.COLUMNS), tl.float32)
    for step in range(part * share, tl.minimum((part + 1) * share, num_steps)):
        # [ROWS]
        places = step * ROWS + tl.arange(0, ROWS)
        valid = places < count
        if plan.starts is not None:
            # [ROWS, 1]
            rows = tl.load(input_list + places, mask=valid, other=0)[:, None]
            is_input = valid[:, None]
            # [ROWS]
            outputs = tl.load(output_list + places, mask=valid, other=0)
        else:
            # [ROWS, ENTRIES]
            rows = tl.load(maps[None, :] + places[:, None], mask=valid[:, None] & is_entry[None, :], other=num_rows)
            # [ROWS, WIDTH], in two dimensions from here on: the gather goes straight to the matrix product
            rows = tl.reshape(tl.broadcast_to(rows[:, :, None], (ROWS, tile.ENTRIES, tile.DEPTH)), (ROWS, WIDTH))
            # Without this, not every version of the compiler loads neighbouring channels together.
            rows = tl.max_constancy(rows, (1, tile.DEPTH))
            is_input = rows < num_rows
            # [ROWS]
            outputs = places
        if layer.KIND == SUBDIVIDE:
            outputs = outputs * 8 + child
        if layer.LARGE:
            rows = rows.to(tl.int64)
            outputs = outputs.to(tl.int64)
        is_output = valid[:, None]
        if IN % tile.DEPTH != 0:
            is_input = is_input & (channels < IN)[None, :]
        if OUT % tile.COLUMNS != 0:
            is_output = is_output & (columns < OUT)[None, :]
        # [ROWS, WIDTH]
        inputs = tl.load(feats + (rows * IN + channels[None, :]), mask=is_input, other=0.0)
        # [ROWS, COLUMNS]
        gradients = tl.load(grad_output + (outputs * OUT)[:, None] + columns[None, :], mask=is_output, other=0.0)
        # [WIDTH, COLUMNS]
        total = tl.dot(tl.trans(inputs), gradients, total, input_precision=layer.PRECISION)

    # [WIDTH]
    matrices = child * CHILD_ENTRIES + group * tile.ENTRIES + tl.arange(0, WIDTH) // tile.DEPTH
    places = matrices * IN + channels
    is_value = (matrices < (child + 1) * CHILD_ENTRIES) & (channels < IN)
    parts += part.to(tl.int64) * (CHILDREN * CHILD_ENTRIES * IN * OUT)
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
        num_warps: warps of a program.
        num_stages: stages of its pipeline.
        by_pairs: whether it goes through the pairs of rows of an offset, or through all rows.
    """

    entries: int
    depth: int
    columns: int
    rows: int
    num_warps: int
    num_stages: int
    by_pairs: bool

    @functools.cached_property
    def tile(self) -> Tile:
        return Tile(*(tl.constexpr(size) for size in (self.entries, self.depth, self.columns, self.rows)))


@functools.lru_cache
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
    feats: Tensor, grad_output: Tensor, plan: GradientPlan, shape: GradientShape, kind: tl.constexpr = SAME
) -> Tensor:
    """The gradient of the weights of a layer.

    Args:
        feats: `[N, Cin]`, contiguous.
        grad_output: `[N, Cout]` in the same dtype, contiguous; for `SUBDIVIDE` `[8 N, Cout]`.
        plan: made with the `by_pairs` of the shape.
        shape: how the work is cut.
        kind: `SAME` or `SUBDIVIDE`.

    Returns:
        `[27, Cin, Cout]` float32, or `[8 children, 8 corners, Cin, Cout]`.
    """
    subdivides = kind.value == SUBDIVIDE.value
    (num_rows, in_channels), out_channels = feats.shape, grad_output.shape[1]
    matrices = (8, 8) if subdivides else (NUM_OFFSETS,)
    groups = 8 * cdiv(8, shape.entries) if subdivides else cdiv(NUM_OFFSETS, shape.entries)
    programs = cdiv(out_channels, shape.columns) * cdiv(in_channels, shape.depth) * groups
    values = (64 if subdivides else NUM_OFFSETS) * in_channels * out_channels
    # Several rounds of programs, as offsets have different numbers of pairs. Programs that go through all rows are
    # alike: whether one to four of them share a multiprocessor, the last round should be a full one.
    wanted = (8 if shape.by_pairs else 12) * num_multiprocessors(feats.device) // programs
    num_parts = max(1, min(wanted, cdiv(num_rows, shape.rows), _MOST_PARTIAL_VALUES // values))
    parts = feats.new_empty(num_parts, *matrices, in_channels, out_channels, dtype=torch.float32)
    large = max(feats.numel(), grad_output.numel()) >= LARGE_TENSOR
    stage_bytes = (shape.entries * shape.depth + shape.columns + 4) * shape.rows * feats.element_size()
    _weight_gradient_kernel[programs, num_parts](
        feats,
        grad_output,
        parts,
        plan,
        num_rows,
        num_parts,
        make_layer(in_channels, out_channels, kind.value, large, dot_precision(feats.dtype)),
        shape.tile,
        num_warps=shape.num_warps,
        num_stages=fit_stages(shape.num_stages, stage_bytes, feats.device),
    )
    return parts[0] if num_parts == 1 else parts.sum(0)
