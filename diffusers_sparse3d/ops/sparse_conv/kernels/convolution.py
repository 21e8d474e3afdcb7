"""Implicit matrix product over the neighbour map: the forward pass and the gradient of the input.

A program makes a tile of rows by columns of the output. It goes through the offsets that its rows have and, of each,
through the input channels, and gathers the rows of the neighbours as it multiplies: nothing is stored in between. One
kernel serves four layers, told apart by what a step of its loop stands for:

- `SAME`: the 27 offsets of a row. The gradient of the input is the same layer with mirrored, transposed weights.
- `SPLIT`, a convolution on the eight children of each row: a program makes the outputs of one child, from the up to 8
  parents that its 27 neighbours have (`reference.corner_weight`).
- `MERGE`, the gradient of that: 8 children times 8 corners of a row.

Floors. Bytes: N (Cin + Cout) values and the map of 27 N int32, so for 32 bfloat16 channels 128 bytes of features and
108 bytes of map a voxel. Narrow layers are far from the matrix units (2 * 27 * C * C operations a voxel, less where
neighbours are missing), and what costs is rather the gather: up to 27 rows of C values a voxel, mostly from caches.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import cdiv, dot_precision, next_power_of_2, num_multiprocessors, on_device_of_first_argument
from ...runtime.launch import Kernel
from .plan import ConvPlan


SAME, SPLIT, MERGE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# From here on, places in a tensor of features need 64 bits.
LARGE_TENSOR = 2**31
# The smallest edge of a matrix product.
SMALLEST = 16
_MOST_SPLITS = 8


@triton.jit
def corner_offset(child, corner):
    """The offset 0..26 at which child 4 bx + 2 by + bz of a voxel meets its corner cx + 2 cy + 4 cz."""
    x = (child >> 2 & 1) + (corner & 1)
    y = (child >> 1 & 1) + (corner >> 1 & 1)
    z = (child & 1) + (corner >> 2 & 1)
    return x + 3 * y + 9 * z


@triton.jit
def _or(left, right):
    return left | right


@triton.jit
def _lowest_bit(bits):
    """The number of the lowest bit of a positive integer below 2^27, from the exponent of a float."""
    lowest = (bits & -bits).to(tl.float32)
    return (lowest.to(tl.int32, bitcast=True) >> 23) - 127


@triton.jit
def _multiply_entries(
    total,
    feats,
    weight,
    neighbours,
    places,
    valid,
    columns,
    tile_mask,
    child,
    split,
    num_splits,
    num_rows,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    LAYER: tl.constexpr,
    DEPTH: tl.constexpr,
    LARGE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds to `total` what this split's share of the offsets (of one child) contributes."""
    # Entry e is offset e, or corner e of the child.
    ENTRIES: tl.constexpr = 32 if LAYER == SAME else 8
    entries = tl.arange(0, ENTRIES)
    if LAYER == SAME:
        offsets = entries
    elif LAYER == SPLIT:
        offsets = corner_offset(child, entries)
    else:
        offsets = 26 - corner_offset(child, entries)
    present = tile_mask >> offsets & 1
    count = tl.sum(present)
    rank = tl.cumsum(present, 0) - present
    share = (count + num_splits - 1) // num_splits
    mine = present * ((rank >= split * share) & (rank < (split + 1) * share)).to(tl.int32)
    bits = tl.sum(mine << entries)

    STEPS: tl.constexpr = (IN + DEPTH - 1) // DEPTH
    depth = tl.arange(0, DEPTH)
    column_mask = (columns < OUT)[None, :]
    for step in range(tl.sum(mine) * STEPS):
        entry = _lowest_bit(bits)
        if LAYER == SAME:
            offset = entry
            matrix = entry
        elif LAYER == SPLIT:
            offset = corner_offset(child, entry)
            matrix = child * 8 + entry
        else:
            offset = 26 - corner_offset(child, entry)
            matrix = child * 8 + entry
        rows = tl.load(neighbours + offset.to(tl.int64) * num_rows + places, mask=valid, other=num_rows)
        exists = (rows < num_rows)[:, None]
        if LAYER == MERGE:
            rows = rows * 8 + child
        if LARGE:
            rows = rows.to(tl.int64)
        channels = step % STEPS * DEPTH + depth
        if IN % DEPTH == 0:
            inputs = tl.load(feats + (rows * IN)[:, None] + channels[None, :], mask=exists, other=0.0)
        else:
            inputs = tl.load(
                feats + (rows * IN)[:, None] + channels[None, :], mask=exists & (channels < IN)[None, :], other=0.0
            )
        matrices = tl.load(
            weight + (matrix * (IN * OUT) + channels * OUT)[:, None] + columns[None, :],
            mask=(channels < IN)[:, None] & column_mask,
            other=0.0,
        )
        total = tl.dot(inputs, matrices, total, input_precision=PRECISION)
        bits = tl.where(step % STEPS == STEPS - 1, bits & (bits - 1), bits)
    return total


