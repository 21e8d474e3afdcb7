"""What the backward kernels read besides the inputs: the gradient times the gate, and a few numbers of every query.

The kernels that have tiles of keys loop over queries, whose log-sum-exp is subtracted from scores and whose product of
output and gradient from the gradients of weights. As vectors these numbers would be loaded element by element, in
every thread that needs them; as a few more columns of queries and gradients, the matrix units subtract them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import next_power_of_2, on_device_of_first_argument
from ...runtime.launch import Kernel
from .arguments import LOG2_E, BackwardInputs
from .common import load_matrix, store_matrix


# Statistics of a query as columns of a matrix: three parts of the log-sum-exp from this column on, ...
LOG_SUM_COLUMN = tl.constexpr(0)
# ... and of the product of output and gradient from this one on.
PRODUCT_COLUMN = tl.constexpr(8)
STATISTICS_WIDTH = tl.constexpr(16)
# The first part is the number divided by the unit, a range that float16 has too; what rounding leaves of it is
# multiplied before it is rounded again.
_UNIT = tl.constexpr(64.0)
_GROWTH = tl.constexpr(2048.0)
# Whose outputs are weighted by gates.
_NUM_BRANCHES = tl.constexpr(3)


@triton.jit
def negated_parts(first_column: tl.constexpr, KEYS: tl.constexpr, dtype: tl.constexpr):
    """`[KEYS, STATISTICS_WIDTH]`, whose product with statistics is minus the number from a column on."""
    column = tl.arange(0, STATISTICS_WIDTH) - first_column
    row = tl.where(column == 0, -_UNIT, 0.0)
    row = tl.where(column == 1, -_UNIT / _GROWTH, row)
    row = tl.where(column == 2, -_UNIT / (_GROWTH * _GROWTH), row)
    return tl.broadcast_to(row[None, :], (KEYS, STATISTICS_WIDTH)).to(dtype)


@triton.jit
def statistics_of(numbers, first_column: tl.constexpr, others, dtype: tl.constexpr):
    """`others [R, STATISTICS_WIDTH]` with the three parts of float32 numbers `[R]` in the columns from one on."""
    column = tl.arange(0, STATISTICS_WIDTH)[None, :] - first_column
    rest = numbers / _UNIT
    for part in tl.static_range(3):
        rounded = rest.to(dtype)
        others = tl.where(column == part, rounded[:, None], others)
        rest = (rest - rounded.to(tl.float32)) * _GROWTH
    return others


@Kernel
@triton.jit(do_not_specialize=["branch"])
def _prepare_kernel(
    output,
    log_sum,
    grad_output,
    gate,
    gradient,
    product,
    statistics,
    grad_gate,
    branch,
    scale,
    num_heads: tl.constexpr,
    value_dim: tl.constexpr,
    HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)
    valid = head < num_heads
    rows = token * num_heads + head
    gradients = load_matrix(grad_output, rows, valid, value_dim, VALUE_DIM).to(tl.float32)
    products = tl.sum(gradients * load_matrix(output, rows, valid, value_dim, VALUE_DIM).to(tl.float32), 1)
    if gate is not None:
        place = token * _NUM_BRANCHES + branch
        tl.store(grad_gate + place, tl.sum(products, 0).to(grad_gate.dtype.element_ty))
        factor = tl.load(gate + place).to(tl.float32)
        products *= factor
        store_matrix(gradient, rows, valid, gradients * factor, value_dim, VALUE_DIM)
    tl.store(product + rows, products, mask=valid)
    if statistics is not None:
        dtype = statistics.dtype.element_ty
        values = tl.zeros((HEADS, STATISTICS_WIDTH), dtype)
        log_sums = tl.load(log_sum + rows, mask=valid, other=0.0) / scale
        values = statistics_of(log_sums, LOG_SUM_COLUMN, values, dtype)
        values = statistics_of(products, PRODUCT_COLUMN, values, dtype)
        store_matrix(statistics, rows, valid, values, STATISTICS_WIDTH, STATISTICS_WIDTH)


class BranchGate(NamedTuple):
    """What the output of a branch was multiplied by.

    Attributes:
        gate: `[N, 3]`, contiguous: of all branches.
        grad_gate: `[N, 3]`, contiguous, whose column of the branch is written.
        branch: which column it is.
    """

    gate: Tensor
    grad_gate: Tensor
    branch: int


@on_device_of_first_argument
def prepare_backward(
    output: Tensor, log_sum: Tensor, grad_output: Tensor, scale: float, gate: BranchGate | None = None
) -> BackwardInputs:
    """
    Args:
        output: `[N, H, D_v]`, of a branch, contiguous.
        log_sum: `[N, H]` float32, of its scores, in base 2.
        grad_output: `[N, H, D_v]`, contiguous.
        scale: factor of the scores.
        gate: factor by which the output was multiplied before `grad_output` was taken.
    """
    num_tokens, num_heads, value_dim = output.shape
    half = output.dtype != torch.float32
    statistics = output.new_empty(num_tokens, num_heads, STATISTICS_WIDTH.value) if half else None
    gradient = grad_output if gate is None else torch.empty_like(grad_output)
    inputs = BackwardInputs(gradient, log_sum, torch.empty_like(log_sum), statistics)
    if num_tokens:
        _prepare_kernel[(num_tokens,)](
            output,
            log_sum,
            grad_output,
            None if gate is None else gate.gate,
            inputs.gradient,
            inputs.product,
            inputs.statistics,
            None if gate is None else gate.grad_gate,
            0 if gate is None else gate.branch,
            scale * LOG2_E,
            num_heads=num_heads,
            value_dim=value_dim,
            HEADS=next_power_of_2(num_heads),
            VALUE_DIM=next_power_of_2(value_dim),
        )
    return inputs
