"""SDFRefiner and SDFSignRefiner: convolutional networks that clean up a decoded signed distance field, patch by patch.

Both are U-Nets on dense patches. The volume that they work on is sparse: a patch is filled from the voxels that it
holds, and the result is read where it is wanted, so that no array of the whole grid exists.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput, logging
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from ..ops.coordinates import MAX_RESOLUTION, check_coords, decode_coords, encode_coords
from ..ops.pooling import sparse_mean_pool
from ..sparse_tensor import CoordinateCache
from .single_file import OriginalCheckpointMixin


# What is known of the part of a volume that has no voxels: it is taken as outside.
OUTSIDE = 1.0
# How often an adaptive filter is applied.
FILTER_PASSES = 3
# The sign refiner looks at the volume at half its resolution.
SIGN_DOWNSAMPLING = 2


@dataclass
class SDFRefinerPatchOutput(BaseOutput):
    """Output of a refiner's `forward`.

    Args:
        sample (`torch.Tensor` of shape `(B, out_channels, X, Y, Z)`): Signed distance over tau, or logits of the sign.
    """

    sample: Tensor


@dataclass
class SDFRefinerOutput(BaseOutput):
    """Output of a refiner's `refine`.

    Args:
        sample (`torch.Tensor` of shape `(M, out_channels)`): Signed distance over tau, positive outside.
        coords (`torch.Tensor` of shape `(M, 4)`): int32 (batch, x, y, z) of the rows.
    """

    sample: Tensor
    coords: Tensor


class GroupNormSiLU(nn.GroupNorm):
    """GroupNorm in float32, then SiLU: `[B, C, X, Y, Z]` in and out.

    One group after the other, so that the float32 copies of a large half-precision patch stay small.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        output = torch.empty_like(hidden_states)
        size = self.num_channels // self.num_groups
        for start in range(0, self.num_channels, size):
            group = slice(start, start + size)
            weight, bias = self.weight[group].to(dtype), self.bias[group].to(dtype)
            output[:, group] = F.silu(F.group_norm(hidden_states[:, group].to(dtype), 1, weight, bias, self.eps))
        return output


