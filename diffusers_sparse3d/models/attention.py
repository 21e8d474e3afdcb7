"""The attention module for packed sparse tokens, and the parameters of Spatial Sparse Attention (SSA)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from torch import Tensor, nn

from ..ops.pooling import plan_sparse_mean_pool, sparse_mean_pool
from ..sparse_tensor import CoordinateCache
from .attention_checks import check_attention_backend, get_ssa, resolve_processor
from .attention_kwargs import expected_by
from .attention_processors import (
    PROCESSORS,
    SparseAttnProcessor,
    SSAAttnProcessor,
    WindowAttnProcessor,
    warn_of_padded_processor,
)
from .normalization import MultiHeadRMSNorm
from .sparse_layers import SparseConv3d, SparseGroupNorm


class CompressionBlock(nn.Module):
    """Compression of the tokens inside each block to one feature (arXiv 2505.17412, section 3.3).

    Version "v1" is a kernel-1 convolution, SiLU and mean pooling. Version "v2" is norm, SiLU and mean pooling, then a
    convolution, norm, SiLU and convolution on the pooled grid, plus the pooled input.

    Args:
        channels: channels of the tokens and of the result.
        block_size: edge of a block in voxels.
        version: "v1" or "v2".
        norm_num_groups: groups of the norms of version "v2".
        exact_mean: pool by the mean, not by sum / (count + 1) as the published model does.
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
            raise ValueError(f"`compression_version` must be 'v1' or 'v2', got {version!r}")
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
        """Fill `cache` with what `forward` derives from the coordinates, for the dtype and device of `feats`."""
        plan_sparse_mean_pool(feats, cache, self.block_size)
        if self.version == "v2":
            pooled_cache, _ = cache.downsample(self.block_size)
            self.norm_in.plan(feats, cache)
            for layer in (self.conv1, self.norm, self.conv2):
                layer.plan(feats, pooled_cache)

    def forward(self, feats: Tensor, cache: CoordinateCache) -> Tensor:
        """Compress `[N, C]` on the voxels of `cache` to `[M, C]` on those of `cache.downsample(block_size)`."""
        if self.version == "v1":
            activated = F.silu(self.conv_in(feats, cache))
            return sparse_mean_pool(activated, cache, self.block_size, self.exact_mean)
        activated_and_skip = torch.cat([self.norm_in(feats, cache, silu=True), feats], dim=1)
        pooled, skip = sparse_mean_pool(activated_and_skip, cache, self.block_size, self.exact_mean).chunk(2, dim=1)
        pooled_cache, _ = cache.downsample(self.block_size)
        residual = self.conv1(pooled, pooled_cache)
        residual = self.conv2(self.norm(residual, pooled_cache, silu=True), pooled_cache)
        return skip + residual


class GateLinear(nn.Linear):
    """`nn.Linear` without bias to a few channels: on a GPU, to a multiple of eight that are cut off again.

    Matrix units take eight columns; without, cuBLAS reads the tokens at a quarter of the bandwidth.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not input.is_cuda:
            return super().forward(input)
        weight = F.pad(self.weight, (0, 0, 0, -self.out_features % 8))
        return F.linear(input, weight)[..., : self.out_features]


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
                f"`selection_block_size` must be a multiple of `compression_block_size` {compression_block_size}, got"
                f" {selection_block_size}"
            )
        self.compression_block_size = compression_block_size
        self.selection_block_size = selection_block_size
        self.topk = topk
        channels = kv_heads * dim_head
        self.intra_block_pos_embed = nn.Parameter(torch.zeros(*(compression_block_size,) * 3, channels))
        compression = (channels, compression_block_size, compression_version, norm_num_groups, exact_mean)
        self.compress_key = CompressionBlock(*compression)
        self.compress_value = CompressionBlock(*compression)
        self.gate = GateLinear(query_dim, 3, bias=False)

    def plan(self, key: Tensor, cache: CoordinateCache) -> None:
        """Fill `cache` with what `forward` derives from the coordinates, for the dtype and device of `key`."""
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
        # An embedding, because its backward sums the many tokens of a place without atomic additions.
        position_embedding = F.embedding(self._places(cache), self.intra_block_pos_embed.flatten(0, 2))
        compressed_key = self.compress_key(key.flatten(1) + position_embedding.to(key.dtype), cache)
        compressed_value = self.compress_value(value.flatten(1), cache)
        gate = self.gate(hidden_states).sigmoid()
        return compressed_key.unflatten(1, key.shape[1:]), compressed_value.unflatten(1, value.shape[1:]), gate

    def _places(self, cache: CoordinateCache) -> Tensor:
        """Index `[N]` int64 of each voxel in its compression block, z fastest."""
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

    processor: Callable[..., Tensor]  # declared for the type checker; the mixin sets it

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
        ssa: dict[str, Any] | None = None,
        processor: SparseAttnProcessor | None = None,
    ):
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        if heads % kv_heads:
            raise ValueError(f"`kv_heads` must divide `heads` {heads}, got {kv_heads}")
        if ssa is not None and window_size is None:
            raise ValueError("`window_size` must be given with `ssa`")
        self.heads = heads
        self.kv_heads = kv_heads
        self.dim_head = dim_head
        self.is_cross_attention = cross_attention_dim is not None
        self.window_size = window_size
        self.window_shift = window_shift
        key_dim = query_dim if cross_attention_dim is None else cross_attention_dim
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

    def set_processor(self, processor: Callable[..., Tensor] | str) -> None:
        """
        Set how attention is computed.

        Args:
            processor: "full", "window", "ssa", or a processor. One that takes neither `coords` nor `cache` by name
                cannot tell the samples of packed tokens apart: a warning says so.

        Raises:
            ValueError: for another name, or "ssa" where a module for self-attention has no `ssa`.
            TypeError: for a class, or an object that cannot be called.
        """
        if processor == "ssa" and not self.is_cross_attention:
            get_ssa(self, "ssa")
        resolved = resolve_processor(processor, PROCESSORS)
        if not isinstance(resolved, SparseAttnProcessor):
            warn_of_padded_processor(resolved)
        super().set_processor(resolved)

    def plan(
        self, hidden_states: Tensor, cache: CoordinateCache, encoder_cache: CoordinateCache | None = None
    ) -> None:
        """Fill the caches as `SparseAttnProcessor.plan` does; a processor of another kind does so at its call."""
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
        **kwargs: Any,
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


class PackedAttentionMixin(AttentionMixin):
    """`AttentionMixin` of diffusers for models of [`SparseAttention`]; a base class before `ModelMixin`.

    `set_attn_processor` takes "full", "window" and "ssa" too.
    """

    def set_attention_backend(self, backend: str) -> None:
        """
        Take "native", which changes nothing: each processor chooses its kernels by device and dtype.

        Raises:
            ValueError: for another backend of diffusers, before anything is downloaded for it.
        """
        check_attention_backend(backend)
        super().set_attention_backend(backend)
