"""The layers that the convolution kernels compute, and what the forward and the gradient kernels share."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl


# The neighbours of a voxel in a 3x3x3 cube, itself among them.
NUM_OFFSETS = 27
# Layers, told apart by how outputs and inputs relate: SAME has one output per voxel. SUBDIVIDE convolves the eight
# children of every voxel, which all have its features. MERGE is the transpose of SUBDIVIDE: its gradient.
SAME, SUBDIVIDE, MERGE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# Tensors of at least this many elements need 64-bit element numbers.
LARGE_TENSOR = 2**31
# The smallest edge of a matrix product.
SMALLEST = 16


class Layer(NamedTuple):
    """Compile-time constants of a layer.

    Attributes:
        IN: input channels.
        OUT: output channels.
        KIND: `SAME`, `SUBDIVIDE` or `MERGE`.
        LARGE: whether element numbers need 64 bits.
        PRECISION: of matrix products, as `tl.dot` takes it.
    """

    IN: tl.constexpr
    OUT: tl.constexpr
    KIND: tl.constexpr
    LARGE: tl.constexpr
    PRECISION: tl.constexpr


@functools.lru_cache
def make_layer(in_channels: int, out_channels: int, kind: int, large: bool, precision: str) -> Layer:
    """The constants of a layer, made once: objects of constants take the host time."""
    return Layer(*(tl.constexpr(value) for value in (in_channels, out_channels, kind, large, precision)))


@triton.jit
def corner_offset(child, corner):
    """The offset 0..26 from a voxel to the parent that its child 4 bx + 2 by + bz meets at corner cx + 2 cy + 4 cz."""
    x = (child >> 2 & 1) + (corner & 1)
    y = (child >> 1 & 1) + (corner >> 1 & 1)
    z = (child & 1) + (corner >> 2 & 1)
    return x + 3 * y + 9 * z


@functools.cache
def _shared_memory(device_index: int) -> int:
    """Bytes of shared memory that a program may use."""
    return triton.runtime.driver.active.utils.get_device_properties(device_index)["max_shared_mem"]


def fit_stages(num_stages: int, stage_bytes: int, device: torch.device) -> int:
    """The number of pipeline stages: `num_stages`, or fewer if the shared memory of the device holds fewer.

    Of n stages, n - 1 are buffered in shared memory.
    """
    if device.type != "cuda":
        return num_stages
    available = _shared_memory(torch.cuda.current_device() if device.index is None else device.index)
    return max(1, min(num_stages, available // stage_bytes + 1))