@Kernel
@triton.jit
def _convolve_kernel(
    feats,
    weight,
    bias,
    output,
    neighbours,
    order,
    masks,
    num_rows,
    num_splits,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    LAYER: tl.constexpr,
    SORTED: tl.constexpr,
    BIASED: tl.constexpr,
    LARGE: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    # Programs that gather the same rows follow one another.
    COLUMN_TILES: tl.constexpr = (OUT + COLUMNS - 1) // COLUMNS
    CHILDREN: tl.constexpr = 8 if LAYER == SPLIT else 1
    program = tl.program_id(0)
    split = tl.program_id(1)
    columns = program % COLUMN_TILES * COLUMNS + tl.arange(0, COLUMNS)
    child = program // COLUMN_TILES % CHILDREN
    places = program // (COLUMN_TILES * CHILDREN) * ROWS + tl.arange(0, ROWS)
    valid = places < num_rows
    tile_mask = (1 << 27) - 1
    if SORTED:
        tile_mask = tl.reduce(tl.load(masks + places, mask=valid, other=0), 0, _or)

    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    if LAYER == MERGE:
        for other_child in range(8):
            total = _multiply_entries(
                total,
                feats,
                weight,
                neighbours,
                places,
                valid,
                columns,
                tile_mask,
                other_child,
                split,
                num_splits,
                num_rows,
                IN,
                OUT,
                LAYER,
                DEPTH,
                LARGE,
                PRECISION,
            )
    else:
        total = _multiply_entries(
            total,
            feats,
            weight,
            neighbours,
            places,
            valid,
            columns,
            tile_mask,
            child,
            split,
            num_splits,
            num_rows,
            IN,
            OUT,
            LAYER,
            DEPTH,
            LARGE,
            PRECISION,
        )

    if BIASED:
        total += tl.load(bias + columns, mask=columns < OUT, other=0.0).to(tl.float32)[None, :]
    rows = places
    if SORTED:
        rows = tl.load(order + places, mask=valid, other=0)
    if LAYER == SPLIT:
        rows = rows * 8 + child
    if LARGE:
        rows = rows.to(tl.int64)
    output += split.to(tl.int64) * num_rows * (CHILDREN * OUT)
    mask = valid[:, None] & (columns < OUT)[None, :]
    tl.store(output + (rows * OUT)[:, None] + columns[None, :], total.to(output.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class ConvShape:
    """How `convolve` cuts its work: rows, columns and depth of a step, how a program runs, the order of the rows."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    by_mask: bool


def convolve_shape(in_channels: int, out_channels: int, dtype: torch.dtype) -> ConvShape:
    """The tile shape for a layer."""
    columns = min(128, max(SMALLEST, next_power_of_2(out_channels)))
    depth = min(64, max(SMALLEST, next_power_of_2(in_channels)))
    wide = max(in_channels, out_channels) > 64
    if dtype == torch.float32:
        return ConvShape(64, min(64, columns), min(32, depth), 4, 2, by_mask=wide)
    return ConvShape(128, columns, depth, 8 if columns == 128 else 4, 4, by_mask=wide)


def num_splits(programs: int, device: torch.device) -> int:
    """Into how many parts the offsets are split, so that few rows occupy all multiprocessors."""
    return max(1, min(_MOST_SPLITS, 2 * num_multiprocessors(device) // max(1, programs)))


@functools.cache
def _shared_memory(device_index: int) -> int:
    """Bytes that a program may use."""
    return triton.runtime.driver.active.utils.get_device_properties(device_index)["max_shared_mem"]


def fit_stages(num_stages: int, stage_bytes: int, device: torch.device) -> int:
    """`num_stages`, or as many as the shared memory of the device holds; one stage less than that is buffered."""
    if device.type != "cuda":
        return num_stages
    available = _shared_memory(torch.cuda.current_device() if device.index is None else device.index)
    return max(1, min(num_stages, available // stage_bytes + 1))


@on_device_of_first_argument
def convolve(
    feats: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    plan: ConvPlan,
    shape: ConvShape,
    layer: tl.constexpr = SAME,
) -> Tensor:
    """
    Args:
        feats: `[N, Cin]`, contiguous; for `MERGE` `[8 N, Cin]`.
        weight: `[27, Cin, Cout]` in the dtype of `feats`, contiguous; for `SPLIT` and `MERGE` `[8 children, 8 corners,
            Cin, Cout]`.
        bias: `[Cout]` or None.
        plan: made with the `by_mask` of the shape.
        shape: how the work is cut.
        layer: see the module.

    Returns:
        `[N, Cout]`, for `SPLIT` `[8 N, Cout]`.
    """
    in_channels, out_channels = weight.shape[-2:]
    children = 8 if layer.value == SPLIT.value else 1
    output = feats.new_empty(children * plan.num_rows, out_channels)
    if plan.num_rows == 0:
        return output
    programs = cdiv(plan.num_rows, shape.rows) * cdiv(out_channels, shape.columns) * children
    splits = num_splits(programs, feats.device)
    parts = output if splits == 1 else feats.new_empty(splits, *output.shape, dtype=torch.float32)
    stage_bytes = (shape.rows + shape.columns) * shape.depth * feats.element_size() + 4 * shape.rows
    _convolve_kernel[programs, splits](
        feats,
        weight,
        bias if splits == 1 else None,
        parts,
        plan.neighbours,
        plan.order,
        plan.masks,
        plan.num_rows,
        splits,
        IN=in_channels,
        OUT=out_channels,
        LAYER=layer.value,
        SORTED=plan.order is not None,
        BIASED=bias is not None and splits == 1,
        LARGE=max(feats.numel(), output.numel()) >= LARGE_TENSOR,
        PRECISION=dot_precision(feats.dtype),
        ROWS=shape.rows,
        COLUMNS=shape.columns,
        DEPTH=shape.depth,
        num_warps=shape.num_warps,
        num_stages=fit_stages(shape.num_stages, stage_bytes, feats.device),
    )
    if splits > 1:
        total = parts.sum(0)
        output = (total if bias is None else total + bias).to(feats.dtype)
    return output
