"""SDFRefiner and SDFSignRefiner: convolutional networks that clean up a decoded signed distance field, patch by patch.

Both are U-Nets on dense patches. The volume that they work on is sparse: a patch is filled from the voxels that it
holds, and the result is read where it is wanted, so that no array of the whole grid exists.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from ..ops.checks import check_floating
from .outputs import SDFRefinerOutput, SDFRefinerPatchOutput
from .refiner_layers import AdaptiveFilter, NarrowConv3d
from .refiner_patches import (
    PatchRefiner,
    check_refine_inputs,
    coarse_volume,
    look_up,
    scatter_to_patches,
    surrounding_coords,
)


# The signed distance over tau of the part of a volume that has no voxels: it is taken as outside.
OUTSIDE = 1.0
# The sign refiner looks at the volume at half its resolution.
SIGN_DOWNSAMPLING = 2


class SDFRefiner(PatchRefiner):
    r"""
    Refiner of the signed distances that the sparse VAE decodes, by a U-Net and adaptive filters on dense patches.

    Published use: on the output and the features of the 512^3 decoder, before the mesh that the 1024^3 stage starts
    from, with marching cubes at twice the usual iso-level. The refined volume has the inside of the object filled,
    where the decoder's has a second surface at the inner border of its voxels.

    This model inherits from [`~diffusers.ModelMixin`]; see there for loading, saving and the like.

    Parameters:
        in_channels (`int`, defaults to `1`): Channels of the input, signed distance over tau.
        out_channels (`int`, defaults to `1`): Channels of the output.
        feature_channels (`int`, defaults to `32`): Channels of the decoder's features, its width / 16.
        feature_mlp_dim (`int`, defaults to `32`): Width of the MLP that reduces them.
        block_out_channels (`tuple[int, ...]`, defaults to `(8, 32, 128, 512)`):
            Channels of the levels, finest first. Every level but the last halves the resolution.
        layers_per_block (`int`, defaults to `2`):
            Residual blocks of each level on the way down; on the way up one more.
        mid_layers (`int`, defaults to `2`): Residual blocks at the coarsest level after the first one.
        norm_num_groups (`int`, defaults to `4`): Groups of the group norms.
        sample_size (`int`, defaults to `512`): Resolution of the volume that the model is meant for.
        patch_size (`int`, defaults to `192`): Edge of a patch in voxels; group norms see a patch as a whole.
        patch_stride (`int`, *optional*):
            Distance of neighbouring patches in voxels; 5/6 of `patch_size` if not given, as published. Across the
            overlap their results are mixed linearly.
    """

    __module__ = "diffusers_sparse3d"  # the library that `model_index.json` names, not this file
    _no_split_modules = ["RefinerDownBlock", "RefinerUpBlock", "AdaptiveFilter"]
    # All layers, because `refine` calls them without `forward`.
    _group_offload_block_modules = [
        "conv_in",
        "unet",
        "filter_in",
        "conv_mid",
        "filter_mid",
        "conv_out",
        "filter_out",
    ]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        feature_channels: int = 32,
        feature_mlp_dim: int = 32,
        block_out_channels: tuple[int, ...] = (8, 32, 128, 512),
        layers_per_block: int = 2,
        mid_layers: int = 2,
        norm_num_groups: int = 4,
        sample_size: int = 512,
        patch_size: int = 192,
        patch_stride: int | None = None,
    ):
        super().__init__()
        patch_stride = patch_size - patch_size // 6 if patch_stride is None else patch_stride
        channels = block_out_channels[0]
        self.conv_in = NarrowConv3d(in_channels, channels, kernel_size=3, padding=1)
        self.feature_mlp = nn.Sequential(
            nn.Linear(feature_channels, feature_mlp_dim),
            nn.ReLU(),
            nn.Linear(feature_mlp_dim, feature_mlp_dim),
            nn.ReLU(),
            nn.Linear(feature_mlp_dim, feature_mlp_dim),
            nn.ReLU(),
            nn.Linear(feature_mlp_dim, channels),
        )
        self._init_unet(
            2 * channels,
            block_out_channels,
            layers_per_block,
            mid_layers,
            norm_num_groups,
            patch_size,
            patch_stride,
        )
        self.filter_in = AdaptiveFilter(channels)
        self.conv_mid = nn.Conv3d(channels, channels, kernel_size=3, padding=1)
        self.filter_mid = AdaptiveFilter(channels)
        self.conv_out = NarrowConv3d(channels, out_channels, kernel_size=3, padding=1)
        self.filter_out = AdaptiveFilter(channels)

    def _refine_patches(self, sample: Tensor, embedded_features: Tensor) -> Tensor:
        """Refine patches `[B, in_channels, X, Y, Z]` with their embedded features: `[B, out_channels, X, Y, Z]`."""
        hidden_states = torch.cat([self.conv_in(sample), embedded_features], dim=1)
        hidden_states = self.unet(hidden_states)
        hidden_states = self.filter_in(hidden_states, hidden_states)
        hidden_states = self.conv_mid(hidden_states)
        hidden_states = self.filter_mid(hidden_states, hidden_states)
        return torch.tanh(self.filter_out(self.conv_out(hidden_states), hidden_states))

    def forward(
        self, sample: Tensor, features: Tensor, return_dict: bool = True
    ) -> SDFRefinerPatchOutput | tuple[Tensor]:
        """
        Refine dense patches.

        Args:
            sample (`torch.Tensor` of shape `(B, in_channels, X, Y, Z)`):
                Signed distance over tau; 1 where there is no voxel.
            features (`torch.Tensor` of shape `(B, feature_channels, X, Y, Z)`):
                Features of the decoder; 0 where there is no voxel.
            return_dict (`bool`, defaults to `True`): Return an output class rather than a tuple.

        Returns:
            [`SDFRefinerPatchOutput`] or `tuple`: `sample` of shape `(B, out_channels, X, Y, Z)`, in (-1, 1).

        Raises:
            ValueError: if a shape does not fit.
        """
        self._check_patches(sample)
        check_floating(features=features)
        if features.shape != (sample.shape[0], self.config.feature_channels, *sample.shape[2:]):
            raise ValueError(
                f"`features` must have {self.config.feature_channels} channels and else the shape of `sample`"
                f" {list(sample.shape)}, got {list(features.shape)}"
            )
        embedded_features = self.feature_mlp(features.movedim(1, -1)).movedim(-1, 1)
        sample = self._refine_patches(sample, embedded_features)
        if not return_dict:
            return (sample,)
        return SDFRefinerPatchOutput(sample=sample)

    @apply_forward_hook
    def refine(
        self,
        feats: Tensor,
        coords: Tensor,
        features: Tensor,
        resolution: int | None = None,
        patch_batch_size: int = 1,
        output_coords: Tensor | None = None,
        return_dict: bool = True,
        show_progress: bool = False,
        check_inputs: bool = True,
    ) -> SDFRefinerOutput | tuple[Tensor, Tensor]:
        """
        Refine sparse signed distances, as [`SparseVAE.decode`] returns them with `return_features=True`.

        Only the patches that hold a row of the output are computed: 27 at most for a sample of 512^3.

        Args:
            feats (`torch.Tensor` of shape `(N, in_channels)`): Signed distance over tau, in (-1, 1), positive outside.
            coords (`torch.Tensor` of shape `(N, 4)`): int32 (batch, x, y, z), distinct rows in any order.
            features (`torch.Tensor` of shape `(N, feature_channels)`): Features of the decoder.
            resolution (`int`, *optional*): Samples per axis of the volume; `sample_size` if not given.
            patch_batch_size (`int`, defaults to `1`):
                How many patches to compute at a time. Memory grows with it, the result does not depend on it.
            output_coords (`torch.Tensor` of shape `(M, 4)`, *optional*):
                Where to evaluate the refined volume; `coords` if not given.
            return_dict (`bool`, defaults to `True`): Return an output class rather than a tuple.
            show_progress (`bool`, defaults to `False`): Show a progress bar over batches of patches.
            check_inputs (`bool`, defaults to `True`): Check the values of the arguments (reductions, at most a sort).

        Returns:
            [`SDFRefinerOutput`] or `tuple`: `sample` in the dtype of `feats`, and its `coords`.

        Raises:
            ValueError: if an argument does not fit; the message names it.
        """
        resolution = self.config.sample_size if resolution is None else resolution
        values = {"feats": (feats, self.config.in_channels), "features": (features, self.config.feature_channels)}
        check_refine_inputs(values, coords, output_coords, resolution, patch_batch_size, check_inputs)
        output_coords = coords if output_coords is None else output_coords

        size = self.config.patch_size
        feats, dtype = feats.to(self.dtype), feats.dtype
        # The MLP acts on every voxel by itself, so that one row of zeros stands for all empty voxels.
        embedded_features = self.feature_mlp(F.pad(features.to(self.dtype), (0, 0, 0, 1)))
        outside = feats.new_full((self.config.in_channels,), OUTSIDE)
        refined = outside.new_zeros(
            output_coords.shape[0], self.config.out_channels, dtype=torch.promote_types(self.dtype, torch.float32)
        )
        batches = self._patch_batches(coords, output_coords, resolution, True, patch_batch_size, show_progress)
        for batch in batches:
            volume = self._refine_patches(
                scatter_to_patches(batch, feats, outside, size),
                scatter_to_patches(batch, embedded_features[:-1], embedded_features[-1], size),
            )
            for patch, patch_volume in zip(batch, volume):
                refined = refined.index_add(0, patch.output_rows, patch.gather(patch_volume))
        refined = refined.to(dtype)
        if not return_dict:
            return (refined, output_coords)
        return SDFRefinerOutput(sample=refined, coords=output_coords)


class SDFSignRefiner(PatchRefiner):
    r"""
    Classifier of the part of a volume without voxels, inside or outside of the surface, by a U-Net on dense patches.

    Published use: on the output of the 1024^3 decoder, which the network sees at half its resolution. The signed
    distances of the voxels stay what they are; the part without voxels, else taken as outside, becomes -1 where the
    network sees the inside of the object.

    This model inherits from [`~diffusers.ModelMixin`]; see there for loading, saving and the like.

    Parameters:
        in_channels (`int`, defaults to `1`): Channels of the input, signed distance over tau.
        out_channels (`int`, defaults to `1`): Channels of the output.
        block_out_channels (`tuple[int, ...]`, defaults to `(8, 32, 128, 512)`):
            Channels of the levels, finest first. Every level but the last halves the resolution.
        layers_per_block (`int`, defaults to `2`):
            Residual blocks of each level on the way down; on the way up one more.
        mid_layers (`int`, defaults to `2`): Residual blocks at the coarsest level after the first one.
        norm_num_groups (`int`, defaults to `4`): Groups of the group norms.
        sample_size (`int`, defaults to `512`):
            Resolution that the network sees: half of that of the volume that the model is meant for.
        patch_size (`int`, defaults to `256`): Edge of a patch in voxels of that resolution.
        patch_stride (`int`, *optional*):
            Distance of neighbouring patches; half of `patch_size` if not given, as published. Where patches overlap,
            the last one decides.
    """

    __module__ = "diffusers_sparse3d"  # the library that `model_index.json` names, not this file
    _no_split_modules = ["RefinerDownBlock", "RefinerUpBlock"]
    _group_offload_block_modules = ["conv_in", "unet", "conv_out"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 1,
        block_out_channels: tuple[int, ...] = (8, 32, 128, 512),
        layers_per_block: int = 2,
        mid_layers: int = 2,
        norm_num_groups: int = 4,
        sample_size: int = 512,
        patch_size: int = 256,
        patch_stride: int | None = None,
    ):
        super().__init__()
        patch_stride = patch_size // 2 if patch_stride is None else patch_stride
        channels = block_out_channels[0]
        self.conv_in = NarrowConv3d(in_channels, channels, kernel_size=3, padding=1)
        self._init_unet(
            channels, block_out_channels, layers_per_block, mid_layers, norm_num_groups, patch_size, patch_stride
        )
        self.conv_out = NarrowConv3d(channels, out_channels, kernel_size=3, padding=1)

    def forward(self, sample: Tensor, return_dict: bool = True) -> SDFRefinerPatchOutput | tuple[Tensor]:
        """
        Classify the voxels of dense patches.

        Args:
            sample (`torch.Tensor` of shape `(B, in_channels, X, Y, Z)`):
                Signed distance over tau; 1 where there is no voxel.
            return_dict (`bool`, defaults to `True`): Return an output class rather than a tuple.

        Returns:
            [`SDFRefinerPatchOutput`] or `tuple`: `sample`, logits of shape `(B, out_channels, X, Y, Z)`; outside from
            0 on.

        Raises:
            ValueError: if the shape of `sample` does not fit.
        """
        self._check_patches(sample)
        sample = self.conv_out(self.unet(self.conv_in(sample)))
        if not return_dict:
            return (sample,)
        return SDFRefinerPatchOutput(sample=sample)

    @apply_forward_hook
    def refine(
        self,
        feats: Tensor,
        coords: Tensor,
        resolution: int | None = None,
        patch_batch_size: int = 1,
        output_coords: Tensor | None = None,
        return_dict: bool = True,
        show_progress: bool = False,
        check_inputs: bool = True,
    ) -> SDFRefinerOutput | tuple[Tensor, Tensor]:
        """
        Tell inside from outside around sparse signed distances, as [`SparseVAE.decode`] returns them.

        Only the patches that hold a voxel of the output without a signed distance are computed.

        Args:
            feats (`torch.Tensor` of shape `(N, in_channels)`): Signed distance over tau, in (-1, 1), positive outside.
            coords (`torch.Tensor` of shape `(N, 4)`): int32 (batch, x, y, z), distinct rows in any order.
            resolution (`int`, *optional*): Samples per axis of the volume; twice `sample_size` if not given.
            patch_batch_size (`int`, defaults to `1`):
                How many patches to compute at a time. Memory grows with it, the result does not depend on it.
            output_coords (`torch.Tensor` of shape `(M, 4)`, *optional*):
                Where to evaluate the volume. If not given, at `coords` (the first N rows, in the same order) and at
                all the voxels of the grid that touch one of them and are not among them.
            return_dict (`bool`, defaults to `True`): Return an output class rather than a tuple.
            show_progress (`bool`, defaults to `False`): Show a progress bar over batches of patches.
            check_inputs (`bool`, defaults to `True`): Check the values of the arguments (reductions, at most a sort).

        Returns:
            [`SDFRefinerOutput`] or `tuple`: `sample` in the dtype of `feats`, `feats` at `coords` and else -1 (inside)
            or 1 (outside), and its `coords`.

        Raises:
            ValueError: if an argument does not fit; the message names it.
        """
        resolution = SIGN_DOWNSAMPLING * self.config.sample_size if resolution is None else resolution
        values = {"feats": (feats, self.config.in_channels)}
        check_refine_inputs(values, coords, output_coords, resolution, patch_batch_size, check_inputs)
        if output_coords is None:
            # By definition no voxel has a signed distance there.
            surroundings = surrounding_coords(coords, resolution)
            signs = self._signs(feats, coords, surroundings, resolution, patch_batch_size, show_progress)
            sample, output_coords = torch.cat([feats, signs]), torch.cat([coords, surroundings])
        else:
            sample, unknown = look_up(feats, coords, output_coords)
            sample[unknown] = self._signs(
                feats, coords, output_coords[unknown], resolution, patch_batch_size, show_progress
            )
        if not return_dict:
            return (sample, output_coords)
        return SDFRefinerOutput(sample=sample, coords=output_coords)

    def _signs(
        self,
        feats: Tensor,
        coords: Tensor,
        queries: Tensor,
        resolution: int,
        patch_batch_size: int,
        show_progress: bool,
    ) -> Tensor:
        """The sign at `queries [K, 4]`, 1 outside and -1 inside, `[K, in_channels]` in the dtype of `feats`."""
        coarse_feats, coarse_coords = coarse_volume(feats.to(self.dtype), coords, SIGN_DOWNSAMPLING)
        queries = torch.cat([queries[:, :1], queries[:, 1:] // SIGN_DOWNSAMPLING], dim=1)
        outside = coarse_feats.new_full((self.config.in_channels,), OUTSIDE)
        signs = feats.new_full((queries.shape[0], self.config.in_channels), OUTSIDE)
        batches = self._patch_batches(
            coarse_coords,
            queries,
            -(-resolution // SIGN_DOWNSAMPLING),
            False,
            patch_batch_size,
            show_progress,
        )
        for batch in batches:
            sample = scatter_to_patches(batch, coarse_feats, outside, self.config.patch_size)
            logits = self.forward(sample, return_dict=False)[0]
            for i, patch in enumerate(batch):
                inside = patch.gather(logits[i]) < 0
                signs[patch.output_rows] = torch.where(inside, -OUTSIDE, OUTSIDE).to(signs.dtype)
            # The logits of one batch must not outlive it: they are a part of a volume of 8 channels.
            del sample, logits
        return signs
