"""DenseDiT: the diffusion transformer of the dense latent grid (first stage)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import FP32LayerNorm
from torch import Tensor, nn

from ..ops.modulation import SampleRows, gated_sum
from .attention_checks import resolve_processor
from .attention_kwargs import expected_by, with_attention_kwargs
from .attention_processors import SparseAttnProcessor
from .caching import StepCacheMixin
from .compatibility import register_block, register_processor
from .cuda_graphs import active_calls
from .embeddings import coordinate_embedding
from .feed_forward import GELUFeedForward
from .hub import HubModelMixin
from .input_checks import check_dense_transformer_inputs, check_dtypes
from .modulation import Modulation, initialize_weights
from .normalization import ModulatedLayerNorm, MultiHeadRMSNorm, TokenLayerNorm
from .pixel_alignment import PixelAlignment
from .single_file import OriginalCheckpointMixin


class DenseAttnProcessor:
    """Self- or cross-attention over `[B, L, C]` through diffusers' `dispatch_attention_fn`."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self, attn: DenseAttention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None
    ) -> Tensor:
        if encoder_hidden_states is None:
            encoder_hidden_states = hidden_states
        query = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1))
        key = attn.to_k(encoder_hidden_states).unflatten(-1, (attn.heads, -1))
        value = attn.to_v(encoder_hidden_states).unflatten(-1, (attn.heads, -1))
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        hidden_states = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        hidden_states = attn.to_out[0](hidden_states.flatten(2))
        return attn.to_out[1](hidden_states)


class DenseAttention(nn.Module, AttentionModuleMixin):
    """Multi-head attention; cross-attention where `cross_attention_dim` is given, with optional q/k RMS norm."""

    _default_processor_cls = DenseAttnProcessor
    _available_processors = [DenseAttnProcessor]
    _supports_qkv_fusion = False

    processor: Callable[..., Tensor]  # declared for the type checker; the mixin sets it

    def __init__(
        self,
        query_dim: int,
        heads: int,
        dim_head: int,
        cross_attention_dim: int | None = None,
        bias: bool = True,
        dropout: float = 0.0,
        qk_norm: bool = False,
        processor: DenseAttnProcessor | None = None,
    ):
        super().__init__()
        inner_dim = heads * dim_head
        self.heads = heads
        self.is_cross_attention = cross_attention_dim is not None
        key_dim = query_dim if cross_attention_dim is None else cross_attention_dim
        self.to_q = nn.Linear(query_dim, inner_dim, bias=bias)
        self.to_k = nn.Linear(key_dim, inner_dim, bias=bias)
        self.to_v = nn.Linear(key_dim, inner_dim, bias=bias)
        self.norm_q = MultiHeadRMSNorm(heads, dim_head) if qk_norm else None
        self.norm_k = MultiHeadRMSNorm(heads, dim_head) if qk_norm else None
        self.to_out = nn.ModuleList([nn.Linear(inner_dim, query_dim), nn.Dropout(dropout)])
        self.set_processor(processor or self._default_processor_cls())

    def set_processor(self, processor: Callable[..., Tensor] | str) -> None:
        """Set how attention is computed: "full", or a processor; a TypeError or ValueError refuses all else."""
        resolved = resolve_processor(processor, {"full": DenseAttnProcessor})
        if isinstance(resolved, SparseAttnProcessor):
            raise ValueError(
                f"`processor` must be one for the tokens of a grid, got {type(resolved).__name__}, which tells packed"
                " tokens apart by their `coords`"
            )
        super().set_processor(resolved)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **kwargs: Any) -> Tensor:
        """`[B, N, query_dim]`; keys are of `hidden_states` itself, or of `encoder_hidden_states [B, L, D]`."""
        return self.processor(self, hidden_states, encoder_hidden_states, **expected_by(self.processor, kwargs))


