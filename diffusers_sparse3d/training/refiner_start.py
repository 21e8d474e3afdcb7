"""The weights that a new refiner of distances starts with: those that give back what it is to refine."""

from typing import cast

import torch
from torch import nn

from .. import SDFRefiner
from ..models.refiner_layers import RefinerResnetBlock, RefinerUpBlock
from ..ops.adaptive_filter.reference import NUM_TAPS


# `tanh(1.32 s x)` is nearest to `s x`, cut off at -1 and 1, over the band.
TANH_SLOPE = 1.32
# Random weights of the filters' taps, beside a middle tap of 1.
SMALL_TAPS = 0.002


@torch.no_grad()
def start_from_input(refiner: SDFRefiner, scale: float) -> bool:
    """
    Changes new weights so that the refined distances are about the given ones times `scale`, cut off at 1.

    A training then begins where the decoder ends, rather than learn to copy first. The distance goes through two
    channels, as itself and negated, whose group the last norm divides by its deviation, which is about 1 as most of a
    patch is free space; and `silu(x) - silu(-x) = x`. All other weights stay random, and none is without a gradient.

    Args:
        refiner: A refiner with new weights.
        scale: Factor from given distances to refined ones.

    Returns:
        Whether the weights were changed: only where a group of the finest norms has two channels.
    """
    config = refiner.config
    if config["block_out_channels"][0] != 2 * config["norm_num_groups"]:
        return False
    up_block = cast(RefinerUpBlock, refiner.unet.up_blocks[-1])
    last = cast(RefinerResnetBlock, up_block.resnets[-1])
    assert last.conv_shortcut is not None
    for channel, sign in enumerate((1.0, -1.0)):
        _read(refiner.conv_in, channel, {0: sign})
        _read(refiner.unet.conv_in, channel, {channel: 1.0})
        # The skip that the last residual block takes is the first state of the U-Net.
        _read(last.conv_shortcut, channel, {last.conv2.out_channels + channel: 1.0})
        _read(last.conv2, channel, {})
    _read(refiner.conv_mid, 0, {0: 1.0, 1: -1.0})
    _read(refiner.conv_out, 0, {0: TANH_SLOPE * scale})
    for adaptive_filter in (refiner.filter_in, refiner.filter_mid, refiner.filter_out):
        # A first channel of 1 everywhere, of which the middle tap is made.
        _read(adaptive_filter.conv_in, 0, {}, bias=1.0)
        adaptive_filter.conv_out.weight.mul_(SMALL_TAPS)
        _read(adaptive_filter.conv_out, NUM_TAPS // 2, {0: 1.0})
    return True


def _read(conv: nn.Conv3d, out_channel: int, factors: dict[int, float], bias: float = 0.0) -> None:
    """Makes an output channel of a convolution the sum of input channels of the same voxel, times factors."""
    conv.weight[out_channel] = 0
    middle = tuple(size // 2 for size in conv.kernel_size)
    for in_channel, factor in factors.items():
        conv.weight[out_channel, in_channel][middle] = factor
    if conv.bias is not None:
        conv.bias[out_channel] = bias
