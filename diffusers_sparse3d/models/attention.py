"""Attention over packed sparse tokens: the module, Spatial Sparse Attention's parameters, and the processors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.hooks._helpers import AttentionProcessorMetadata, AttentionProcessorRegistry
from diffusers.models.attention import AttentionModuleMixin
from torch import Tensor, nn

from ..ops.coordinates import Partition
from ..ops.packed_attention import packed_attention, partitioned_attention
from ..ops.pooling import plan_sparse_mean_pool, sparse_mean_pool
from ..ops.spatial_sparse_attention import plan_spatial_sparse_attention, spatial_sparse_attention
from ..sparse_tensor import CoordinateCache
from .attention_kwargs import expected_by
from .normalization import MultiHeadRMSNorm
from .sparse_layers import SparseConv3d, SparseGroupNorm


class SparseAttnProcessor:
    """Self-attention among all tokens of a sample, cross-attention to all conditioning tokens of the sample.

    Stateless: one instance serves a whole model. It calls `attn.to_q`, `to_k`, `to_v`, `to_out`, and where they exist
    `attn.norm_q` and `norm_k`, so it works with attention modules of other packages too.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: nn.Module,
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
            cache: what depends on `coords` alone, shared by the layers of a model; made from `coords` if None.
            encoder_cache: the same for `encoder_coords`.

        Returns:
            `[N, C]`.

        Raises:
            ValueError: if neither `coords` nor `cache` is given, or packed `encoder_hidden_states` come without
                coordinates, or the samples of tokens and conditioning do not match.
        """
        if cache is None:
            if coords is None:
                raise ValueError("`coords` (or `cache`) is needed to tell the samples of packed tokens apart")
            cache = CoordinateCache(coords)
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states.flatten(0, -2)
        query = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1))
        key = attn.to_k(source).unflatten(-1, (-1, query.shape[-1]))
        value = attn.to_v(source).unflatten(-1, (key.shape[1], -1))
        if getattr(attn, "norm_q", None) is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)

        if encoder_hidden_states is None:
            output = self.self_attention(attn, hidden_states, query, key, value, cache)
        elif encoder_hidden_states.ndim == 3:
            output = self.padded_cross_attention(query, key, value, cache, encoder_hidden_states.shape[0])
        else:
            if encoder_cache is None:
                if encoder_coords is None:
                    raise ValueError("`encoder_coords` is needed with packed `encoder_hidden_states` [M, D]")
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
        """Derive from the coordinates what `__call__` needs of them; the caches keep it.

        `__call__` would do so when it first needs it, and wait for the GPU then. After this it does not, and
        `torch.compile(fullgraph=True)` traces it.

        Args:
            attn: the attention module.
            hidden_states: tensor with the dtype and the device of the tokens, of any shape.
            cache: what depends on the coordinates of the tokens alone.
            encoder_cache: the same for packed conditioning tokens.
        """
        cache.batch_partition()
        if encoder_cache is not None:
            encoder_cache.batch_partition()

    def self_attention(
        self, attn: nn.Module, hidden_states: Tensor, query: Tensor, key: Tensor, value: Tensor, cache: CoordinateCache
    ) -> Tensor:
        """`query [N, H, D]`, `key` and `value [N, H_kv, D]` in any row order -> `[N, H, D]`."""
        samples = cache.batch_partition()
        return partitioned_attention(query, key, value, samples, samples)

    def padded_cross_attention(
        self, query: Tensor, key: Tensor, value: Tensor, cache: CoordinateCache, batch_size: int
    ) -> Tensor:
        """Every sample has the same number of keys: `key [B * L, H_kv, D]`."""
        if batch_size < cache.batch_size:
            raise ValueError(f"`encoder_hidden_states` has {batch_size} samples, but `coords` has {cache.batch_size}")
        samples, length = cache.batch_partition(), key.shape[0] // batch_size
        cu_seqlens_k = torch.arange(cache.batch_size + 1, dtype=torch.int32, device=key.device) * length
        used = cache.batch_size * length
        output = packed_attention(
            query.index_select(0, samples.order),
            key[:used],
            value[:used],
            samples.cu_seqlens,
            cu_seqlens_k,
            max_seqlen_q=samples.max_seqlen,
            max_seqlen_k=length,
        )
        return output.index_select(0, samples.inverse)

    def packed_cross_attention(
        self, query: Tensor, key: Tensor, value: Tensor, cache: CoordinateCache, encoder_cache: CoordinateCache
    ) -> Tensor:
        """Samples have keys of different number: `key [M, H_kv, D]`."""
        if encoder_cache.batch_size < cache.batch_size:
            raise ValueError(
                f"`encoder_coords` has {encoder_cache.batch_size} samples, but `coords` has {cache.batch_size}"
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
        self, attn: nn.Module, hidden_states: Tensor, query: Tensor, key: Tensor, value: Tensor, cache: CoordinateCache
    ) -> Tensor:
        windows = self._windows(attn, cache)
        return partitioned_attention(query, key, value, windows, windows)

    def _windows(self, attn: nn.Module, cache: CoordinateCache) -> Partition:
        window_size = getattr(attn, "window_size", None) if self.window_size is None else self.window_size
        shift = getattr(attn, "window_shift", 0) if self.shift is None else self.shift
        if window_size is None:
            raise ValueError(
                f"`window_size` is given neither to {type(self).__name__} nor to this {type(attn).__name__}"
            )
        return cache.partition(window_size, shift)


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
        # What the projections will return, without rows.
        query, key = (
            hidden_states.new_empty(0, heads, attn.dim_head, dtype=dtype) for heads in (attn.heads, attn.kv_heads)
        )
        sizes = (ssa.compression_block_size, ssa.selection_block_size, attn.window_size, attn.window_shift)
        plan_spatial_sparse_attention(query, key, key, cache, *sizes)
        ssa.plan(key, cache)

    def self_attention(
        self, attn: nn.Module, hidden_states: Tensor, query: Tensor, key: Tensor, value: Tensor, cache: CoordinateCache
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
            attn.window_size,
            attn.window_shift,
        )

    def _ssa(self, attn: nn.Module) -> SpatialSparseAttention:
        ssa = getattr(attn, "ssa", None)
        if ssa is None:
            raise ValueError(
                f"{type(self).__name__} needs the submodule `ssa`, which this {type(attn).__name__} does not have: "
                "configure the model with SSA, or equip it with `enable_spatial_sparse_attention(model)`"
            )
        return ssa


def _skip_attention(attn: nn.Module, hidden_states: Tensor, *args, **kwargs) -> Tensor:
    return hidden_states


# What diffusers' layer skipping asks about processors.
for _processor_cls in (SparseAttnProcessor, WindowAttnProcessor, SSAAttnProcessor):
    AttentionProcessorRegistry.register(_processor_cls, AttentionProcessorMetadata(_skip_attention))


class CompressionBlock(nn.Module):
    """One feature per compression block, from the tokens inside it.

    Version "v1": kernel-1 convolution, SiLU, mean pooling. Version "v2": norm, SiLU, mean pooling, and a residual of
    convolution, norm, SiLU, convolution on the pooled grid.
    """

    def __init__(
        self,
        channels: int,
        block_size: int,
        version: str = "v2",
        norm_num_groups: int = 32,
        exact_mean: bool = False,
    ):
        super().__init__()
        if version not in ("v1", "v2"):
            raise ValueError(f"`compression_version` must be 'v1' or 'v2', not {version!r}")
        self.block_size = block_size
        self.exact_mean = exact_mean
        self.version = version
        if version == "v1":
            self.conv_in = SparseConv3d(channels, channels, kernel_size=1)
        else:
            self.norm_in = SparseGroupNorm(norm_num_groups, channels)
            self.conv1 = SparseConv3d(channels, channels)
            self.norm = SparseGroupNorm(norm_num_groups, channels)
            self.conv2 = SparseConv3d(channels, channels)

    def plan(self, feats: Tensor, cache: CoordinateCache) -> None:
        """Have `cache` derive what `forward` takes from the coordinates, for the dtype and device of `feats`."""
        plan_sparse_mean_pool(feats, cache, self.block_size)
        if self.version == "v2":
            pooled_cache, _ = cache.downsample(self.block_size)
            self.norm_in.plan(feats, cache)
            for layer in (self.conv1, self.norm, self.conv2):
                layer.plan(feats, pooled_cache)

    def forward(self, feats: Tensor, cache: CoordinateCache) -> Tensor:
        """`[N, C]` on the voxels of `cache` -> `[M, C]` on those of `cache.downsample(block_size)`."""
        if self.version == "v1":
            activated = F.silu(self.conv_in(feats, cache))
            return sparse_mean_pool(activated, cache, self.block_size, self.exact_mean)
        activated_and_skip = torch.cat([self.norm_in(feats, cache, silu=True), feats], dim=1)
        pooled, skip = sparse_mean_pool(activated_and_skip, cache, self.block_size, self.exact_mean).chunk(2, dim=1)
        pooled_cache, _ = cache.downsample(self.block_size)
        residual = self.conv1(pooled, pooled_cache)
        residual = self.conv2(self.norm(residual, pooled_cache, silu=True), pooled_cache)
        return skip + residual


class SpatialSparseAttention(nn.Module):
    """The parameters that Spatial Sparse Attention adds to an attention module (arXiv 2505.17412, section 3.3).

    Compression of keys and values, the embedding of the position inside a compression block, and the gate.

    Args:
        query_dim: channels of the tokens.
        kv_heads: key/value heads.
        dim_head: channels of a head.
        compression_block_size: edge of a compression block in voxels.
        selection_block_size: edge of a selection block, a multiple of `compression_block_size`.
        topk: selection blocks that a query attends to.
        compression_version: "v1" or "v2", see [`CompressionBlock`].
        norm_num_groups: groups of the norms of version "v2".
        exact_mean: pool by the mean, not by sum / (count + 1) as the published model does.
    """

    def __init__(
        self,
        query_dim: int,
        kv_heads: int,
        dim_head: int,
        compression_block_size: int = 4,
        selection_block_size: int = 8,
        topk: int = 8,
        compression_version: str = "v2",
        norm_num_groups: int = 32,
        exact_mean: bool = False,
    ):
        super().__init__()
        if selection_block_size % compression_block_size:
            raise ValueError(
                f"`selection_block_size` {selection_block_size} is not a multiple of "
                f"`compression_block_size` {compression_block_size}"
            )
        self.compression_block_size = compression_block_size
        self.selection_block_size = selection_block_size
        self.topk = topk
        channels = kv_heads * dim_head
        self.intra_block_pos_embed = nn.Parameter(torch.zeros(*(compression_block_size,) * 3, channels))
        compression = (channels, compression_block_size, compression_version, norm_num_groups, exact_mean)
        self.compress_key = CompressionBlock(*compression)
        self.compress_value = CompressionBlock(*compression)
        self.gate = nn.Linear(query_dim, 3, bias=False)

    def plan(self, key: Tensor, cache: CoordinateCache) -> None:
        """Have `cache` derive what `forward` takes from the coordinates, for the dtype and device of `key`."""
        self._places(cache)
        self.compress_key.plan(key, cache)
        self.compress_value.plan(key, cache)

    def forward(
        self, hidden_states: Tensor, key: Tensor, value: Tensor, cache: CoordinateCache
    ) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            hidden_states: `[N, query_dim]`.
            key: `[N, H_kv, D]`.
            value: `[N, H_kv, D]`.
            cache: the voxels.

        Returns:
            Compressed key and value `[M, H_kv, D]` on the voxels of `cache.downsample(compression_block_size)`, and
            the gate `[N, 3]` of compression, selection and window.
        """
        # The backward of an embedding sums the many tokens of a place without atomic additions.
        position_embedding = F.embedding(self._places(cache), self.intra_block_pos_embed.flatten(0, 2))
        compressed_key = self.compress_key(key.flatten(1) + position_embedding.to(key.dtype), cache)
        compressed_value = self.compress_value(value.flatten(1), cache)
        gate = self.gate(hidden_states).sigmoid()
        return compressed_key.unflatten(1, key.shape[1:]), compressed_value.unflatten(1, value.shape[1:]), gate

    def _places(self, cache: CoordinateCache) -> Tensor:
        """`[N]` int64: the place of each voxel in its compression block, z fastest."""
        size = self.compression_block_size

        def make() -> Tensor:
            x, y, z = cache.coords[:, 1:].long().remainder(size).unbind(1)
            return (x * size + y) * size + z

        return cache.derived(f"places in blocks of {size}", make)


