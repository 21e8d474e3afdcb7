"""The gradients of the RMS norm of heads, in one pass.

With the length l of a head x, u = x / l and g the gradient of the result times the weights, the gradient of x is
(g - u (u . g)) / l, and that of the weights the sum of u times the gradient of the result over all tokens. Sums over
the tokens of a program are parts, which are added up in a fixed order.

Floor in bytes: 3 N H D values (two read, one written).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import cdiv, num_multiprocessors, on_device_of_first_argument
from ...runtime.launch import NUMBERS, Kernel
from ...whole_tokens import with_whole_tokens
from ..reference import SHORTEST
from .heads import lengths_of_heads, tile_constants, tile_of_heads


# Programs of a multiprocessor: each has its own part of the gradient of the weights.
_PROGRAMS_OF_MULTIPROCESSOR = 8


@Kernel
@triton.jit(do_not_specialize=NUMBERS)
def _head_norm_backward_kernel(
    grad_output,  # [N, H, D], tokens `grad_stride` values apart
    hidden_states,  # [N, H, D], tokens `stride` values apart
    gamma,  # [H, D]
    grad_hidden_states,  # [N, H, D], written
    parts,  # [programs, H, D] float32, written: sums over the tokens of each program, before the factor
    grad_stride,
    stride,
    num_rows,  # N
    factor,  # of the weights, the square root of D
    H: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,  # H, padded to a power of two
    DIM: tl.constexpr,  # D, padded to a power of two
    ROWS: tl.constexpr,  # tokens of a tile
    SHORTEST: tl.constexpr,  # the length below which a head is divided by this one
):
    _, places, exists, _ = tile_of_heads(0, num_rows, H, D, HEADS, DIM, ROWS)
    # [1, HEADS, DIM]
    weights = tl.load(gamma + places, mask=exists, other=0.0).to(tl.float32) * factor
    # [HEADS, DIM]
    total = tl.zeros((HEADS, DIM), tl.float32)
    for first in range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS):
        rows, places, exists, mask = tile_of_heads(first, num_rows, H, D, HEADS, DIM, ROWS)
        # [ROWS, HEADS, DIM]
        values = tl.load(hidden_states + rows * stride + places, mask=mask, other=0.0).to(tl.float32)
        gradients = tl.load(grad_output + rows * grad_stride + places, mask=mask, other=0.0).to(tl.float32)
        # [ROWS, HEADS]
        lengths = lengths_of_heads(values)
        inverse = 1.0 / tl.maximum(lengths, SHORTEST)
        # [ROWS, HEADS, DIM]
        unit = values * inverse[:, :, None]
        total += tl.sum(unit * gradients, 0)
        gradients *= weights
        # What a shorter head is divided by does not depend on it.
        projections = tl.where(lengths >= SHORTEST, tl.sum(unit * gradients, 2), 0.0)
        gradients = (gradients - unit * projections[:, :, None]) * inverse[:, :, None]
        tl.store(
            grad_hidden_states + rows * (H * D) + places,
            gradients.to(grad_hidden_states.dtype.element_ty),
            mask=mask,
        )
    heads, channels = tl.arange(0, HEADS)[:, None], tl.arange(0, DIM)[None, :]
    parts += tl.program_id(0) * (H * D)
    tl.store(parts + heads * D + channels, total, mask=(heads < H) & (channels < D))


@on_device_of_first_argument
def head_norm_backward(grad_output: Tensor, hidden_states: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of the heads `[N, H, D]`, and parts `[P, H, D]` float32 that add up to that of gamma.

    Args:
        grad_output: `[N, H, D]`.
        hidden_states: `[N, H, D]`, not empty.
        gamma: `[H, D]`.
    """
    num_rows, heads, dim = hidden_states.shape
    grad_output, hidden_states = with_whole_tokens(grad_output), with_whole_tokens(hidden_states)
    tile = tile_constants(heads, dim)
    most_programs = _PROGRAMS_OF_MULTIPROCESSOR * num_multiprocessors(hidden_states.device)
    programs = min(cdiv(num_rows, tile["ROWS"]), most_programs)
    gradient = torch.empty(hidden_states.shape, dtype=hidden_states.dtype, device=hidden_states.device)
    parts = torch.empty(programs, heads, dim, dtype=torch.float32, device=hidden_states.device)
    _head_norm_backward_kernel[(programs,)](
        grad_output,
        hidden_states,
        gamma.contiguous(),
        gradient,
        parts,
        grad_output.stride(0),
        hidden_states.stride(0),
        num_rows,
        dim**0.5,
        **tile,
        SHORTEST=SHORTEST,
    )
    return gradient, parts * dim**0.5