class DenseTransformerBlock(nn.Module):
    """Self-attention and MLP with adaptive layer norm, affine-normed cross-attention without gate in between.

    `SparseTransformerBlock` repeats these lines on purpose: as in diffusers, every layer call of a model is visible in
    its own file, and the two differ in how tokens are laid out and modulated.
    """

    def __init__(
        self,
        dim: int,
        num_attention_heads: int,
        attention_head_dim: int,
        cross_attention_dim: int,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        qk_norm_cross: bool = False,
        share_mod: bool = False,
    ):
        super().__init__()
        self.norm1 = ModulatedLayerNorm(dim, eps=1e-6)
        self.attn1 = DenseAttention(dim, num_attention_heads, attention_head_dim, qk_norm=qk_norm)
        self.norm2 = TokenLayerNorm(dim, eps=1e-6)
        self.attn2 = DenseAttention(
            dim,
            num_attention_heads,
            attention_head_dim,
            cross_attention_dim=cross_attention_dim,
            qk_norm=qk_norm_cross,
        )
        self.norm3 = ModulatedLayerNorm(dim, eps=1e-6)
        self.ff = GELUFeedForward(dim, int(dim * mlp_ratio))
        self.modulation = None if share_mod else Modulation(dim)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        """
        Args:
            hidden_states: `[B, N, dim]` tokens.
            encoder_hidden_states: `[B, L, cross_attention_dim]`, or those of the last samples, see `DenseDiT.forward`.
            temb: `[B, dim]` timestep embedding; `[B, 6 * dim]`, the modulation itself, with `share_mod`.
            attention_kwargs: passed to the attention processors.

        Returns:
            `[B, N, dim]`.
        """
        attention_kwargs = attention_kwargs or {}
        modulation = temb if self.modulation is None else self.modulation(temb)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, dim=-1)
        samples = SampleRows(modulation.shape[0])

        norm_hidden_states = self.norm1(hidden_states, shift_msa, scale_msa, samples)
        attn_output = self.attn1(norm_hidden_states, **attention_kwargs)
        hidden_states = gated_sum(hidden_states, attn_output, gate_msa, samples)

        unconditional, hidden_states = hidden_states.tensor_split([len(hidden_states) - len(encoder_hidden_states)])
        norm_hidden_states = self.norm2(hidden_states)
        hidden_states = hidden_states + self.attn2(norm_hidden_states, encoder_hidden_states, **attention_kwargs)
        if len(unconditional):
            # All keys are the same there, so that every query attends to their common value: one of each will do.
            query, token = (
                rows.new_zeros(1, 1, rows.shape[-1]) for rows in (norm_hidden_states, encoder_hidden_states)
            )
            hidden_states = torch.cat([unconditional + self.attn2(query, token, **attention_kwargs), hidden_states])

        norm_hidden_states = self.norm3(hidden_states, shift_mlp, scale_mlp, samples)
        return gated_sum(hidden_states, self.ff(norm_hidden_states), gate_mlp, samples)


register_block(DenseTransformerBlock)
register_processor(DenseAttnProcessor)