class SparseAttention(nn.Module, AttentionModuleMixin):
    """Multi-head attention over packed sparse tokens.

    Args:
        query_dim: channels of the tokens.
        heads: query heads.
        dim_head: channels of a head.
        kv_heads: key/value heads, a divisor of `heads`; `heads` if None.
        cross_attention_dim: channels of the conditioning tokens; self-attention if None.
        bias: biases of to_q, to_k, to_v and to_out.
        dropout: dropout of the output.
        qk_norm: RMS norm of query and key.
        window_size: edge of the windows of [`WindowAttnProcessor`] and [`SSAAttnProcessor`], in voxels.
        window_shift: added to the coordinates before the division into windows.
        ssa: arguments of [`SpatialSparseAttention`], which becomes the submodule `ssa`; none if None.
        processor: how attention is computed. By default SSA where `ssa` is given, windows where only `window_size` is
            given, else full attention.
    """

    _default_processor_cls = SparseAttnProcessor
    _available_processors = [SparseAttnProcessor, WindowAttnProcessor, SSAAttnProcessor]
    _supports_qkv_fusion = False

    def __init__(
        self,
        query_dim: int,
        heads: int,
        dim_head: int,
        kv_heads: int | None = None,
        cross_attention_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        qk_norm: bool = False,
        window_size: int | None = None,
        window_shift: int = 0,
        ssa: dict | None = None,
        processor: SparseAttnProcessor | None = None,
    ):
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads % kv_heads:
            raise ValueError(f"`kv_heads` {kv_heads} does not divide `heads` {heads}")
        if ssa is not None and window_size is None:
            raise ValueError("`window_size` is needed with `ssa`")
        self.heads = heads
        self.kv_heads = kv_heads
        self.dim_head = dim_head
        self.is_cross_attention = cross_attention_dim is not None
        self.window_size = window_size
        self.window_shift = window_shift
        key_dim = cross_attention_dim if self.is_cross_attention else query_dim
        self.to_q = nn.Linear(query_dim, heads * dim_head, bias=bias)
        self.to_k = nn.Linear(key_dim, kv_heads * dim_head, bias=bias)
        self.to_v = nn.Linear(key_dim, kv_heads * dim_head, bias=bias)
        self.norm_q = MultiHeadRMSNorm(heads, dim_head) if qk_norm else None
        self.norm_k = MultiHeadRMSNorm(kv_heads, dim_head) if qk_norm else None
        self.to_out = nn.ModuleList([nn.Linear(heads * dim_head, query_dim, bias=bias), nn.Dropout(dropout)])
        self.ssa = SpatialSparseAttention(query_dim, kv_heads, dim_head, **ssa) if ssa is not None else None
        if processor is None:
            if ssa is not None:
                processor = SSAAttnProcessor()
            elif window_size is not None:
                processor = WindowAttnProcessor()
            else:
                processor = self._default_processor_cls()
        self.set_processor(processor)

    def plan(
        self, hidden_states: Tensor, cache: CoordinateCache, encoder_cache: CoordinateCache | None = None
    ) -> None:
        """As in [`SparseAttnProcessor`]; a processor of another kind derives what it needs at its call."""
        if isinstance(self.processor, SparseAttnProcessor):
            self.processor.plan(self, hidden_states, cache, encoder_cache)

    def forward(
        self,
        hidden_states: Tensor,
        coords: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_coords: Tensor | None = None,
        cache: CoordinateCache | None = None,
        encoder_cache: CoordinateCache | None = None,
        **kwargs,
    ) -> Tensor:
        """Arguments, result and errors as in [`SparseAttnProcessor`]; `kwargs` go to the processor."""
        return self.processor(
            self,
            hidden_states,
            coords=coords,
            encoder_hidden_states=encoder_hidden_states,
            encoder_coords=encoder_coords,
            cache=cache,
            encoder_cache=encoder_cache,
            **expected_by(self.processor, kwargs),
        )


