"""Layers of the refiners: the U-Net on dense patches and the adaptive filter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.adaptive_filter import adaptive_filter
from ..ops.group_norm import dense_group_norm
from .refiner_slabs import go_up_in_slabs


# Number of times that an adaptive filter is applied.
FILTER_PASSES = 3
# The fast convolutions of cuDNN take multiples of this many channels.
_CONV_CHANNELS = 8


class GroupNormSiLU(nn.GroupNorm):
    """Group norm in float32, then SiLU: `[B, C, X, Y, Z]` in and out.

    Given `statistics`, the mean and the inverse standard deviation `[B, G]`, these normalise a part of a volume.
    """

    def forward(self, hidden_states: Tensor, statistics: tuple[Tensor, Tensor] | None = None) -> Tensor:
        if statistics is not None:
            mean, scale = (value.repeat_interleave(self.num_channels // self.num_groups, 1) for value in statistics)
            factor = scale * self.weight
            offset = self.bias - mean * factor
            shape = (*mean.shape, *(1,) * (hidden_states.ndim - 2))
            normalized = torch.addcmul(offset.view(shape), hidden_states.to(mean.dtype), factor.view(shape))
            return F.silu(normalized, inplace=True).to(hidden_states.dtype)
        return dense_group_norm(hidden_states, self.num_groups, self.weight, self.bias, self.eps, silu=True)


class NarrowConv3d(nn.Conv3d):
    """A 3D convolution with few input or output channels: `[B, in, X, Y, Z]` to `[B, out, X, Y, Z]`.

    On a GPU in half precision, that of autocast too, zeros fill the channels up to a multiple of 8: cuDNN has fast
    kernels for such widths alone. The result is the same.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:
        if not hidden_states.is_cuda:
            return super().forward(hidden_states)
        dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else hidden_states.dtype
        if dtype in (torch.float16, torch.bfloat16):
            return self._with_padded_channels(hidden_states.to(dtype))
        return super().forward(hidden_states)

    def _with_padded_channels(self, hidden_states: Tensor) -> Tensor:
        missing_in, missing_out = -self.in_channels % _CONV_CHANNELS, -self.out_channels % _CONV_CHANNELS
        weight = F.pad(self.weight, (0,) * 7 + (missing_in, 0, missing_out))
        bias = None if self.bias is None else F.pad(self.bias, (0, missing_out))
        # Padded as the last axis, the channels stay last in memory.
        hidden_states = F.pad(hidden_states.movedim(1, -1), (0, missing_in)).movedim(-1, 1)
        return F.conv3d(hidden_states, weight, bias, self.stride, self.padding)[:, : self.out_channels]


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
    """Residual blocks, then a strided convolution that halves the resolution; the outputs of all are skips."""

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
    """Residual blocks, each of which takes a skip too, then a transposed convolution that doubles the resolution."""

    _gradient_checkpointing_func: Callable[..., Any]

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
        self.gradient_checkpointing = False

    def forward(self, states: list[Tensor]) -> list[Tensor]:
        """
        Args:
            states: what the U-Net has computed and not used yet: the skips `[B, C, X, Y, Z]`, the last of them for the
                first residual block, and at the end the input. They are taken off the list when they are used, so
                that on the finest level none outlives its use.

        Returns:
            The states that are left, with the output at the end.
        """
        hidden_states = states.pop()
        for resnet in self.resnets:
            hidden_states = torch.cat([hidden_states, states.pop()], dim=1)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(resnet, hidden_states)
            else:
                hidden_states = resnet(hidden_states)
        if self.upsampler is not None:
            hidden_states = self.upsampler(hidden_states)
        return [*states, hidden_states]


class RefinerUNet(nn.Module):
    """U-Net on dense patches `[B, in_channels, X, Y, Z]`, up to the last norm and SiLU.

    The output is `[B, block_out_channels[0], X, Y, Z]`; X, Y and Z are multiples of
    `2 ** (len(block_out_channels) - 1)`.
    """

    _gradient_checkpointing_func: Callable[..., Any]

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
        # Planes of a slab on the way up, if it goes in slabs where there are no gradients.
        self.slab_size: int | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        checkpointing = torch.is_grad_enabled() and self.gradient_checkpointing
        states = [self.conv_in(hidden_states)]
        for block in self.down_blocks:
            if checkpointing:
                states += self._gradient_checkpointing_func(block, states[-1])
            else:
                states += block(states[-1])
        hidden_states = states[-1]
        for block in self.mid_blocks:
            if checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states)
            else:
                hidden_states = block(hidden_states)
        states.append(hidden_states)
        # Slabs call the layers of the blocks, and so not the hooks on blocks that load or move weights.
        has_hooks = any(hasattr(block, "_diffusers_hook") or hasattr(block, "_hf_hook") for block in self.up_blocks)
        if self.slab_size is not None and not has_hooks and not torch.is_grad_enabled():
            del hidden_states
            return self.norm_out(go_up_in_slabs(self.up_blocks, states, self.slab_size).pop())
        for block in self.up_blocks:
            # The list alone keeps the states: a name for them here would hold them through the block.
            states = block(states)
        return self.norm_out(states.pop())


class AdaptiveFilter(nn.Module):
    """A 3x3x3 filter for every voxel, predicted from a guide and applied to all channels alike, three times over.

    The 27 taps of a voxel are divided by the sum of their magnitudes, so that a pass never amplifies. Tap
    `9 * (dx + 1) + 3 * (dy + 1) + dz + 1` weighs the neighbour at (dx, dy, dz); beyond the patch there are zeros.
    Both inputs, `hidden_states` and `guide`, are `[B, C, X, Y, Z]`; the output has the shape of the first.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv_in = nn.Conv3d(channels, channels, kernel_size=3, padding=1)
        self.conv_out = NarrowConv3d(channels, 27, kernel_size=3, padding=1, bias=False)

    def forward(self, hidden_states: Tensor, guide: Tensor) -> Tensor:
        taps = self.conv_out(F.relu(self.conv_in(guide)))
        for _ in range(FILTER_PASSES):
            hidden_states = adaptive_filter(hidden_states, taps)
        return hidden_states
