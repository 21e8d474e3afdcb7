"""
The flood fill of a grid by connected components, in a number of launches that does not depend on the length of paths.

The outside of the grid, each inactive block and each sample of an active block is a node of a forest, in this order.
The parent of a node is a node that comes before it, or itself. Free neighbours are joined by making the later of their
two roots a child of the earlier one, by an atomic minimum; the search for a root shortens the way that it takes. At
the end, what the flood reaches has the outside for its root. Programs may see a parent that has changed since: it is
still connected with the node, and the atomic minimum returns the present one.

Bytes a sample: one of `free` and four of the parent, read several times and mostly from caches; one of the result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...ops.runtime.dispatch import cdiv, on_device_of_first_argument
from ...ops.runtime.launch import Kernel


# Nodes of a program. One warp needs no barriers in the loops, which end when the last of their lanes does.
_LANES = 128
# Steps to the first node of a row, from where a node starts.
_STEPS = tl.constexpr(8)
# Numbers that kernels are not compiled anew for.
_NUMBERS = ("blocks_per_axis", "first_node", "num_nodes", "num_samples", "row_length")


@triton.jit
def _find_roots(parents, nodes, wanted):
    """The roots of `nodes [LANES]` where `wanted`, elsewhere 0, which is a root."""
    parent = tl.load(parents + nodes, mask=wanted, other=0)
    above = tl.load(parents + parent)
    while tl.max((above != parent).to(tl.int32), 0) > 0:
        # A node whose parent is no root gets the parent of that.
        tl.store(parents + nodes, above, mask=wanted & (above != parent))
        nodes = parent
        parent = above
        above = tl.load(parents + parent)
    return parent


@triton.jit
def _join(parents, first, second, wanted):
    """Give the nodes `first` and `second [LANES]` the same root where `wanted`."""
    while tl.max(wanted.to(tl.int32), 0) > 0:
        first = _find_roots(parents, first, wanted)
        second = _find_roots(parents, second, wanted)
        later, earlier = tl.maximum(first, second), tl.minimum(first, second)
        wanted = wanted & (later != earlier)
        parent = tl.atomic_min(parents + later, earlier, mask=wanted, sem="relaxed")
        # Another program has given the later root a parent: that one is joined in its place.
        wanted = wanted & (parent != later)
        first, second = parent, earlier


@Kernel
@triton.jit(do_not_specialize=_NUMBERS)
def _start_kernel(free, parents, first_node, row_length, num_nodes, LANES: tl.constexpr):
    """Make a node a child of the first one of its row, or of the one 8 before, that only free ones lie between.

    Args:
        free: `[num_nodes]` uint8, rows of nodes.
        parents: `[*]` int32, the forest, written from `first_node` on.
        first_node: the node of the first element of `free`.
        row_length: nodes of a row.
        num_nodes: nodes of all rows.
        LANES: nodes of a program.
    """
    # [LANES]
    nodes = tl.program_id(0) * LANES + tl.arange(0, LANES)
    valid = nodes < num_nodes
    place = nodes % row_length
    connected = valid & (tl.load(free + nodes, mask=valid, other=0) > 0)
    steps = tl.zeros((LANES,), tl.int32)
    for step in range(1, _STEPS + 1):
        connected = connected & (place >= step)
        connected = connected & (tl.load(free + nodes - step, mask=connected, other=0) > 0)
        steps += connected.to(tl.int32)
    tl.store(parents + first_node + nodes, first_node + nodes - steps, mask=valid)


@Kernel
@triton.jit(do_not_specialize=_NUMBERS)
def _join_blocks_kernel(inactive, parents, blocks_per_axis, LANES: tl.constexpr):
    """Join inactive blocks with the inactive blocks before them along x and y, and with the outside of the grid.

    Args:
        inactive: `[B, B, B]` uint8.
        parents: `[*]` int32, the forest.
        blocks_per_axis: B.
        LANES: blocks of a program.
    """
    last = blocks_per_axis - 1
    # [LANES]
    blocks = tl.program_id(0) * LANES + tl.arange(0, LANES)
    x, y = blocks // (blocks_per_axis * blocks_per_axis), blocks // blocks_per_axis % blocks_per_axis
    z = blocks % blocks_per_axis
    free = tl.load(inactive + blocks, mask=x <= last, other=0) > 0
    at_border = (x == 0) | (x == last) | (y == 0) | (y == last) | (z == 0) | (z == last)
    _join(parents, blocks + 1, tl.zeros((LANES,), tl.int32), free & at_border)
    before = free & (z > 0)
    before = before & (tl.load(inactive + blocks - 1, mask=before, other=0) > 0)
    for axis in range(2):
        beside = blocks - tl.where(axis == 0, blocks_per_axis * blocks_per_axis, blocks_per_axis)
        wanted = free & (tl.where(axis == 0, x, y) > 0)
        wanted = wanted & (tl.load(inactive + beside, mask=wanted, other=0) > 0)
        # The nodes before both of them along z have been joined already, and are in the same rows.
        repeated = tl.load(inactive + beside - 1, mask=wanted & before, other=0) > 0
        _join(parents, blocks + 1, beside + 1, wanted & (repeated == 0))


@Kernel
@triton.jit(do_not_specialize=_NUMBERS)
def _join_samples_kernel(
    free, blocks, table, parents, blocks_per_axis, num_samples, BITS: tl.constexpr, LANES: tl.constexpr
):
    """Join samples with those before them along x and y, and over the faces of blocks with all that is beside them.

    Args:
        free: `[num_samples]` uint8, the free samples of the active blocks.
        blocks: `[M, 3]` int64, the coordinates of the active blocks.
        table: `[B, B, B]` int32, rows of `blocks`, -1 for inactive ones.
        parents: `[1 + B^3 + num_samples]` int32, the forest.
        blocks_per_axis: B.
        num_samples: samples of the active blocks.
        BITS: binary logarithm of the samples per block and axis.
        LANES: samples of a program.
    """
    last: tl.constexpr = (1 << BITS) - 1
    plane = blocks_per_axis * blocks_per_axis
    first_sample = 1 + plane * blocks_per_axis
    # [LANES]
    samples = tl.program_id(0) * LANES + tl.arange(0, LANES)
    valid = samples < num_samples
    is_free = tl.load(free + samples, mask=valid, other=0) > 0
    block = blocks + (samples >> 3 * BITS).to(tl.int64) * 3
    x = tl.load(block, mask=is_free, other=0).to(tl.int32)
    y = tl.load(block + 1, mask=is_free, other=0).to(tl.int32)
    z = tl.load(block + 2, mask=is_free, other=0).to(tl.int32)
    number = x * plane + y * blocks_per_axis + z
    before = is_free & ((samples & last) > 0)
    before = before & (tl.load(free + samples - 1, mask=before, other=0) > 0)
    for direction in range(6):
        axis, forward = direction // 2, direction % 2
        shift = (2 - axis) * BITS
        place = samples >> shift & last
        at_face = is_free & (place == forward * last)
        # The block beside the face.
        step = 2 * forward - 1
        coordinate = tl.where(axis == 0, x, tl.where(axis == 1, y, z)) + step
        in_grid = at_face & (coordinate >= 0) & (coordinate < blocks_per_axis)
        number_beside = number + step * tl.where(axis == 0, plane, tl.where(axis == 1, blocks_per_axis, 1))
        row = tl.load(table + number_beside, mask=in_grid, other=-1)
        beside_is_sample = (row >= 0) | (at_face == 0)
        beside = tl.where(at_face, (row << 3 * BITS) + (samples & (1 << 3 * BITS) - 1 ^ last << shift), 0)
        beside = tl.where(at_face, beside, samples - (1 << shift))
        # Two samples are joined by the later one; the rows along z have been so from the start.
        has_sample = is_free & beside_is_sample & (forward == 0) & (at_face | (axis < 2))
        has_sample = has_sample & (tl.load(free + beside, mask=has_sample, other=0) > 0)
        wanted = has_sample | (at_face & (row < 0))
        # The samples before both of them along z have been joined already, and are in the same rows.
        repeated = tl.load(free + beside - 1, mask=has_sample & before, other=0) > 0
        repeated = before & (axis < 2) & (repeated | (has_sample == 0))
        node = tl.where(has_sample, first_sample + beside, tl.where(in_grid, 1 + number_beside, 0))
        _join(parents, first_sample + samples, node, wanted & (repeated == 0))


@Kernel
@triton.jit(do_not_specialize=_NUMBERS)
def _collect_kernel(free, parents, reached, first_node, num_samples, LANES: tl.constexpr):
    """Find the free samples whose root is the outside of the grid.

    Args:
        free: `[num_samples]` uint8.
        parents: `[first_node + num_samples]` int32, the forest.
        reached: `[num_samples]` uint8, written.
        first_node: the node of the first sample.
        num_samples: samples of the active blocks.
        LANES: samples of a program.
    """
    # [LANES]
    samples = tl.program_id(0) * LANES + tl.arange(0, LANES)
    valid = samples < num_samples
    is_free = tl.load(free + samples, mask=valid, other=0) > 0
    root = _find_roots(parents, first_node + samples, is_free)
    tl.store(reached + samples, (is_free & (root == 0)).to(tl.uint8), mask=valid)


@on_device_of_first_argument
def flood_from_outside(free: Tensor, blocks: Tensor, table: Tensor) -> Tensor:
    """
    The free samples of the active blocks that a path of free samples and inactive blocks connects to the outside.

    The host does not wait for the GPU. Memory is four bytes a sample of the active blocks and a block of the grid.

    Args:
        free: `[M, s, s, s]` bool, the free samples of the active blocks, s a power of two.
        blocks: `[M, 3]` int64, the coordinates of the active blocks.
        table: `[B, B, B]` int32, the row of each block in `blocks`, -1 for inactive ones.

    Returns:
        `[M, s, s, s]` bool.
    """
    per_axis, size = len(table), free.shape[-1]
    num_samples, num_blocks, first_sample = free.numel(), table.numel(), 1 + table.numel()
    reached = torch.empty(free.shape, dtype=torch.bool, device=free.device)
    if num_samples == 0:
        return reached
    # Kernels take bool tensors as bytes.
    is_free, inactive, result = (each.view(torch.uint8) for each in (free.contiguous(), table < 0, reached))
    parents = torch.empty(first_sample + num_samples, dtype=torch.int32, device=free.device)
    parents[:1].zero_()
    over_blocks, over_samples = (cdiv(num_blocks, _LANES),), (cdiv(num_samples, _LANES),)
    options = {"LANES": _LANES, "num_warps": 1}
    _start_kernel[over_blocks](inactive, parents, 1, per_axis, num_blocks, **options)
    _start_kernel[over_samples](is_free, parents, first_sample, size, num_samples, **options)
    _join_blocks_kernel[over_blocks](inactive, parents, per_axis, **options)
    _join_samples_kernel[over_samples](
        is_free, blocks.contiguous(), table, parents, per_axis, num_samples, BITS=size.bit_length() - 1, **options
    )
    _collect_kernel[over_samples](is_free, parents, result, first_sample, num_samples, **options)
    return reached
