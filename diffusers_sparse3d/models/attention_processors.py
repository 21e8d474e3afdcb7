"""The attention processors for packed sparse tokens: full, windowed and Spatial Sparse Attention."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from diffusers.utils import logging
from torch import Tensor

from ..checks import check_integer
from ..ops.coordinates import Partition
from ..ops.gather import permute_rows
from ..ops.packed_attention import packed_attention, partitioned_attention
from ..ops.spatial_sparse_attention import plan_spatial_sparse_attention, spatial_sparse_attention
from ..sparse_tensor import CoordinateCache
from .attention_checks import check_attention_backend, get_ssa, get_window_size, refuse
from .attention_layouts import AttentionModule, coordinate_cache, project, project_output
from .compatibility import register_processor


if TYPE_CHECKING:
    from .attention import SparseAttention
    from .context_parallel import RowShard

logger = logging.get_logger(__name__)


def warn_of_padded_processor(processor: Any) -> None:
    """Warn if a processor takes neither `coords` nor `cache` by name, as those of diffusers for padded tokens."""
    if not {"coords", "cache"} & set(inspect.signature(processor).parameters):
        logger.warning(
            f"{type(processor).__name__} takes neither `coords` nor `cache`: it is not for packed sparse tokens, whose"
            f" samples these tell apart. Processors that are: {', '.join(map(repr, PROCESSORS))}."
        )


class SparseAttnProcessor:
    """Self-attention among all tokens of a sample, cross-attention to all conditioning tokens of the sample.

    A processor has no state: one instance serves a whole model. It calls `attn.to_q`, `to_k`, `to_v` (or `to_qkv`),
    `to_out`, and where they exist `attn.norm_q` and `norm_k`, so attention modules of other packages can have it too.
    """

    @property
    def _attention_backend(self) -> None:
        """None: the backend of diffusers that an attention call asks for. None but "native" can be set."""
        return None

    @_attention_backend.setter
    def _attention_backend(self, backend: str | None) -> None:
        check_attention_backend(backend)

    @property
    def _parallel_config(self) -> None:
        """None: no hook of diffusers splits the tokens of a model, since their coordinates would not go with them."""
        return None

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        if config is not None:
            raise ValueError(
                "`config` cannot be used for attention among packed sparse tokens of a model of another package: only"
                " `SparseDiT.enable_parallelism` splits the coordinates with the tokens"
            )

    def __call__(
        self,
        attn: AttentionModule,
        hidden_states: Tensor,
        coords: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_coords: Tensor | None = None,
        cache: CoordinateCache | None = None,
        encoder_cache: CoordinateCache | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        shard: RowShard | None = None,
    ) -> Tensor:
        """
        Args:
            attn: the attention module.
            hidden_states: `[N, C]` packed tokens, in any order; or `[B, L, C]`, whose B L rows `coords` tell apart.
            coords: `[N, 4]` int32 (batch, x, y, z) of the tokens; not needed with `cache`.
            encoder_hidden_states: `[B, L, D]` or packed `[M, D]`; self-attention if None.
            encoder_coords: `[M, 4]` int32 of packed `encoder_hidden_states`; only the batch column is read.
            cache: keeps what is derived from `coords`, for all layers of a model; made from `coords` if None.
            encoder_cache: the same for `encoder_coords`.
            attention_mask, image_rotary_emb: must be None; here because modules of diffusers hand them on.
            shard: how the tokens are a part of those of several processes, for self-attention.

        Returns:
            Of the shape of `hidden_states`.

        Raises:
            ValueError: if neither `coords` nor `cache` is given, `coords` are no valid voxels or not those of
                `hidden_states`, packed `encoder_hidden_states` come without coordinates, the samples of tokens and
                conditioning do not match, or a mask or a rotary embedding is given.
        """
        if attention_mask is not None or image_rotary_emb is not None:
            refuse(attention_mask=attention_mask, image_rotary_emb=image_rotary_emb)
        shape = hidden_states.shape
        hidden_states = hidden_states.flatten(0, -2)
        if cache is None:
            cache = coordinate_cache(coords, hidden_states.shape[0])
        source = None if encoder_hidden_states is None else encoder_hidden_states.flatten(0, -2)
        query, key, value = project(attn, hidden_states, source)

        if encoder_hidden_states is None and shard is not None:
            output = self.sharded_self_attention(attn, hidden_states, query, key, value, shard)
        elif encoder_hidden_states is None:
            output = self.self_attention(attn, hidden_states, query, key, value, cache)
        elif encoder_hidden_states.ndim == 3:
            output = self.padded_cross_attention(query, key, value, cache, encoder_hidden_states.shape[0])
        else:
            if encoder_cache is None:
                if encoder_coords is None:
                    raise ValueError("`encoder_coords` must be given with packed `encoder_hidden_states` [M, D]")
                encoder_cache = CoordinateCache(encoder_coords)
            output = self.packed_cross_attention(query, key, value, cache, encoder_cache)
        output = project_output(attn, output.flatten(1))
        return output.view(*shape[:-1], output.shape[-1])

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

    def sharded_self_attention(
        self,
        attn: AttentionModule,
        hidden_states: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        shard: RowShard,
    ) -> Tensor:
        """The same for the tokens of one process, whose rows are a part of those that attend to each other."""
        key, value = (shard.to_heads(rows) for rows in (key, value))
        output = self.self_attention(attn, hidden_states, shard.to_heads(query), key, value, shard.cache)
        return shard.to_rows(output)

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
            query if samples.in_order else permute_rows(query, samples.order, samples.inverse),
            key[:used],
            value[:used],
            samples.cu_seqlens,
            cu_seqlens_k,
            max_seqlen_q=samples.max_seqlen,
            max_seqlen_k=length,
        )
        return output if samples.in_order else permute_rows(output, samples.inverse, samples.order)

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

    Raises:
        ValueError: if one is no integer, or out of range.
    """

    def __init__(self, window_size: int | None = None, shift: int | None = None):
        self.window_size = window_size if window_size is None else check_integer("window_size", window_size, 1)
        self.shift = shift if shift is None else check_integer("shift", shift, 0)

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
        ssa, device_type = get_ssa(attn, type(self).__name__), hidden_states.device.type
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
            getattr(attn, "window_shift", 0),
            ssa.topk,
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
        ssa = get_ssa(attn, type(self).__name__)
        return self._attend(attn, cache, query, key, value, *ssa(hidden_states, key, value, cache))

    def sharded_self_attention(
        self,
        attn: AttentionModule,
        hidden_states: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        shard: RowShard,
    ) -> Tensor:
        ssa = get_ssa(attn, type(self).__name__)
        # Compression mixes the key/value heads, which are few.
        key, value = shard.gather(torch.stack([key, value], dim=1)).unbind(1)
        compressed_key, compressed_value, gate = ssa(hidden_states, key, value, shard.cache)
        keys_and_values = (shard.own_heads(rows) for rows in (key, value, compressed_key, compressed_value))
        output = self._attend(attn, shard.cache, shard.to_heads(query), *keys_and_values, shard.gather(gate))
        return shard.to_rows(output)

    def _attend(self, attn: AttentionModule, cache: CoordinateCache, *tensors: Tensor) -> Tensor:
        """`spatial_sparse_attention` with the sizes of a module; `tensors` are its tensors, in its order."""
        ssa = get_ssa(attn, type(self).__name__)
        query, key, value, compressed_key, compressed_value, gate = tensors
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


PROCESSORS: Mapping[str, type[SparseAttnProcessor]] = {
    "full": SparseAttnProcessor,
    "window": WindowAttnProcessor,
    "ssa": SSAAttnProcessor,
}

for _processor_class in PROCESSORS.values():
    register_processor(_processor_class)
