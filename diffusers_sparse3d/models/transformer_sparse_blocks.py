"""The blocks of SparseDiT: self-attention, cross-attention and MLP of packed tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..ops.modulation import SampleRows, gated_sum
from ..sparse_tensor import CoordinateCache
from .attention import SparseAttention
from .compatibility import register_block
from .context_parallel import RowShard
from .feed_forward import GELUFeedForward
from .modulation import Modulation
from .normalization import ModulatedLayerNorm, TokenLayerNorm


class SparseTransformerBlock(nn.Module):
    """Self-attention and MLP with adaptive layer norm, affine-normed cross-attention without gate in between.

    The arguments are those of [`SparseAttention`]; `ssa` and the windows are for self-attention alone.
    """

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        attention_head_dim: int,
        num_key_value_heads: int,
        cross_attention_dim: int,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        qk_norm_cross: bool = False,
        share_mod: bool = False,
        window_size: int | None = None,
        window_shift: int = 0,
        ssa: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.norm1 = ModulatedLayerNorm(dim, eps=1e-6)
        self.attn1 = SparseAttention(
            dim,
            num_attention_heads,
            attention_head_dim,
            kv_heads=num_key_value_heads,
            bias=False,
            qk_norm=qk_norm,
            window_size=window_size,
            window_shift=window_shift,
            ssa=ssa,
        )
        self.norm2 = TokenLayerNorm(dim, eps=1e-6)
        self.attn2 = SparseAttention(
            dim,
            num_attention_heads,
            attention_head_dim,
            cross_attention_dim=cross_attention_dim,
            qk_norm=qk_norm_cross,
        )
        self.norm3 = ModulatedLayerNorm(dim, eps=1e-6)
        self.ff = GELUFeedForward(dim, int(dim * mlp_ratio))
        self.modulation = None if share_mod else Modulation(dim)

    def plan(
        self, hidden_states: Tensor, cache: CoordinateCache, encoder_cache: CoordinateCache | None = None
    ) -> None:
        """Fill the caches with what `forward` derives from the coordinates. After this it does not wait for the GPU,
        and `torch.compile(fullgraph=True)` traces it.

        Args:
            hidden_states: tensor with the dtype and the device of the tokens, of any shape.
            cache: keeps what is derived from the coordinates of the tokens.
            encoder_cache: the same for packed conditioning tokens.
        """
        SampleRows.of(cache)
        self.attn1.plan(hidden_states, cache)
        self.attn2.plan(hidden_states, cache, encoder_cache)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        coords: Tensor,
        encoder_coords: Tensor | None = None,
        cache: CoordinateCache | None = None,
        encoder_cache: CoordinateCache | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        shard: RowShard | None = None,
    ) -> Tensor:
        """
        Args:
            hidden_states: `[N, dim]` packed tokens.
            encoder_hidden_states: `[B, L, cross_attention_dim]` or packed `[M, cross_attention_dim]`.
            temb: `[B, dim]` timestep embedding; `[B, 6 * dim]`, the modulation itself, with `share_mod`.
            coords: `[N, 4]` int32 (batch, x, y, z).
            encoder_coords: `[M, 4]` int32 of packed `encoder_hidden_states`.
            cache: keeps what is derived from `coords`; made if None.
            encoder_cache: the same for `encoder_coords`.
            attention_kwargs: passed to the attention processors.
            shard: how the tokens are a part of those of several processes, for self-attention.

        Returns:
            `[N, dim]`.
        """
        attention_kwargs = attention_kwargs or {}
        modulation = temb if self.modulation is None else self.modulation(temb)
        cache = CoordinateCache(coords, modulation.shape[0]) if cache is None else cache
        samples = SampleRows.of(cache)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)

        norm_hidden_states = self.norm1(hidden_states, shift_msa, scale_msa, samples)
        # Not an argument where there is none: processors of other packages may not know it.
        sharded = {} if shard is None else {"shard": shard}
        attn_output = self.attn1(norm_hidden_states, coords, cache=cache, **sharded, **attention_kwargs)
        hidden_states = gated_sum(hidden_states, attn_output, gate_msa, samples)

        norm_hidden_states = self.norm2(hidden_states)
        hidden_states = hidden_states + self.attn2(
            norm_hidden_states,
            coords,
            encoder_hidden_states,
            encoder_coords,
            cache=cache,
            encoder_cache=encoder_cache,
            **attention_kwargs,
        )

        norm_hidden_states = self.norm3(hidden_states, shift_mlp, scale_mlp, samples)
        return gated_sum(hidden_states, self.ff(norm_hidden_states), gate_mlp, samples)


class ShiftedSparseTransformerBlock(SparseTransformerBlock):
    """`SparseTransformerBlock` whose windows are shifted: `torch.compile` keeps graphs by the code of `forward`."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(hidden_states, *args, **kwargs)


register_block(SparseTransformerBlock)
register_block(ShiftedSparseTransformerBlock)
