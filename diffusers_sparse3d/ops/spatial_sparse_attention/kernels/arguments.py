"""Arguments of kernels that belong together and travel as one: named tuples that Triton takes as aggregates.

A kernel reads their fields (`heads.DIM`, `plan.cu_keys`). Fields that are `tl.constexpr` are compile-time constants;
the others are pointers or numbers. An aggregate is an ordinary positional argument of a kernel, without annotation.
Making constants takes the host time, so those of heads and tiles are made once per shape and kept.

To add a constant: add the field and its comment to the class, fill it where the class is made, read it in the kernel.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ...runtime.dispatch import dot_precision, next_power_of_2


LOG2_E = 1.4426950408889634
# The smallest edge of a matrix product.
SMALLEST = 16


class HeadConstants(NamedTuple):
    """The sizes of the attention heads, as kernels take them. All fields are compile-time constants.

    Attributes:
        num_kv_heads: key/value heads, H_kv.
        group_size: query heads that share a key/value head, H / H_kv.
        dim: channels of queries and keys, D.
        value_dim: channels of values, D_v.
        GROUP: `group_size`, padded to a power of two.
        DIM: `dim`, padded to a power of two, at least 16.
        VALUE_DIM: `value_dim`, padded to a power of two, at least 16.
        PRECISION: the `input_precision` of matrix products.
    """

    num_kv_heads: tl.constexpr
    group_size: tl.constexpr
    dim: tl.constexpr
    value_dim: tl.constexpr
    GROUP: tl.constexpr
    DIM: tl.constexpr
    VALUE_DIM: tl.constexpr
    PRECISION: tl.constexpr


class TileConstants(NamedTuple):
    """The size of a tile, as kernels take it. All fields are compile-time constants.

    Attributes:
        ROWS: query rows: tokens times `GROUP` heads.
        KEYS: keys.
    """

    ROWS: tl.constexpr
    KEYS: tl.constexpr


class HeadShape(NamedTuple):
    """The sizes of the attention heads that kernels are compiled for.

    Attributes:
        num_kv_heads: key/value heads, H_kv.
        group_size: query heads that share a key/value head, H / H_kv.
        dim: channels of queries and keys, D.
        value_dim: channels of values, D_v.
    """

    num_kv_heads: int
    group_size: int
    dim: int
    value_dim: int

    @classmethod
    def of(cls, query: Tensor, key: Tensor, value: Tensor) -> HeadShape:
        """The sizes of `query` `[N, H, D]`, `key` `[M, H_kv, D]` and `value` `[M, H_kv, D_v]`."""
        return cls(key.shape[1], query.shape[1] // key.shape[1], query.shape[2], value.shape[2])

    @property
    def group(self) -> int:
        """`group_size` padded to a power of two."""
        return next_power_of_2(self.group_size)

    def tokens(self, rows: int) -> int:
        """The number of tokens in a tile of `rows` query rows."""
        return rows // self.group

    def constants(self, dtype: torch.dtype) -> HeadConstants:
        """The constants of kernels for queries, keys and values of `dtype`; made once for each precision."""
        return self._constants(dot_precision(dtype))

    @functools.lru_cache  # noqa: B019 - few shapes, and tuples
    def _constants(self, precision: str) -> HeadConstants:
        return HeadConstants(
            num_kv_heads=tl.constexpr(self.num_kv_heads),
            group_size=tl.constexpr(self.group_size),
            dim=tl.constexpr(self.dim),
            value_dim=tl.constexpr(self.value_dim),
            GROUP=tl.constexpr(self.group),
            DIM=tl.constexpr(max(SMALLEST, next_power_of_2(self.dim))),
            VALUE_DIM=tl.constexpr(max(SMALLEST, next_power_of_2(self.value_dim))),
            PRECISION=tl.constexpr(precision),
        )


class TileShape(NamedTuple):
    """The size of a tile of an attention kernel, and how a program runs.

    Attributes:
        rows: query rows: tokens times padded heads of a group.
        keys: keys.
        num_warps, num_stages: as Triton takes them.
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int

    @property
    def constants(self) -> TileConstants:
        """The constants of a kernel with such tiles; made once for each size."""
        return _tile_constants(self.rows, self.keys)

    @property
    def launch(self) -> dict[str, int]:
        """The launch settings of a kernel with such tiles, as keyword arguments."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


@functools.lru_cache
def _tile_constants(rows: int, keys: int) -> TileConstants:
    return TileConstants(tl.constexpr(rows), tl.constexpr(keys))


class AttentionShapes(NamedTuple):
    """The tile shapes of the three kernels of an attention."""

    forward: TileShape
    query_gradient: TileShape
    key_gradient: TileShape


class ScoreBounds(NamedTuple):
    """Largest norms, from which upper bounds of all scores of an attention follow; both are None if unknown.

    Attributes:
        largest_query: `[H_kv]` float32, the largest norm of a query of each key/value head.
        largest_key: `[H_kv]` float32, the largest norm of a key of each key/value head.
    """

    largest_query: Tensor | None
    largest_key: Tensor | None


class SortedChoices(NamedTuple):
    """The choices of all queries, sorted by selection block.

    A choice is one selection block that was chosen by one query for one key/value head; its number is its place in
    `blocks.flatten()`, `blocks` `[N, H_kv, k]`. The choices of one block for one head by the queries of one chunk
    are a list: list l is of chunk l // (H_kv * num_blocks), head l // num_blocks % H_kv and block l % num_blocks.

    Attributes:
        starts: `[num_lists + 1]` int32, where each list starts in `choices`. Places of `blocks` without a block come
            after the last list.
        choices: `[N * H_kv * k]` int64, numbers of choices, ascending in each list.
    """

    starts: Tensor
    choices: Tensor

    @property
    def num_lists(self) -> int:
        """The number of lists of all chunks."""
        return self.starts.shape[0] - 1


class CompressedKeys(NamedTuple):
    """The slots and selection blocks of the compressed keys, as pointers. See `CompressionPlan`.

    Attributes:
        cu_keys: `[B + 1]` int32, the first compressed key of each sample.
        members: `[M, COLUMNS]`, row j is one in the column of key j's slot among those of its tile, else zero.
        key_slots: `[M + 1]` int32, the slot of each key, and at the end the number of slots.
        slot_tiles: `[slots]` int32, the tile of each slot among those of its sample.
        block_slots: `[num_blocks + 1]` int32, the first slot of each selection block.
        cu_blocks: `[B + 1]` int32, the first selection block of each sample.
    """

    cu_keys: Tensor
    members: Tensor
    key_slots: Tensor
    slot_tiles: Tensor
    block_slots: Tensor
    cu_blocks: Tensor


class ChoiceScratch(NamedTuple):
    """Scratch buffers in which each program chooses the blocks of its tile of queries.

    Attributes:
        sums: `[programs, most_slots, ROWS]`, sums of weights of each slot, in the dtype of the query.
        maxima: `[programs, most_tiles, ROWS]` float32, the largest score up to each tile of keys.
        scores: `[programs, TOKENS, most_slots]` float32, probabilities of slots, summed over the heads of a group.
        most_slots: slots of a sample at most.
        most_tiles: tiles of keys of a sample at most.
    """

    sums: Tensor
    maxima: Tensor
    scores: Tensor
    most_slots: int
    most_tiles: int


class ChoiceConstants(NamedTuple):
    """The sizes of the choice of the blocks. All fields are compile-time constants.

    Attributes:
        COLUMNS: slots of a tile of keys at most, padded.
        WARPS: warps along the rows of a product.
        SLOTS: slots whose heads are added up at once.
        STEP: tokens whose blocks are chosen at once.
        BLOCKS: blocks that are looked at once.
        BLOCK_SLOTS: slots of a block at most.
        INDEX_BITS: bits of the number of a block in its sample.
        K: blocks that are chosen at most, padded to a power of two, at least a warp.
    """

    COLUMNS: tl.constexpr
    WARPS: tl.constexpr
    SLOTS: tl.constexpr
    STEP: tl.constexpr
    BLOCKS: tl.constexpr
    BLOCK_SLOTS: tl.constexpr
    INDEX_BITS: tl.constexpr
    K: tl.constexpr


@functools.lru_cache
def choice_constants(**sizes: int) -> ChoiceConstants:
    """`ChoiceConstants` of integers, made once for each combination."""
    return ChoiceConstants(**{name: tl.constexpr(size) for name, size in sizes.items()})


class BackwardInputs(NamedTuple):
    """Tensors that the backward kernels of a branch read, besides query, key and value.

    Attributes:
        gradient: `[N, H, D_v]`, of the branch's output.
        log_sum: `[N, H]` float32, the log-sum-exp of the scores, in base 2.
        product: `[N, H]` float32, of output and gradient, summed over channels.
        statistics: `[N, H, 16]`, `log_sum` and `product`, each as three terms that add up to it; None in float32.
    """

    gradient: Tensor
    log_sum: Tensor
    product: Tensor
    statistics: Tensor | None


class KeyGradients(NamedTuple):
    """Gradients of keys and values, or parts of them.

    Attributes:
        key: `[..., H_kv, D]`.
        value: `[..., H_kv, D_v]`.
    """

    key: Tensor
    value: Tensor


class OtherBranches(NamedTuple):
    """The outputs of compressed and window attention that selected attention is added to, and the sum.

    Attributes:
        gate: `[N, 3]`, contiguous, the factors of compressed, selected and window attention.
        compressed: `[N, H, D_v]`.
        window: `[N, H, D_v]`.
        gated_sum: `[N, H, D_v]`, written to; it may be one of the two.
    """

    gate: Tensor
    compressed: Tensor
    window: Tensor
    gated_sum: Tensor