def enable_spatial_sparse_attention(
    model: nn.Module,
    window_size: int = 8,
    use_window_shift: bool = True,
    **config,
) -> nn.Module:
    """Equip the self-attention modules of a sparse transformer with `ssa` and [`SSAAttnProcessor`], in place.

    An attention module is one with `to_q`, `to_k`, `to_v`, `to_out` (a ModuleList of a linear layer and a dropout),
    `heads` and `set_processor`, as diffusers builds them, that hands its arguments (packed rows and `coords`) on to
    its processor. Modules with a true `is_cross_attention`, or whose keys come from other channels than their queries,
    are left as they are. The new parameters are trained from scratch; grouped key/value heads are recognised.

    Args:
        model: any module that contains attention modules.
        window_size: edge of the windows.
        use_window_shift: shift the windows by half their size in every odd self-attention module.
        config: further arguments of [`SpatialSparseAttention`]: block sizes, `topk`, `compression_version` ...

    Returns:
        The model.

    Raises:
        ValueError: if `model` has no self-attention module, or an argument in `config` does not fit.
    """
    projections = ("to_q", "to_k", "to_v", "to_out", "heads", "set_processor")
    attentions = [
        module
        for module in model.modules()
        if all(hasattr(module, name) for name in projections)
        and not getattr(module, "is_cross_attention", False)
        and module.to_q.in_features == module.to_k.in_features
    ]
    if not attentions:
        raise ValueError(f"`model` has no self-attention module (one with {', '.join(projections)})")
    for index, attn in enumerate(attentions):
        dim_head = attn.to_q.out_features // attn.heads
        ssa = SpatialSparseAttention(attn.to_q.in_features, attn.to_k.out_features // dim_head, dim_head, **config)
        attn.ssa = ssa.to(attn.to_k.weight.device, attn.to_k.weight.dtype)
        attn.window_size = window_size
        attn.window_shift = window_size // 2 if use_window_shift and index % 2 else 0
        attn.set_processor(SSAAttnProcessor())
    return model
