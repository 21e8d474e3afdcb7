"""The attention processors for packed sparse tokens: full, windowed and Spatial Sparse Attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ..ops.coordinates import Partition
from ..ops.packed_attention import packed_attention, partitioned_attention
from ..ops.spatial_sparse_attention import plan_spatial_sparse_attention, spatial_sparse_attention
from ..sparse_tensor import CoordinateCache
from .compatibility import register_processor


if TYPE_CHECKING:
    from .attention import SparseAttention, SpatialSparseAttention


class AttentionModule(Protocol):
    """The attributes that every attention module has, named as in diffusers.

    Modules of other packages may lack what [`SparseAttention`] has besides: `norm_q`, `norm_k`, `window_size`,
    `window_shift` and `ssa`.
    """

    heads: int
    to_q: nn.Module
    to_k: nn.Module
    to_v: nn.Module
    to_out: nn.ModuleList


def get_window_size(processor: Any, attn: AttentionModule) -> int:
    """Edge of the attention windows of a module, in voxels.

    Raises:
        ValueError: if the module has none.
    """
    window_size = getattr(attn, "window_size", None)
    if window_size is None:
        raise ValueError(
            f"`window_size` must be given to {type(processor).__name__} or to the {type(attn).__name__}, got neither"
        )
    return window_size


class SparseAttnProcessor:
    """Self-attention among all tokens of a sample, cross-attention to all conditioning tokens of the sample.

    A processor has no state: one instance serves a whole model. It calls `attn.to_q`, `to_k`, `to_v`, `to_out`, and
    where they exist `attn.norm_q` and `norm_k`, so it works with attention modules of other packages too.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: AttentionModule,
        hidden_states: Tensor,
        coords: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_coords: Tensor | None = None,
        cache: CoordinateCache | None = None,
        encoder_cache: CoordinateCache | None = None,
    ) -> Tensor:
        """
        Args:
            attn: the attention module.
            hidden_states: `[N, C]` packed tokens, in any order.
            coords: `[N, 4]` int32 (batch, x, y, z) of the tokens; not needed with `cache`.
            encoder_hidden_states: `[B, L, D]` or packed `[M, D]`; self-attention if None.
            encoder_coords: `[M, 4]` int32 of packed `encoder_hidden_states`; only the batch column is read.
            cache: keeps what is derived from `coords`, for all layers of a model; made from `coords` if None.
            encoder_cache: the same for `encoder_coords`.

        Returns:
            `[N, C]`.

        Raises:
            ValueError: if neither `coords` nor `cache` is given, or packed `encoder_hidden_states` come without
                coordinates, or the samples of tokens and conditioning do not match.
        """
        if cache is None:
            if coords is None:
                raise ValueError("`coords` or `cache` must be given, to tell the samples of packed tokens apart")
            cache = CoordinateCache(coords)
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states.flatten(0, -2)
        query = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1))
        key = attn.to_k(source).unflatten(-1, (-1, query.shape[-1]))
        value = attn.to_v(source).unflatten(-1, (key.shape[1], -1))
        norm_query, norm_key = getattr(attn, "norm_q", None), getattr(attn, "norm_k", None)
        if norm_query is not None:
            query = norm_query(query)
        if norm_key is not None:
            key = norm_key(key)

        if encoder_hidden_states is None:
            output = self.self_attention(attn, hidden_states, query, key, value, cache)
        elif encoder_hidden_states.ndim == 3:
            output = self.padded_cross_attention(query, key, value, cache, encoder_hidden_states.shape[0])
        else:
            if encoder_cache is None:
                if encoder_coords is None:
                    raise ValueError("`encoder_coords` must be given with packed `encoder_hidden_states` [M, D]")
                encoder_cache = CoordinateCache(encoder_coords)
            output = self.packed_cross_attention(query, key, value, cache, encoder_cache)
        output = attn.to_out[0](output.flatten(1))
        return attn.to_out[1](output)

    def plan(
        self,
        attn: SparseAttention,
        hidden_states: Tensor,
        cache: CoordinateCache,
        encoder_cache: CoordinateCache | None = None,
    ) -> None:
        """Fill the caches with what `__call__` derives from the coordinates, such as the rows of each window.

        `__call__` would do so itself at first, and wait for the GPU. After this it does not wait, and
        `torch.compile(fullgraph=True)` traces it.

        Args:
            attn: the attention module.
            hidden_states: tensor with the dtype and the device of the tokens, of any shape.
            cache: keeps what is derived from the coordinates of the tokens.
            encoder_cache: the same for packed conditioning tokens.
        """
        cache.batch_partition()
        if encoder_cache is not None:
            encoder_cache.batch_partition()

    def self_attention(
        self,
        attn: AttentionModule,
        hidden_states: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: CoordinateCache,
    ) -> Tensor:
        """Attention among tokens in any order: `query [N, H, D]`, `key` and `value [N, H_kv, D]` to `[N, H, D]`."""
        samples = cache.batch_partition()
        return partitioned_attention(query, key, value, samples, samples)

    def padded_cross_attention(
        self, query: Tensor, key: Tensor, value: Tensor, cache: CoordinateCache, batch_size: int
    ) -> Tensor:
        """Attention to the same number of keys in every sample: `query [N, H, D]`, `key [B * L, H_kv, D]`."""
        if batch_size < cache.batch_size:
            raise ValueError(
                f"`encoder_hidden_states` must have the {cache.batch_size} samples of `coords`, got {batch_size}"
            )
        samples, length = cache.batch_partition(), key.shape[0] // batch_size
        cu_seqlens_k = torch.arange(cache.batch_size + 1, dtype=torch.int32, device=key.device) * length
        used = cache.batch_size * length
        output = packed_attention(
            query if samples.in_order else query.index_select(0, samples.order),
            key[:used],
            value[:used],
            samples.cu_seqlens,
            cu_seqlens_k,
            max_seqlen_q=samples.max_seqlen,
            max_seqlen_k=length,
        )
        return output if samples.in_order else output.index_select(0, samples.inverse)

    def packed_cross_attention(
        self, query: Tensor, key: Tensor, value: Tensor, cache: CoordinateCache, encoder_cache: CoordinateCache
    ) -> Tensor:
        """Attention to any number of keys in each sample: `query [N, H, D]`, `key [M, H_kv, D]`."""
        if encoder_cache.batch_size < cache.batch_size:
            raise ValueError(
                f"`encoder_coords` must have the {cache.batch_size} samples of `coords`, got"
                f" {encoder_cache.batch_size}"
            )
        return partitioned_attention(query, key, value, cache.batch_partition(), encoder_cache.batch_partition())


