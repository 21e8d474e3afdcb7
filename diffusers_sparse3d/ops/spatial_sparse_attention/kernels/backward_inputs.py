"""The tensors that the backward kernels of a branch read besides query, key and value, made by one kernel.

They are the gradient of the branch's output, which includes the gate, and two numbers of every query: the log-sum-exp,
which is subtracted from scores, and the product of output and gradient, which is subtracted from the gradients of
weights. The kernels with tiles of keys have queries as columns of their products. There, every thread would have to
load these numbers element by element. In half precision they are therefore columns of a matrix as well (statistics),
each as three terms that add up to it, and the matrix units subtract them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import next_power_of_2, on_device_of_first_argument
from ...runtime.launch import NUMBERS, Kernel
from .arguments import LOG2_E, BackwardInputs
from .common import load_matrix, store_matrix


# The statistics of a query are a row of a matrix: the terms of the log-sum-exp start at this column, ...
LOG_SUM_COLUMN = tl.constexpr(0)
# ... and the terms of the product of output and gradient at this one.
PRODUCT_COLUMN = tl.constexpr(8)
STATISTICS_WIDTH = tl.constexpr(16)
# The first term is the number divided by the unit, which is in the range of float16. The remainder after rounding is
# multiplied by the growth, and rounded again for the next term.
_UNIT = tl.constexpr(64.0)
_GROWTH = tl.constexpr(2048.0)
# The columns of the gate: compressed, selected and window attention.
_NUM_BRANCHES = tl.constexpr(3)


@triton.jit
def negated_terms(first_column: tl.constexpr, KEYS: tl.constexpr, dtype: tl.constexpr):
    """`[KEYS, STATISTICS_WIDTH]`: its product with transposed statistics is minus the number of each query.

    Args:
        first_column: the column where the terms of the number start.
        KEYS: rows of the result, which are all the same.
        dtype: of the result.
    """
    # [STATISTICS_WIDTH]
    column = tl.arange(0, STATISTICS_WIDTH) - first_column
    row = tl.where(column == 0, -_UNIT, 0.0)
    row = tl.where(column == 1, -_UNIT / _GROWTH, row)
    row = tl.where(column == 2, -_UNIT / (_GROWTH * _GROWTH), row)
    return tl.broadcast_to(row[None, :], (KEYS, STATISTICS_WIDTH)).to(dtype)


@triton.jit
def _with_terms(statistics, numbers, first_column: tl.constexpr, dtype: tl.constexpr):
    """`statistics` `[HEADS, STATISTICS_WIDTH]` with the terms of `numbers` `[HEADS]` from `first_column` on."""
    # [1, STATISTICS_WIDTH]
    column = tl.arange(0, STATISTICS_WIDTH)[None, :] - first_column
    # [HEADS]
    rest = numbers / _UNIT
    for number in tl.static_range(3):
        term = rest.to(dtype)
        # [HEADS, STATISTICS_WIDTH]
        statistics = tl.where(column == number, term[:, None], statistics)
        rest = (rest - term.to(tl.float32)) * _GROWTH
    return statistics


@Kernel
@triton.jit(do_not_specialize=NUMBERS)
def _prepare_kernel(
    output,  # [N, H, D_v], of the branch
    grad_output,  # [N, H, D_v], the gradient of the output times the gate
    inputs,  # BackwardInputs, written but for `log_sum`; its `gradient` only with a gate
    gate,  # [N, 3], the gates of all branches; None without a gate
    grad_gate,  # [N, 3], whose column of the branch is written; None without a gate
    branch,  # the column of the branch in `gate`
    scale,  # factor of the scores, times log2(e)
    num_heads: tl.constexpr,  # H
    value_dim: tl.constexpr,  # D_v
    HEADS: tl.constexpr,  # H, padded to a power of two
    VALUE_DIM: tl.constexpr,  # D_v, padded to a power of two
):
    """A program has all heads of one query."""
    token = tl.program_id(0).to(tl.int64)
    # [HEADS]
    head = tl.arange(0, HEADS)
    valid = head < num_heads
    rows = token * num_heads + head
    # [HEADS, VALUE_DIM]
    gradients = load_matrix(grad_output, rows, valid, value_dim, VALUE_DIM).to(tl.float32)
    outputs = load_matrix(output, rows, valid, value_dim, VALUE_DIM).to(tl.float32)
    # [HEADS]
    products = tl.sum(gradients * outputs, 1)
    if gate is not None:
        place = token * _NUM_BRANCHES + branch
        tl.store(grad_gate + place, tl.sum(products, 0).to(grad_gate.dtype.element_ty))
        factor = tl.load(gate + place).to(tl.float32)
        products *= factor
        store_matrix(inputs.gradient, rows, valid, gradients * factor, value_dim, VALUE_DIM)
    tl.store(inputs.product + rows, products, mask=valid)
    if inputs.statistics is not None:
        dtype = inputs.statistics.dtype.element_ty
        # Scores are subtracted from before they are scaled.
        log_sums = tl.load(inputs.log_sum + rows, mask=valid, other=0.0) / scale
        # [HEADS, STATISTICS_WIDTH]
        statistics = tl.zeros((HEADS, STATISTICS_WIDTH), dtype)
        statistics = _with_terms(statistics, log_sums, LOG_SUM_COLUMN, dtype)
        statistics = _with_terms(statistics, products, PRODUCT_COLUMN, dtype)
        store_matrix(inputs.statistics, rows, valid, statistics, STATISTICS_WIDTH, STATISTICS_WIDTH)


class BranchGate(NamedTuple):
    """The gate by which the output of a branch was multiplied.

    Attributes:
        gate: `[N, 3]`, contiguous, the gates of all branches.
        grad_gate: `[N, 3]`, contiguous, whose column of the branch is written.
        branch: the column of the branch.
    """

    gate: Tensor
    grad_gate: Tensor
    branch: int


@on_device_of_first_argument
def prepare_backward(
    output: Tensor, log_sum: Tensor, grad_output: Tensor, scale: float, gate: BranchGate | None = None
) -> BackwardInputs:
    """The tensors that the backward kernels of a branch read.

    Args:
        output: `[N, H, D_v]`, of the branch, contiguous.
        log_sum: `[N, H]` float32, the log-sum-exp of its scores, in base 2.
        grad_output: `[N, H, D_v]`, contiguous, the gradient of the output times the gate.
        scale: factor of the scores.
        gate: the gate of the branch; None if there is none, and `grad_output` is the gradient of the output.
    """
    num_tokens, num_heads, value_dim = output.shape
    half = output.dtype != torch.float32
    statistics = output.new_empty(num_tokens, num_heads, STATISTICS_WIDTH.value) if half else None
    gradient = grad_output if gate is None else torch.empty_like(grad_output)
    inputs = BackwardInputs(gradient, log_sum, torch.empty_like(log_sum), statistics)
    if num_tokens:
        _prepare_kernel[(num_tokens,)](
            output,
            grad_output,
            inputs,
            *(gate or (None, None, 0)),
            scale * LOG2_E,
            num_heads=num_heads,
            value_dim=value_dim,
            HEADS=next_power_of_2(num_heads),
            VALUE_DIM=next_power_of_2(value_dim),
        )
    return inputs
