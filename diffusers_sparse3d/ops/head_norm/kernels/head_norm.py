"""The RMS norm of heads, in one pass.

Floor in bytes: 2 N H D values (read, write).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import cdiv, on_device_of_first_argument
from ...runtime.launch import NUMBERS, Kernel
from ...whole_tokens import with_whole_tokens
from ..reference import SHORTEST
from .heads import lengths_of_heads, tile_constants, tile_of_heads


@Kernel
@triton.jit(do_not_specialize=NUMBERS)
def _head_norm_kernel(
    hidden_states,  # [N, H, D], tokens `stride` values apart
    gamma,  # [H, D]
    output,  # [N, H, D], written
    stride,
    num_rows,  # N
    factor,  # of the weights, the square root of D
    H: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,  # H, padded to a power of two
    DIM: tl.constexpr,  # D, padded to a power of two
    ROWS: tl.constexpr,  # tokens of a program
    SHORTEST: tl.constexpr,  # the length below which a head is divided by this one
):
    rows, places, exists, mask = tile_of_heads(tl.program_id(0) * ROWS, num_rows, H, D, HEADS, DIM, ROWS)
    # [ROWS, HEADS, DIM]
    values = tl.load(hidden_states + rows * stride + places, mask=mask, other=0.0).to(tl.float32)
    # [1, HEADS, DIM]
    weights = tl.load(gamma + places, mask=exists, other=0.0).to(tl.float32) * factor
    inverse = 1.0 / tl.maximum(lengths_of_heads(values), SHORTEST)
    normalized = values * inverse[:, :, None] * weights
    tl.store(output + rows * (H * D) + places, normalized.to(output.dtype.element_ty), mask=mask)


@on_device_of_first_argument
def head_norm(hidden_states: Tensor, gamma: Tensor) -> Tensor:
    """The normalised heads `[N, H, D]`, contiguous.

    Args:
        hidden_states: `[N, H, D]`, not empty.
        gamma: `[H, D]`.
    """
    num_rows, heads, dim = hidden_states.shape
    hidden_states, tile = with_whole_tokens(hidden_states), tile_constants(heads, dim)
    output = torch.empty(hidden_states.shape, dtype=hidden_states.dtype, device=hidden_states.device)
    _head_norm_kernel[(cdiv(num_rows, tile["ROWS"]),)](
        hidden_states,
        gamma.contiguous(),
        output,
        hidden_states.stride(0),
        num_rows,
        dim**0.5,
        **tile,
        SHORTEST=SHORTEST,
    )
    return output