class RefinerResnetBlock(nn.Module):
    """Norm, SiLU, conv, norm, SiLU, conv, plus the input; `[B, C, X, Y, Z]` in and out."""

    def __init__(self, in_channels: int, out_channels: int, norm_num_groups: int):
        super().__init__()
        self.norm1 = GroupNormSiLU(norm_num_groups, in_channels)
        self.conv1 = nn.Conv3d(in_channels, out_channels, kernel_size=3, padding=1)
        self.norm2 = GroupNormSiLU(norm_num_groups, out_channels)
        self.conv2 = nn.Conv3d(out_channels, out_channels, kernel_size=3, padding=1)
        self.conv_shortcut = (
            nn.Conv3d(in_channels, out_channels, kernel_size=1) if in_channels != out_channels else None
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        residual = hidden_states if self.conv_shortcut is None else self.conv_shortcut(hidden_states)
        hidden_states = self.conv1(self.norm1(hidden_states))
        return residual + self.conv2(self.norm2(hidden_states))


class RefinerDownBlock(nn.Module):
    """Residual blocks, then a strided convolution that halves the resolution; returns the skips of both as well."""

    def __init__(
        self, in_channels: int, out_channels: int, num_layers: int, norm_num_groups: int, add_downsample: bool
    ):
        super().__init__()
        self.resnets = nn.ModuleList(
            RefinerResnetBlock(in_channels if i == 0 else out_channels, out_channels, norm_num_groups)
            for i in range(num_layers)
        )
        self.downsampler = nn.Conv3d(out_channels, out_channels, kernel_size=2, stride=2) if add_downsample else None

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        skips = []
        for resnet in self.resnets:
            hidden_states = resnet(hidden_states)
            skips.append(hidden_states)
        if self.downsampler is not None:
            skips.append(self.downsampler(hidden_states))
        return tuple(skips)


class RefinerUpBlock(nn.Module):
    """Residual blocks, each of which takes a skip too, then a transposed convolution that doubles the resolution.

    The U-Net calls the layers itself, so that on the finest level nothing outlives its use.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        last_skip_channels: int,
        num_layers: int,
        norm_num_groups: int,
        add_upsample: bool,
    ):
        super().__init__()
        self.resnets = nn.ModuleList()
        for i in range(num_layers):
            channels = in_channels if i == 0 else out_channels
            skip_channels = last_skip_channels if i == num_layers - 1 else out_channels
            self.resnets.append(RefinerResnetBlock(channels + skip_channels, out_channels, norm_num_groups))
        self.upsampler = (
            nn.ConvTranspose3d(out_channels, out_channels, kernel_size=2, stride=2) if add_upsample else None
        )


class RefinerUNet(nn.Module):
    """U-Net on dense patches `[B, in_channels, X, Y, Z]`, up to the last norm and SiLU.

    Returns `[B, block_out_channels[0], X, Y, Z]`. X, Y and Z are multiples of `2 ** (len(block_out_channels) - 1)`.
    """

    def __init__(
        self,
        in_channels: int,
        block_out_channels: tuple[int, ...],
        layers_per_block: int,
        mid_layers: int,
        norm_num_groups: int,
    ):
        super().__init__()
        num_levels = len(block_out_channels)
        self.conv_in = nn.Conv3d(in_channels, block_out_channels[0], kernel_size=3, padding=1)
        self.down_blocks = nn.ModuleList(
            RefinerDownBlock(
                block_out_channels[max(level - 1, 0)],
                block_out_channels[level],
                layers_per_block,
                norm_num_groups,
                add_downsample=level < num_levels - 1,
            )
            for level in range(num_levels)
        )
        channels = block_out_channels[-1]
        self.mid_blocks = nn.ModuleList(
            RefinerResnetBlock(channels, channels, norm_num_groups) for _ in range(mid_layers + 1)
        )
        self.up_blocks = nn.ModuleList(
            RefinerUpBlock(
                block_out_channels[min(level + 1, num_levels - 1)],
                block_out_channels[level],
                block_out_channels[max(level - 1, 0)],
                layers_per_block + 1,
                norm_num_groups,
                add_upsample=level > 0,
            )
            for level in reversed(range(num_levels))
        )
        self.norm_out = GroupNormSiLU(norm_num_groups, block_out_channels[0])
        self.gradient_checkpointing = False

    def forward(self, hidden_states: Tensor) -> Tensor:
        checkpointing = torch.is_grad_enabled() and self.gradient_checkpointing
        hidden_states = self.conv_in(hidden_states)
        skips = [hidden_states]
        for block in self.down_blocks:
            if checkpointing:
                skips += self._gradient_checkpointing_func(block, hidden_states)
            else:
                skips += block(hidden_states)
            hidden_states = skips[-1]
        for block in self.mid_blocks:
            if checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states)
            else:
                hidden_states = block(hidden_states)
        for block in self.up_blocks:
            for resnet in block.resnets:
                hidden_states = torch.cat([hidden_states, skips.pop()], dim=1)
                if checkpointing:
                    hidden_states = self._gradient_checkpointing_func(resnet, hidden_states)
                else:
                    hidden_states = resnet(hidden_states)
            if block.upsampler is not None:
                hidden_states = block.upsampler(hidden_states)
        return self.norm_out(hidden_states)


class AdaptiveFilter(nn.Module):
    """A 3x3x3 filter for every voxel, predicted from `guide` and applied to all channels alike, three times over.

    The 27 taps of a voxel are divided by the sum of their magnitudes, so a pass never amplifies. Tap
    `9 * (dx + 1) + 3 * (dy + 1) + dz + 1` is that of the neighbour at (dx, dy, dz); beyond the patch there are zeros.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv_in = nn.Conv3d(channels, channels, kernel_size=3, padding=1)
        self.conv_out = nn.Conv3d(channels, 27, kernel_size=3, padding=1, bias=False)

    def forward(self, hidden_states: Tensor, guide: Tensor) -> Tensor:
        taps = self.conv_out(F.relu(self.conv_in(guide)))
        # Sums in float32; the normalisation is applied to the sum, which is a 27th of the taps.
        dtype = torch.promote_types(taps.dtype, torch.float32)
        norm = taps.abs().sum(dim=1, keepdim=True, dtype=dtype).clamp(min=1e-12)
        size_x, size_y, size_z = hidden_states.shape[2:]
        for _ in range(FILTER_PASSES):
            padded = F.pad(hidden_states.to(dtype), (1,) * 6)
            total = torch.zeros_like(hidden_states, dtype=dtype)
            for tap, (x, y, z) in zip(taps.split(1, dim=1), itertools.product(range(3), repeat=3)):
                total.addcmul_(padded[:, :, x : x + size_x, y : y + size_y, z : z + size_z], tap.to(dtype))
            hidden_states = (total / norm).to(hidden_states.dtype)
        return hidden_states


@dataclass
class _Patch:
    """One patch of a volume: which voxels it holds, and which rows of the output it contributes to.

    Attributes:
        input_rows, input_index: rows of the input in the patch, and their flat index in it, both `[n]` int64.
        output_rows, output_index: the same for the output.
        weights: `[m, 1]` float32, the share of this patch in each of its output rows.
    """

    input_rows: Tensor
    input_index: Tensor
    output_rows: Tensor
    output_index: Tensor
    weights: Tensor

    def gather(self, volume: Tensor) -> Tensor:
        """Weighted values `[m, C]`, float32 or better, of this patch's output `[C, X, Y, Z]`."""
        return volume.flatten(1)[:, self.output_index].T * self.weights


def _locate(coords: Tensor, sample: int, start: Tensor, end: Tensor, patch_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of one sample in the box from `start` to `end`, their place `[n, 3]` in the patch and its flat index."""
    position = coords[:, 1:]
    inside = (coords[:, 0] == sample) & ((position >= start) & (position < end)).all(dim=1)
    rows = inside.nonzero()[:, 0]
    local = position[rows].long() - start
    return rows, local, (local[:, 0] * patch_size + local[:, 1]) * patch_size + local[:, 2]


def _patches(
    coords: Tensor, output_coords: Tensor, resolution: int, patch_size: int, patch_stride: int, blend: bool
) -> Iterator[_Patch]:
    """The patches of a volume that an output row depends on; no others exist.

    Patches start at multiples of `patch_stride` and may reach beyond the volume. Where they overlap, their results are
    mixed linearly across the overlap (`blend`), or that of the last one is taken.
    """
    last = max(0, -(-(resolution - patch_size) // patch_stride))
    overlap = patch_size - patch_stride
    ramp = torch.linspace(0, 1, overlap, device=coords.device)
    rising = torch.cat([ramp, ramp.new_ones(patch_stride)])
    falling = torch.cat([ramp.new_ones(patch_stride), 1 - ramp])
    for sample in output_coords[:, 0].unique().tolist():
        for index in itertools.product(range(last + 1), repeat=3):
            start = coords.new_tensor(index) * patch_stride
            ends = [patch_size if blend or i == last else patch_stride for i in index]
            end = start + coords.new_tensor(ends)
            output_rows, local, output_index = _locate(output_coords, sample, start, end, patch_size)
            if output_rows.numel() == 0:
                continue
            weights = torch.ones(output_rows.numel(), device=coords.device)
            if blend:
                for axis, i in enumerate(index):
                    if i > 0:
                        weights = weights * rising[local[:, axis]]
                    if i < last:
                        weights = weights * falling[local[:, axis]]
            input_rows, _, input_index = _locate(coords, sample, start, start + patch_size, patch_size)
            yield _Patch(input_rows, input_index, output_rows, output_index, weights[:, None])


def _scatter(patches: list[_Patch], values: Tensor, background: Tensor, patch_size: int) -> Tensor:
    """Dense patches `[B, C, size, size, size]`: `values` `[N, C]` at their voxels, `background` `[C]` elsewhere."""
    volume = background[:, None].repeat(len(patches), 1, patch_size**3)
    for i, patch in enumerate(patches):
        volume[i][:, patch.input_index] = values[patch.input_rows].T
    return volume.unflatten(2, (patch_size,) * 3)


def _batches(patches: Iterator[_Patch], batch_size: int) -> Iterator[list[_Patch]]:
    while batch := list(itertools.islice(patches, batch_size)):
        yield batch


def _check_refine_inputs(
    values: dict[str, tuple[Tensor, int]],
    coords: Tensor,
    output_coords: Tensor | None,
    resolution: int,
    patch_batch_size: int,
    check_values: bool,
) -> None:
    """`values`: by argument name, the tensor that has a row for each of `coords` and the channels it needs."""
    if not 1 <= resolution <= MAX_RESOLUTION:
        raise ValueError(f"`resolution` has to be between 1 and {MAX_RESOLUTION}, got {resolution}")
    if patch_batch_size < 1:
        raise ValueError(f"`patch_batch_size` has to be positive, got {patch_batch_size}")
    if check_values:
        check_coords(coords, resolution)
        if output_coords is not None:
            check_coords(output_coords, resolution, "output_coords")
    for name, (tensor, channels) in values.items():
        if not tensor.is_floating_point() or tensor.shape != (coords.shape[0], channels):
            raise ValueError(
                f"`{name}` has to be a floating point tensor of shape [{coords.shape[0]}, {channels}], one row for"
                f" each of `coords`, got {tensor.dtype} {list(tensor.shape)}"
            )
        if check_values and not torch.isfinite(tensor).all():
            raise ValueError(f"`{name}` has values that are not finite")


def _check_patches(sample: Tensor, name: str, channels: int, factor: int) -> None:
    if sample.ndim != 5 or sample.shape[1] != channels or any(size % factor or size == 0 for size in sample.shape[2:]):
        raise ValueError(
            f"`{name}` must have shape [B, {channels}, X, Y, Z] with sizes that are multiples of {factor}, not"
            f" {list(sample.shape)}"
        )


def _check_patch_config(
    block_out_channels: tuple[int, ...], norm_num_groups: int, patch_size: int, patch_stride: int
) -> int:
    """The factor by which the U-Net reduces the resolution, for a configuration that holds together."""
    factor = 2 ** (len(block_out_channels) - 1)
    if patch_size % factor or patch_size < factor:
        raise ValueError(f"`patch_size` has to be a multiple of {factor}, got {patch_size}")
    if not patch_size <= 2 * patch_stride <= 2 * patch_size:
        raise ValueError(
            f"`patch_stride` has to be from half of `patch_size` to `patch_size` ({patch_size}), got {patch_stride}"
        )
    if any(channels % norm_num_groups for channels in block_out_channels):
        raise ValueError(
            f"`block_out_channels` {tuple(block_out_channels)} do not divide into {norm_num_groups} groups"
        )
    return factor


class SDFRefiner(ModelMixin, ConfigMixin, OriginalCheckpointMixin):
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
    _supports_gradient_checkpointing = True
    _no_split_modules = ["RefinerResnetBlock", "AdaptiveFilter"]
    _skip_layerwise_casting_patterns = ["norm"]

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
        self.patch_stride = patch_size - patch_size // 6 if patch_stride is None else patch_stride
        self.spatial_compression_ratio = _check_patch_config(
            block_out_channels, norm_num_groups, patch_size, self.patch_stride
        )
        channels = block_out_channels[0]
        self.conv_in = nn.Conv3d(in_channels, channels, kernel_size=3, padding=1)
        self.feature_mlp = nn.Sequential(
            nn.Linear(feature_channels, feature_mlp_dim),
            nn.ReLU(),
            nn.Linear(feature_mlp_dim, feature_mlp_dim),
            nn.ReLU(),
            nn.Linear(feature_mlp_dim, feature_mlp_dim),
            nn.ReLU(),
            nn.Linear(feature_mlp_dim, channels),
        )
        self.unet = RefinerUNet(2 * channels, block_out_channels, layers_per_block, mid_layers, norm_num_groups)
        self.filter_in = AdaptiveFilter(channels)
        self.conv_mid = nn.Conv3d(channels, channels, kernel_size=3, padding=1)
        self.filter_mid = AdaptiveFilter(channels)
        self.conv_out = nn.Conv3d(channels, out_channels, kernel_size=3, padding=1)
        self.filter_out = AdaptiveFilter(channels)

    def _refine_patches(self, sample: Tensor, embedded_features: Tensor) -> Tensor:
        """Patches `[B, in_channels, X, Y, Z]`, with their features after the MLP, to `[B, out_channels, X, Y, Z]`."""
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
        _check_patches(sample, "sample", self.config.in_channels, self.spatial_compression_ratio)
        if features.shape != (sample.shape[0], self.config.feature_channels, *sample.shape[2:]):
            raise ValueError(
                f"`features` must have {self.config.feature_channels} channels and else the shape of `sample`"
                f" {list(sample.shape)}, not {list(features.shape)}"
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
            check_inputs (`bool`, defaults to `True`): Check the values of the arguments (a sort and a few reductions).

        Returns:
            [`SDFRefinerOutput`] or `tuple`: `sample` in the dtype of `feats`, and its `coords`.

        Raises:
            ValueError: if an argument does not fit; the message names it.
        """
        resolution = self.config.sample_size if resolution is None else resolution
        values = {"feats": (feats, self.config.in_channels), "features": (features, self.config.feature_channels)}
        _check_refine_inputs(values, coords, output_coords, resolution, patch_batch_size, check_inputs)
        output_coords = coords if output_coords is None else output_coords

        size = self.config.patch_size
        feats, dtype = feats.to(self.dtype), feats.dtype
        # The MLP acts on every voxel by itself: one row stands for all that is empty.
        embedded_features = self.feature_mlp(F.pad(features.to(self.dtype), (0, 0, 0, 1)))
        outside = feats.new_full((self.config.in_channels,), OUTSIDE)
        refined = outside.new_zeros(
            output_coords.shape[0], self.config.out_channels, dtype=torch.promote_types(self.dtype, torch.float32)
        )
        patches = _patches(coords, output_coords, resolution, size, self.patch_stride, blend=True)
        for batch in logging.tqdm(_batches(patches, patch_batch_size), desc="Refining", disable=not show_progress):
            volume = self._refine_patches(
                _scatter(batch, feats, outside, size),
                _scatter(batch, embedded_features[:-1], embedded_features[-1], size),
            )
            for patch, patch_volume in zip(batch, volume):
                refined = refined.index_add(0, patch.output_rows, patch.gather(patch_volume))
        refined = refined.to(dtype)
        if not return_dict:
            return (refined, output_coords)
        return SDFRefinerOutput(sample=refined, coords=output_coords)


class SDFSignRefiner(ModelMixin, ConfigMixin, OriginalCheckpointMixin):
    r"""
    Finds out which side of the surface the part of a volume is on that has no voxels, by a U-Net on dense patches.

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
    _supports_gradient_checkpointing = True
    _no_split_modules = ["RefinerResnetBlock"]
    _skip_layerwise_casting_patterns = ["norm"]

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
        self.patch_stride = patch_size // 2 if patch_stride is None else patch_stride
        self.spatial_compression_ratio = _check_patch_config(
            block_out_channels, norm_num_groups, patch_size, self.patch_stride
        )
        channels = block_out_channels[0]
        self.conv_in = nn.Conv3d(in_channels, channels, kernel_size=3, padding=1)
        self.unet = RefinerUNet(channels, block_out_channels, layers_per_block, mid_layers, norm_num_groups)
        self.conv_out = nn.Conv3d(channels, out_channels, kernel_size=3, padding=1)

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
        _check_patches(sample, "sample", self.config.in_channels, self.spatial_compression_ratio)
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
        Give the surroundings of sparse signed distances, as [`SparseVAE.decode`] returns them, their side.

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
            check_inputs (`bool`, defaults to `True`): Check the values of the arguments (a sort and a few reductions).

        Returns:
            [`SDFRefinerOutput`] or `tuple`: `sample` in the dtype of `feats`, `feats` at `coords` and else -1 (inside)
            or 1 (outside), and its `coords`.

        Raises:
            ValueError: if an argument does not fit; the message names it.
        """
        resolution = SIGN_DOWNSAMPLING * self.config.sample_size if resolution is None else resolution
        values = {"feats": (feats, self.config.in_channels)}
        _check_refine_inputs(values, coords, output_coords, resolution, patch_batch_size, check_inputs)
        if output_coords is None:
            output_coords = torch.cat([coords, surrounding_coords(coords, resolution)])

        sample, unknown = _look_up(feats, coords, output_coords)
        cache = CoordinateCache(coords)
        coarse_coords = cache.downsample(SIGN_DOWNSAMPLING)[0].coords
        coarse_feats = sparse_mean_pool(feats.to(self.dtype), cache, SIGN_DOWNSAMPLING)
        queries = output_coords[unknown].clone()
        queries[:, 1:] //= SIGN_DOWNSAMPLING
        size = self.config.patch_size
        outside = coarse_feats.new_full((self.config.in_channels,), OUTSIDE)
        patches = _patches(
            coarse_coords, queries, -(-resolution // SIGN_DOWNSAMPLING), size, self.patch_stride, blend=False
        )
        for batch in logging.tqdm(_batches(patches, patch_batch_size), desc="Refining", disable=not show_progress):
            logits = self.forward(_scatter(batch, coarse_feats, outside, size), return_dict=False)[0]
            for patch, patch_logits in zip(batch, logits):
                sign = torch.where(patch.gather(patch_logits) >= 0, OUTSIDE, -OUTSIDE)
                sample[unknown[patch.output_rows]] = sign.to(sample.dtype)
        if not return_dict:
            return (sample, output_coords)
        return SDFRefinerOutput(sample=sample, coords=output_coords)


def surrounding_coords(coords: Tensor, resolution: int) -> Tensor:
    """The voxels of the grid that touch one of `coords` (26-neighbourhood) and are not among them.

    Args:
        coords: `[N, 4]` int32 (batch, x, y, z), distinct.
        resolution: samples per axis of the grid.

    Returns:
        `[K, 4]` int32, ascending.
    """
    own_keys = encode_coords(coords).sort().values
    # Keys are ascending and next to a voxel's are those of its neighbours, in the grid or just outside.
    corner_and_neighbours = F.pad(torch.eye(4, dtype=torch.int32, device=coords.device)[:, 1:], (1, 0))
    corner_key, *neighbour_keys = encode_coords(corner_and_neighbours).tolist()
    keys = own_keys
    # A cube is dilated one axis after the other, so that few neighbours are new at a time.
    for neighbour_key in neighbour_keys:
        step = neighbour_key - corner_key
        neighbours = [shifted[~_find(keys, shifted)[1]] for shifted in (keys - step, keys + step)]
        keys = torch.cat([keys, *neighbours]).unique()
    surroundings = decode_coords(keys[~_find(own_keys, keys)[1]])
    position = surroundings[:, 1:]
    return surroundings[((position >= 0) & (position < resolution)).all(dim=1)]


def _look_up(feats: Tensor, coords: Tensor, output_coords: Tensor) -> tuple[Tensor, Tensor]:
    """`feats` at `output_coords` `[M, C]`, and the rows `[K]` int64 of it that are not among `coords`, not set."""
    keys, order = encode_coords(coords).sort()
    place, known = _find(keys, encode_coords(output_coords))
    sample = feats.new_empty(output_coords.shape[0], feats.shape[1])
    sample[known] = feats[order[place[known]]]
    return sample, (~known).nonzero()[:, 0]


def _find(keys: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Where in ascending `keys` each query is, and whether it is there."""
    place = torch.searchsorted(keys, queries)
    # Keys are not negative: past the end there is no match.
    return place, F.pad(keys, (0, 1), value=-1)[place] == queries
