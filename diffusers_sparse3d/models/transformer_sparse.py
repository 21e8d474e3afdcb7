"""SparseDiT: the diffusion transformer of the sparse latents (second stage)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.normalization import FP32LayerNorm
from torch import Tensor, nn

from ..sparse_tensor import CoordinateCache
from .attention_kwargs import with_attention_kwargs
from .cache_rows import compare_rows, nan_unless
from .caching import PackedStepCacheMixin
from .context_parallel import ContextParallelMixin, RowShard
from .cuda_graphs import ReplayedCalls, active_calls
from .embeddings import coordinate_embedding
from .hub import HubModelMixin
from .input_checks import check_dtypes, check_transformer_shapes, check_transformer_values
from .modulation import Modulation, initialize_weights
from .planning import PlannedTransformerMixin, checks_values
from .single_file import OriginalCheckpointMixin
from .transformer_sparse_blocks import ShiftedSparseTransformerBlock, SparseTransformerBlock


class SparseDiT(
    ContextParallelMixin,
    PlannedTransformerMixin,
    HubModelMixin,
    PeftAdapterMixin,
    PackedStepCacheMixin,
    OriginalCheckpointMixin,
):
    r"""
    Diffusion transformer over the sparse latents of [`SparseVAE`], with Spatial Sparse Attention, conditioned on image
    tokens (Direct3D-S2, arXiv 2505.17412, section 3.3).

    This model inherits from [`~diffusers.ModelMixin`]; see there for loading, saving and the like.

    Parameters:
        sample_size (`int`, defaults to `64`): Resolution of the latent grid; coordinates are below it.
        in_channels (`int`, defaults to `16`): Channels of the latents.
        out_channels (`int`, *optional*): Channels of the prediction; `in_channels` if not given.
        num_layers (`int`, defaults to `24`): Number of transformer blocks.
        num_attention_heads (`int`, defaults to `32`): Number of query heads.
        attention_head_dim (`int`, defaults to `32`): Channels of a head; the width is heads times head channels.
        num_key_value_heads (`int`, *optional*, defaults to `2`):
            Key/value heads of self-attention; as many as query heads if None.
        cross_attention_dim (`int`, defaults to `1024`): Channels of the image tokens.
        mlp_ratio (`float`, defaults to `4.0`): Width of the MLP over the width of the model.
        attention_type (`str`, defaults to `"ssa"`):
            Self-attention: `"ssa"`, `"window"` or `"full"`. Only `"ssa"` has parameters of its own;
            `set_attn_processor` swaps the computation later.
        compression_block_size (`int`, defaults to `4`): Edge of a compression block of SSA.
        selection_block_size (`int`, defaults to `8`): Edge of a selection block of SSA.
        topk (`int`, defaults to `8`): Selection blocks that a query attends to.
        compression_version (`str`, defaults to `"v2"`): Compression blocks of SSA, `"v1"` or `"v2"`.
        window_size (`int`, defaults to `8`): Edge of the attention windows.
        use_window_shift (`bool`, defaults to `True`): Shift the windows by half their size in odd blocks.
        qk_norm (`bool`, defaults to `False`): RMS norm of query and key in self-attention.
        qk_norm_cross (`bool`, defaults to `False`): The same in cross-attention.
        share_mod (`bool`, defaults to `False`): One timestep modulation for all blocks.
        coord_scale (`float`, defaults to `1.0`): Multiplies the coordinates before the position embedding.
        sparse_conditioning (`bool`, defaults to `True`):
            The image tokens are packed and have coordinates, whose embedding is added after a linear layer.
        norm_num_groups (`int`, defaults to `32`): Groups of the norms in compression blocks.
        exact_mean (`bool`, defaults to `False`):
            Compression pools by the mean, not by sum / (count + 1) as the published model does.
    """

    __module__ = "diffusers_sparse3d"  # the library that `model_index.json` names, not this file
    _supports_gradient_checkpointing = True
    _no_split_modules = ["SparseTransformerBlock", "ShiftedSparseTransformerBlock"]
    _repeated_blocks = ["SparseTransformerBlock", "ShiftedSparseTransformerBlock"]
    _skip_layerwise_casting_patterns = ["norm"]

    _gradient_checkpointing_func: Callable[..., Any]

    @register_to_config
    def __init__(
        self,
        sample_size: int = 64,
        in_channels: int = 16,
        out_channels: int | None = None,
        num_layers: int = 24,
        num_attention_heads: int = 32,
        attention_head_dim: int = 32,
        num_key_value_heads: int | None = 2,
        cross_attention_dim: int = 1024,
        mlp_ratio: float = 4.0,
        attention_type: str = "ssa",
        compression_block_size: int = 4,
        selection_block_size: int = 8,
        topk: int = 8,
        compression_version: str = "v2",
        window_size: int = 8,
        use_window_shift: bool = True,
        qk_norm: bool = False,
        qk_norm_cross: bool = False,
        share_mod: bool = False,
        coord_scale: float = 1.0,
        sparse_conditioning: bool = True,
        norm_num_groups: int = 32,
        exact_mean: bool = False,
    ):
        super().__init__()
        if attention_type not in ("ssa", "window", "full"):
            raise ValueError(f"`attention_type` must be 'ssa', 'window' or 'full', got {attention_type!r}")
        dim = num_attention_heads * attention_head_dim
        self.out_channels = in_channels if out_channels is None else out_channels
        ssa = {
            "compression_block_size": compression_block_size,
            "selection_block_size": selection_block_size,
            "topk": topk,
            "compression_version": compression_version,
            "norm_num_groups": norm_num_groups,
            "exact_mean": exact_mean,
        }
        shifts = [window_size // 2 if use_window_shift and index % 2 else 0 for index in range(num_layers)]

        self.proj_in = nn.Linear(in_channels, dim)
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(256, dim)
        self.modulation = Modulation(dim) if share_mod else None
        self.context_embedder = nn.Linear(cross_attention_dim, cross_attention_dim) if sparse_conditioning else None
        self.transformer_blocks = nn.ModuleList(
            (ShiftedSparseTransformerBlock if shift else SparseTransformerBlock)(
                dim,
                num_attention_heads,
                attention_head_dim,
                num_attention_heads if num_key_value_heads is None else num_key_value_heads,
                cross_attention_dim,
                mlp_ratio=mlp_ratio,
                qk_norm=qk_norm,
                qk_norm_cross=qk_norm_cross,
                share_mod=share_mod,
                window_size=None if attention_type == "full" else window_size,
                window_shift=shift,
                ssa=ssa if attention_type == "ssa" else None,
            )
            for shift in shifts
        )
        self.norm_out = FP32LayerNorm(dim, eps=1e-5, elementwise_affine=False)
        self.proj_out = nn.Linear(dim, self.out_channels)
        self.gradient_checkpointing = False
        self._replays_cuda_graphs = False
        initialize_weights(self, self.time_embedding, self.proj_out)

    def enable_cuda_graphs(self) -> None:
        """
        Replay calls without gradients as CUDA graphs that are given a `cache` (and `encoder_cache`, if there are
        `encoder_coords`): the first one with a cache runs, the second is captured, all others are replayed.

        Up to some 20,000 tokens, a GPU waits for what launches its work; a replay is launched at once. The pipeline
        does so by itself. A graph holds the memory of a call until its `cache` is gone. Weights may change in place;
        of everything else that makes a model, change nothing while a `cache` is in use. Calls are not captured with
        LoRA layers, quantised weights, hooks on parts of the model (offloading, caches of diffusers), attention
        processors of other packages, or `attention_kwargs`.
        """
        self._replays_cuda_graphs = True

    def disable_cuda_graphs(self) -> None:
        """Undo `enable_cuda_graphs`."""
        self._replays_cuda_graphs = False

    @with_attention_kwargs
    def forward(
        self,
        hidden_states: Tensor,
        coords: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_coords: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
        check_inputs: bool = True,
        cache: CoordinateCache | None = None,
        encoder_cache: CoordinateCache | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """
        Predict the velocity.

        Args:
            hidden_states (`torch.Tensor` of shape `(N, in_channels)`):
                Noisy latents of all samples in one row axis, in any order.
            coords (`torch.Tensor` of shape `(N, 4)`): int32 (batch, x, y, z), in latent cells below `sample_size`.
            timestep (`torch.Tensor` of shape `(B,)`): Timesteps in [0, 1000], that is sigma times 1000.
            encoder_hidden_states (`torch.Tensor` of shape `(B, L, cross_attention_dim)` or `(M, ...)`):
                Image tokens, packed if `encoder_coords` is given; zeros for the unconditional prediction.
            encoder_coords (`torch.Tensor` of shape `(M, 4)`, *optional*):
                int32 (batch, column, row, 0) of the image tokens; required with `sparse_conditioning`.
            attention_kwargs (`dict`, *optional*): Passed to the attention processors; `scale` is the LoRA scale.
            return_dict (`bool`, defaults to `True`): Return an output class rather than a tuple.
            check_inputs (`bool`, defaults to `True`):
                Check the values of the arguments; costs a transfer from the GPU, so a training loop may switch it off.
                Without it, a cache of other rows on a GPU makes the result NaN, and a later call with it an error.
            cache (`CoordinateCache`, *optional*):
                Keeps what is derived from `coords`: from `plan`, or made with `CoordinateCache(coords, B)`. Given the
                same one at each step of a sampling loop, a model plans its attention once and not at every call.
            encoder_cache (`CoordinateCache`, *optional*): The same for `encoder_coords`.

        Returns:
            [`~diffusers.models.modeling_outputs.Transformer2DModelOutput`] or `tuple`: `sample` of shape
            `(N, out_channels)`, the velocity noise - latents, rows as in `hidden_states`.

        Raises:
            TypeError: if an argument has a wrong type.
            ValueError: if an argument has a wrong shape or dtype, `encoder_coords` is missing, or a cache is that of
                other rows; with `check_inputs` also if `coords` has duplicates or is out of range, or values are not
                finite.
        """
        config = self.config
        arguments = (hidden_states, coords, timestep, encoder_hidden_states, encoder_coords, cache, encoder_cache)
        sizes = (config.in_channels, config.cross_attention_dim, config.sparse_conditioning)
        check_transformer_shapes(*arguments, *sizes)
        check_dtypes(self.proj_in, hidden_states=hidden_states, encoder_hidden_states=encoder_hidden_states)
        if checks_values(check_inputs):
            check_transformer_values(*arguments, config.sample_size)
        same_rows = compare_rows("cache", cache, coords)
        same_encoder_rows = compare_rows("encoder_cache", encoder_cache, encoder_coords)
        batch_size = timestep.shape[0]
        has_caches = cache is not None and (encoder_cache is not None or encoder_coords is None)
        if cache is None:
            cache = CoordinateCache(coords, batch_size)
        if encoder_cache is None and encoder_coords is not None:
            encoder_cache = CoordinateCache(encoder_coords, batch_size)
        shard = self._row_shard(cache)
        if shard is not None and checks_values(check_inputs):
            shard.check_same_rows()

        def predict(hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> Tensor:
            return self._predict(
                hidden_states, timestep, encoder_hidden_states, cache, encoder_cache, attention_kwargs, shard
            )

        inputs = (hidden_states, timestep, encoder_hidden_states)
        calls: ReplayedCalls | None = None
        keep: tuple[CoordinateCache | None, ...] = (encoder_cache,)
        if has_caches and not attention_kwargs and shard is None:
            if self._replays_cuda_graphs:
                calls = cache.derived("cuda graphs", ReplayedCalls)
            else:
                calls, keep = active_calls(), (encoder_cache, cache)
        num_tokens = hidden_states.shape[0]
        sample = predict(*inputs) if calls is None else calls(self, predict, inputs, num_tokens, keep)
        sample = nan_unless(sample, same_rows, same_encoder_rows)
        if not return_dict:
            return (sample,)
        return Transformer2DModelOutput(sample=sample)

    def _predict(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        cache: CoordinateCache,
        encoder_cache: CoordinateCache | None,
        attention_kwargs: dict[str, Any] | None,
        shard: RowShard | None,
    ) -> Tensor:
        """The velocity `[N, out_channels]` for arguments that have been checked."""
        if shard is not None:
            hidden_states, cache = shard.take(hidden_states), shard.local
        coords, encoder_coords = cache.coords, None if encoder_cache is None else encoder_cache.coords
        hidden_states = self.proj_in(hidden_states)
        position_embedding = coordinate_embedding(coords[:, 1:], hidden_states.shape[-1], self.config.coord_scale)
        hidden_states = hidden_states + position_embedding.to(hidden_states.dtype)

        if self.context_embedder is not None:
            encoder_hidden_states = self.context_embedder(encoder_hidden_states)
            assert encoder_coords is not None  # checked: the layer is there for `sparse_conditioning` alone
            position_embedding = coordinate_embedding(encoder_coords[:, 1:], encoder_hidden_states.shape[-1])
            encoder_hidden_states = encoder_hidden_states + position_embedding.to(encoder_hidden_states.dtype)

        temb = self.time_embedding(self.time_proj(timestep).to(hidden_states.dtype))
        if self.modulation is not None:
            temb = self.modulation(temb)

        if shard is None:
            self.plan_blocks(hidden_states, cache, encoder_cache)
        context = (encoder_hidden_states, temb, coords, encoder_coords, cache, encoder_cache, attention_kwargs, shard)
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, *context)
            else:
                hidden_states = block(hidden_states, *context)
        sample = self.proj_out(self.norm_out(hidden_states))
        return sample if shard is None else shard.gather_result(sample)