class DenseDiT(HubModelMixin, AttentionMixin, PeftAdapterMixin, StepCacheMixin, OriginalCheckpointMixin):
    r"""
    Diffusion transformer over the dense latent grid of [`DenseVAE`], conditioned on image tokens.

    This model inherits from [`~diffusers.ModelMixin`]; see there for loading, saving and the like.

    Parameters:
        sample_size (`int`, defaults to `16`): Resolution of the latent grid.
        in_channels (`int`, defaults to `8`): Channels of the latents.
        out_channels (`int`, *optional*): Channels of the prediction; `in_channels` if not given.
        num_layers (`int`, defaults to `24`): Number of transformer blocks.
        num_attention_heads (`int`, defaults to `16`): Number of attention heads.
        attention_head_dim (`int`, defaults to `64`): Channels of a head; the width is heads times head channels.
        cross_attention_dim (`int`, defaults to `1024`): Channels of the image tokens.
        mlp_ratio (`float`, defaults to `4.0`): Width of the MLP over the width of the model.
        patch_size (`int`, defaults to `1`): Edge of the cubic patch of latent cells that makes one token.
        qk_norm (`bool`, defaults to `False`): RMS norm of query and key in self-attention.
        qk_norm_cross (`bool`, defaults to `False`): The same in cross-attention.
        share_mod (`bool`, defaults to `False`): One timestep modulation for all blocks.
        pixel_aligned (`bool`, defaults to `False`):
            Add to each token what the image shows where its cells project to, with a camera that is predicted from the
            image tokens, for shapes that face the camera. The tokens must end with a square of patches. The published
            models do without.
    """

    __module__ = "diffusers_sparse3d"  # the library that `model_index.json` names, not this file
    _supports_gradient_checkpointing = True
    _no_split_modules = ["DenseTransformerBlock"]
    _repeated_blocks = ["DenseTransformerBlock"]
    _skip_layerwise_casting_patterns = ["norm"]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 16,
        in_channels: int = 8,
        out_channels: int | None = None,
        num_layers: int = 24,
        num_attention_heads: int = 16,
        attention_head_dim: int = 64,
        cross_attention_dim: int = 1024,
        mlp_ratio: float = 4.0,
        patch_size: int = 1,
        qk_norm: bool = False,
        qk_norm_cross: bool = False,
        share_mod: bool = False,
        pixel_aligned: bool = False,
    ):
        super().__init__()
        if sample_size % patch_size:
            raise ValueError(f"`sample_size` must be a multiple of `patch_size` {patch_size}, got {sample_size}")
        dim = num_attention_heads * attention_head_dim
        self.out_channels = in_channels if out_channels is None else out_channels

        self.proj_in = nn.Linear(in_channels * patch_size**3, dim)
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(256, dim)
        self.modulation = Modulation(dim) if share_mod else None
        self.pixel_alignment = (
            PixelAlignment(dim, cross_attention_dim, sample_size // patch_size) if pixel_aligned else None
        )
        self.transformer_blocks = nn.ModuleList(
            DenseTransformerBlock(
                dim,
                num_attention_heads,
                attention_head_dim,
                cross_attention_dim,
                mlp_ratio=mlp_ratio,
                qk_norm=qk_norm,
                qk_norm_cross=qk_norm_cross,
                share_mod=share_mod,
            )
            for _ in range(num_layers)
        )
        self.norm_out = FP32LayerNorm(dim, eps=1e-5, elementwise_affine=False)
        self.proj_out = nn.Linear(dim, self.out_channels * patch_size**3)
        self.gradient_checkpointing = False
        initialize_weights(self, self.time_embedding, self.proj_out)
        if self.pixel_alignment is not None:
            self.pixel_alignment.reset_output()

    def _patchify(self, hidden_states: Tensor) -> Tensor:
        """`[B, C, X, Y, Z]` to tokens `[B, (X/p) * (Y/p) * (Z/p), C * p^3]`, x-major, channels before patch cells."""
        patch_size = self.config.patch_size
        for axis in (2, 4, 6):
            hidden_states = hidden_states.unflatten(axis, (-1, patch_size))
        return hidden_states.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)

    def _unpatchify(self, hidden_states: Tensor) -> Tensor:
        """The inverse of `_patchify`, for `out_channels`."""
        patch_size, grid_size = self.config.patch_size, self.config.sample_size // self.config.patch_size
        hidden_states = hidden_states.unflatten(2, (-1, patch_size, patch_size, patch_size))
        hidden_states = hidden_states.unflatten(1, (grid_size, grid_size, grid_size))
        hidden_states = hidden_states.permute(0, 4, 1, 5, 2, 6, 3, 7)
        return hidden_states.flatten(6).flatten(4, 5).flatten(2, 3)

    @with_attention_kwargs
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        num_unconditional: int = 0,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """
        Predict the velocity.

        Args:
            hidden_states (`torch.Tensor` of shape `(B, in_channels, R, R, R)`): Noisy latents, R = `sample_size`.
            timestep (`torch.Tensor` of shape `(B,)`): Timesteps in [0, 1000], that is sigma times 1000.
            encoder_hidden_states (`torch.Tensor` of shape `(B, L, cross_attention_dim)`):
                Image tokens; zeros for the unconditional prediction.
            attention_kwargs (`dict`, *optional*): Passed to the attention processors; `scale` is the LoRA scale.
            return_dict (`bool`, defaults to `True`): Return an output class rather than a tuple.
            num_unconditional (`int`, defaults to `0`):
                The first so many samples are predicted without an image, as with zeros, and `encoder_hidden_states`
                holds the tokens of the others alone: most of their cross-attention is spared.

        Returns:
            [`~diffusers.models.modeling_outputs.Transformer2DModelOutput`] or `tuple`: `sample` of shape
            `(B, out_channels, R, R, R)`, the velocity noise - latents.

        Raises:
            TypeError: if an argument is no tensor, or `attention_kwargs` are no dictionary.
            ValueError: if an argument has a wrong shape or dtype, or is on another device, or `encoder_hidden_states`
                do not fit `num_unconditional` or, with `pixel_aligned`, do not end with a square of patches.
        """
        shape = (self.config.in_channels, *(self.config.sample_size,) * 3)
        sizes = (shape, self.config.cross_attention_dim, num_unconditional)
        check_dense_transformer_inputs(hidden_states, timestep, encoder_hidden_states, *sizes)
        check_dtypes(self.proj_in, hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states)

        def predict(hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
            return self._predict(hidden_states, timestep, encoder_hidden_states, attention_kwargs)

        inputs = (hidden_states, timestep, encoder_hidden_states)
        calls = None if attention_kwargs else active_calls()
        num_tokens = hidden_states.shape[0] * (self.config.sample_size // self.config.patch_size) ** 3
        sample = predict(*inputs) if calls is None else calls(self, predict, inputs, num_tokens)
        if not return_dict:
            return (sample,)
        return Transformer2DModelOutput(sample=sample)

    def _predict(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        attention_kwargs: dict[str, Any] | None,
    ) -> Tensor:
        """The velocity, of the shape of `hidden_states` with `out_channels`, for arguments that have been checked."""
        grid_size = self.config.sample_size // self.config.patch_size

        hidden_states = self.proj_in(self._patchify(hidden_states))
        axis = torch.arange(grid_size, device=hidden_states.device)
        position_embedding = coordinate_embedding(torch.cartesian_prod(axis, axis, axis), hidden_states.shape[-1])
        hidden_states = hidden_states + position_embedding.to(hidden_states.dtype)
        if self.pixel_alignment is not None:
            # Zeros for the first samples, which may have no image tokens.
            num_unconditional = len(hidden_states) - len(encoder_hidden_states)
            aligned = self.pixel_alignment(encoder_hidden_states)
            hidden_states = hidden_states + F.pad(aligned, (0, 0, 0, 0, num_unconditional, 0))

        temb = self.time_embedding(self.time_proj(timestep).to(hidden_states.dtype))
        if self.modulation is not None:
            temb = self.modulation(temb)

        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(
                    block, hidden_states, encoder_hidden_states, temb, attention_kwargs
                )
            else:
                hidden_states = block(hidden_states, encoder_hidden_states, temb, attention_kwargs)

        return self._unpatchify(self.proj_out(self.norm_out(hidden_states)))
