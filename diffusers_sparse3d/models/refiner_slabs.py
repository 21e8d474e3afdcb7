"""The way up through the U-Net of a refiner in slabs: without the wide volumes, which take most of its memory.

On the way up, each level begins with the upsampled states of the level below beside a skip, four times as many
channels as the level itself has. Here they exist for one slab of the volume at a time: once for the statistics of the
group norm, and once more for the convolution after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def go_up_in_slabs(up_blocks: Iterable[nn.Module], states: list[Tensor], slab_size: int) -> list[Tensor]:
    """
    What the blocks of the way up do one after the other, up to rounding, without gradients.

    Args:
        up_blocks: [`RefinerUpBlock`] each, the coarsest first.
        states: as the first of them takes them.
        slab_size: planes of a slab, even.

    Returns:
        The states that the last of them returns.
    """
    blocks: Iterable[Any] = up_blocks
    upsampler = None
    for block in blocks:
        for resnet in block.resnets:
            hidden_states, skip = states.pop(), states.pop()
            if upsampler is None:
                states.append(resnet(torch.cat([hidden_states, skip], dim=1)))
            else:
                states.append(_resnet_in_slabs(resnet, upsampler, hidden_states, skip, slab_size))
            # No name here may keep a volume that is not needed any more.
            del hidden_states, skip
            upsampler = None
        upsampler = block.upsampler
    return states


def _resnet_in_slabs(resnet: Any, upsampler: nn.Module, coarse: Tensor, skip: Tensor, slab_size: int) -> Tensor:
    """`resnet` of the upsampled `coarse [B, C, X / 2, ...]` beside `skip [B, C', X, ...]`: `[B, out, X, ...]`."""

    def inputs(halo: int) -> Iterator[tuple[slice, slice, Tensor]]:
        """The planes of each slab, their place in what is computed for it, and its input with a margin of planes."""
        planes = skip.shape[2]
        for start in range(0, planes, slab_size):
            end = min(start + slab_size, planes)
            # Pairs of planes come from one coarse plane.
            low, high = max(0, start - halo), min(planes, end + halo)
            upsampled = upsampler(coarse[:, :, low // 2 : -(-high // 2)])
            upsampled = upsampled[:, :, low % 2 :][:, :, : high - low]
            place = slice(start - low, end - low)
            yield slice(start, end), place, torch.cat([upsampled, skip[:, :, low:high]], dim=1)

    norm = resnet.norm1
    statistics = group_statistics((slab for _, _, slab in inputs(0)), norm.num_groups, norm.eps)
    hidden = residual = None
    for planes, place, slab in inputs(1):
        shortcut = slab[:, :, place] if resnet.conv_shortcut is None else resnet.conv_shortcut(slab[:, :, place])
        convolved = resnet.conv1(norm(slab, statistics))[:, :, place]
        if hidden is None or residual is None:
            hidden, residual = (
                torch.empty(
                    (*part.shape[:2], *skip.shape[2:]),
                    dtype=part.dtype,
                    device=part.device,
                    # As the convolutions of a GPU like them.
                    memory_format=torch.channels_last_3d,
                )
                for part in (convolved, shortcut)
            )
        hidden[:, :, planes], residual[:, :, planes] = convolved, shortcut
    return residual + resnet.conv2(resnet.norm2(hidden))


def group_statistics(slabs: Iterable[Tensor], num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """The mean and the inverse standard deviation of each group, `[B, G]` float32 or better, of a volume in slabs."""
    counts, means, variances = [], [], []
    for slab in slabs:
        grouped = slab.to(torch.promote_types(slab.dtype, torch.float32)).unflatten(1, (num_groups, -1))
        variance, mean = torch.var_mean(grouped, dim=tuple(range(2, grouped.ndim)), correction=0)
        counts.append(grouped[0, 0].numel())
        means.append(mean)
        variances.append(variance)
    share = torch.tensor(counts, dtype=means[0].dtype, device=means[0].device) / sum(counts)
    all_means, all_variances = torch.stack(means, dim=-1), torch.stack(variances, dim=-1)
    mean = (all_means * share).sum(-1)
    variance = ((all_variances + (all_means - mean[..., None]).square()) * share).sum(-1)
    return mean, torch.rsqrt(variance + eps)
