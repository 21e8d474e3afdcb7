"""The way up through the U-Net of a refiner in slabs: without the wide volumes, which take most of its memory.

On the way up, each residual block begins with the states so far beside a skip: twice as many channels as the level
itself has, and five times as many in its first block, which takes the upsampled states of the level below. Here they
exist for one slab of the volume at a time: once for the statistics of the group norm, and once more for the
convolution after it.
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
        states: as the first of them takes them; they are taken off the list as they are used.
        slab_size: planes of a slab, even.

    Returns:
        The states that the last of them returns.
    """
    blocks: Iterable[Any] = up_blocks
    upsampler = None
    for block in blocks:
        for resnet in block.resnets:
            states.append(_resnet_in_slabs(resnet, upsampler, states, slab_size))
            upsampler = None
        upsampler = block.upsampler
    return states


def _resnet_in_slabs(resnet: Any, upsampler: nn.Module | None, states: list[Tensor], slab_size: int) -> Tensor:
    """`resnet` of the last of the states beside the one before it: `[B, out, X, Y, Z]`.

    Both are taken off the list, so that nothing but this function holds them.

    Args:
        upsampler: doubles the resolution of the last state first, if given.
        states: at the end a skip `[B, C', X, Y, Z]`, then `[B, C, X, Y, Z]`, or half of that with an upsampler.
    """
    coarse, skip = states.pop(), states.pop()
    hidden, residual = _joined_convolution(resnet, upsampler, coarse, skip, slab_size)
    # No name here may keep a volume that is not needed any more.
    del coarse, skip
    hidden = resnet.norm2(hidden)
    hidden = resnet.conv2(hidden)
    return residual.add_(hidden)


def _joined_convolution(
    resnet: Any, upsampler: nn.Module | None, coarse: Tensor, skip: Tensor, slab_size: int
) -> tuple[Tensor, Tensor]:
    """The first convolution of a residual block and its shortcut, each `[B, out, X, Y, Z]`."""

    def inputs(halo: int) -> Iterator[tuple[slice, slice, Tensor]]:
        """The planes of each slab, their place in what is computed for it, and its input with a margin of planes."""
        planes = skip.shape[2]
        for start in range(0, planes, slab_size):
            end = min(start + slab_size, planes)
            low, high = max(0, start - halo), min(planes, end + halo)
            if upsampler is None:
                hidden_states = coarse[:, :, low:high]
            else:
                # Pairs of planes come from one coarse plane.
                hidden_states = upsampler(coarse[:, :, low // 2 : -(-high // 2)])
                hidden_states = hidden_states[:, :, low % 2 :][:, :, : high - low]
            place = slice(start - low, end - low)
            yield slice(start, end), place, torch.cat([hidden_states, skip[:, :, low:high]], dim=1)

    norm = resnet.norm1
    statistics = group_statistics((slab for _, _, slab in inputs(0)), norm.num_groups, norm.eps)
    shape = (skip.shape[0], resnet.conv1.out_channels, *skip.shape[2:])
    # The channels are last in memory, as the convolutions of a GPU like them.
    hidden, residual = (
        torch.empty(shape, dtype=skip.dtype, device=skip.device, memory_format=torch.channels_last_3d)
        for _ in range(2)
    )
    for planes, place, slab in inputs(1):
        shortcut = slab[:, :, place] if resnet.conv_shortcut is None else resnet.conv_shortcut(slab[:, :, place])
        hidden[:, :, planes] = resnet.conv1(norm(slab, statistics))[:, :, place]
        residual[:, :, planes] = shortcut
    return hidden, residual


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
