"""Selected attention: every query attends to the tokens of its chosen blocks, forward and backward.

Choices are sorted by block: a program has a tile of choices of one block, whose rows are all heads of the group, and
the keys of the block serve them all. The part of a query from each of its blocks passes through a buffer, for one
chunk of queries at a time, and a second kernel combines the parts. The gradients of keys and values come from
programs that have a tile of keys of one block and loop over the queries that chose it; long lists are cut into
pieces, whose sums are added in a fixed order. There are no atomics.

Floor at 131,072 tokens of 32 heads of 32 half-precision channels, top-k 8: the buffer, 2.1 GB written and read, takes
1 ms at 4.2 TB/s. A program for each query, without a buffer, would read the keys and values of 8 blocks for 16 rows:
16.6 GB in total with blocks of 62 tokens, 13 ms with those that are chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.dispatch import on_device_of_first_argument
from .arguments import BackwardInputs, HeadShape, OtherBranches, ScoreBounds, SortedChoices
from .choice_lists import cut_lists, sort_choices
from .score_bounds import NO_BOUNDS
from .selection_add_query_gradients import add_query_gradients
from .selection_backward_key import key_gradients
from .selection_backward_query import query_gradients_of_blocks
from .selection_combine import combine_blocks
from .selection_forward import attend_to_blocks
from .selection_plan import SelectionPlan, chunk_size_of, chunks_of


@on_device_of_first_argument
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    selection: SelectionPlan,
    scale: float,
    bounds: ScoreBounds = NO_BOUNDS,
    others: OtherBranches | None = None,
    keep: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """The attention of every query to all tokens of its chosen blocks.

    Args:
        query: `[N, H, D]`, contiguous.
        key: `[N, H_kv, D]`, contiguous, in the order of `selection`.
        value: `[N, H_kv, D_v]`, contiguous, in the order of `selection`.
        blocks: `[N, H_kv, k]` int32 or int64, contiguous, distinct block numbers, then -1; rows as in `query`.
        selection: the tokens in blocks.
        scale: factor of the scores, positive.
        bounds: of the scores, if they are known.
        others: the other branches, whose gated sum with this one is written; none if None.
        keep: whether the output itself and its log-sum-exp are wanted.

    Returns:
        The output `[N, H, D_v]` and the log-sum-exp in base 2 `[N, H]` float32, rows as in `query`, or None and None;
        then the two fields of `SortedChoices`, sorted in the chunks of this call.
    """
    heads, k = HeadShape.of(query, key, value), blocks.shape[2]
    shape = selection.shapes.forward
    tokens = heads.tokens(shape.rows)
    output = value.new_empty(*query.shape[:2], heads.value_dim) if keep else None
    log_sum = query.new_empty(query.shape[:2], dtype=torch.float32) if keep else None
    if not query.shape[0]:
        return output, log_sum, blocks.new_zeros(1, dtype=torch.int32), blocks.new_empty(0, dtype=torch.int64)
    chunk_size = chunk_size_of(blocks.shape, heads, query.dtype)
    choices = sort_choices(blocks, selection.num_blocks, chunk_size)
    pieces = cut_lists(choices.starts, blocks.numel(), tokens)
    part_log_sums = query.new_empty(chunk_size, heads.num_kv_heads, k, heads.group_size, dtype=torch.float32)
    parts = value.new_empty(*part_log_sums.shape, heads.value_dim)
    for chunk in chunks_of(blocks.shape, chunk_size, selection.num_blocks, tokens):
        attend_to_blocks(query, key, value, parts, part_log_sums, bounds, choices, pieces, chunk, k, selection, scale)
        combine_blocks(parts, part_log_sums, blocks, output, log_sum, others, chunk, heads, query.dtype)
    return output, log_sum, *choices


def _query_gradients(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    inputs: BackwardInputs,
    selection: SelectionPlan,
    scale: float,
    choices: SortedChoices,
    chunk_size: int,
    grad_query: Tensor | None,
) -> Tensor:
    """The gradient of the query, see `attend_backward`; `choices` are sorted in chunks of `chunk_size` queries."""
    heads, k = HeadShape.of(query, key, value), blocks.shape[2]
    shape = selection.shapes.query_gradient
    tokens = heads.tokens(shape.rows)
    gradient = torch.empty_like(query) if grad_query is None else grad_query
    pieces = cut_lists(choices.starts, blocks.numel(), tokens)
    parts = query.new_empty(chunk_size, heads.num_kv_heads, k, heads.group_size, heads.dim)
    for chunk in chunks_of(blocks.shape, chunk_size, selection.num_blocks, tokens):
        query_gradients_of_blocks(query, key, value, inputs, parts, choices, pieces, chunk, k, selection, scale)
        add_query_gradients(parts, blocks, gradient, chunk, heads, query.dtype, scale, add=grad_query is not None)
    return gradient


@on_device_of_first_argument
def attend_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: Tensor,
    starts: Tensor,
    choices: Tensor,
    inputs: BackwardInputs,
    selection: SelectionPlan,
    scale: float,
    grad_query: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward pass of `attend`.

    Args:
        query, key, value, blocks, selection, scale: as in `attend`.
        starts, choices: the third and fourth result of `attend`.
        inputs: see `backward_inputs.prepare_backward`.
        grad_query: `[N, H, D]`, the gradient is added to it in place; a new tensor if None.

    Returns:
        Gradients of query `[N, H, D]`, key `[N, H_kv, D]` and value `[N, H_kv, D_v]`, the latter two in float32 and in
        the order of `selection`.
    """
    if not query.shape[0]:
        grads = torch.empty_like(key, dtype=torch.float32), torch.empty_like(value, dtype=torch.float32)
        return torch.empty_like(query) if grad_query is None else grad_query, *grads
    arguments = (query, key, value, blocks, inputs, selection, scale)
    chunk_size = chunk_size_of(blocks.shape, HeadShape.of(query, key, value), query.dtype)
    in_chunks = SortedChoices(starts, choices)
    grad_query = _query_gradients(*arguments, in_chunks, chunk_size, grad_query)
    # Sorted again as one chunk: the sums of a block then come from few programs, not from one for each chunk.
    num_queries = query.shape[0]
    sorted_as_one = in_chunks if chunk_size >= num_queries else sort_choices(blocks, selection.num_blocks, num_queries)
    return grad_query, *key_gradients(*arguments, sorted_as_one)