class WindowAttnProcessor(SparseAttnProcessor):
    """Self-attention inside the cubic windows (x, y, z + shift) // window_size; cross-attention is not windowed.

    Args:
        window_size: edge of a window in voxels; `attn.window_size` if None.
        shift: added to the coordinates first; `attn.window_shift` if None.
    """

    def __init__(self, window_size: int | None = None, shift: int | None = None):
        self.window_size = window_size
        self.shift = shift

    def plan(
        self,
        attn: SparseAttention,
        hidden_states: Tensor,
        cache: CoordinateCache,
        encoder_cache: CoordinateCache | None = None,
    ) -> None:
        super().plan(attn, hidden_states, cache, encoder_cache)
        if not attn.is_cross_attention:
            self._windows(attn, cache)

    def self_attention(
        self,
        attn: AttentionModule,
        hidden_states: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: CoordinateCache,
    ) -> Tensor:
        windows = self._windows(attn, cache)
        return partitioned_attention(query, key, value, windows, windows)

    def _windows(self, attn: AttentionModule, cache: CoordinateCache) -> Partition:
        """The rows of each window."""
        return cache.partition(
            get_window_size(self, attn) if self.window_size is None else self.window_size,
            getattr(attn, "window_shift", 0) if self.shift is None else self.shift,
        )


class SSAAttnProcessor(SparseAttnProcessor):
    """Spatial Sparse Attention among the tokens of a sample; cross-attention is to all tokens of the sample.

    Its parameters are in `attn.ssa`, a [`SpatialSparseAttention`].
    """

    def plan(
        self,
        attn: SparseAttention,
        hidden_states: Tensor,
        cache: CoordinateCache,
        encoder_cache: CoordinateCache | None = None,
    ) -> None:
        super().plan(attn, hidden_states, cache, encoder_cache)
        if attn.is_cross_attention:
            return
        ssa, device_type = self._ssa(attn), hidden_states.device.type
        autocast = torch.is_autocast_enabled(device_type)
        dtype = torch.get_autocast_dtype(device_type) if autocast else hidden_states.dtype
        # Tensors without rows that have the heads and the dtype that the projections will return.
        query, key = (
            hidden_states.new_empty(0, heads, attn.dim_head, dtype=dtype) for heads in (attn.heads, attn.kv_heads)
        )
        plan_spatial_sparse_attention(
            query,
            key,
            key,
            cache,
            ssa.compression_block_size,
            ssa.selection_block_size,
            get_window_size(self, attn),
            attn.window_shift,
        )
        ssa.plan(key, cache)

    def self_attention(
        self,
        attn: AttentionModule,
        hidden_states: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cache: CoordinateCache,
    ) -> Tensor:
        ssa = self._ssa(attn)
        compressed_key, compressed_value, gate = ssa(hidden_states, key, value, cache)
        return spatial_sparse_attention(
            query,
            key,
            value,
            compressed_key,
            compressed_value,
            gate,
            cache,
            ssa.compression_block_size,
            ssa.selection_block_size,
            ssa.topk,
            get_window_size(self, attn),
            getattr(attn, "window_shift", 0),
        )

    def _ssa(self, attn: AttentionModule) -> SpatialSparseAttention:
        """The parameters of SSA in the module."""
        ssa = getattr(attn, "ssa", None)
        if ssa is None:
            raise ValueError(
                f"`attn` must have the submodule `ssa` for {type(self).__name__}, got a {type(attn).__name__} without:"
                " configure the model with SSA, or equip it with `enable_spatial_sparse_attention(model)`"
            )
        return ssa


for _processor_class in (SparseAttnProcessor, WindowAttnProcessor, SSAAttnProcessor):
    register_processor(_processor_class)
