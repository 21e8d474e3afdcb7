"""Checks of the configurations of models, wherever they come from: an argument, a file, a converted checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ..checks import check_choice, check_integer, check_number


# By what the name of a parameter is or ends with.
COUNTS = ("num_layers", "encoder_layers", "decoder_layers", "layers_per_block", "mid_layers")
SIZES = ("_size", "_channels", "_heads", "_groups", "_dim", "topk", "patch_stride")
FLAGS = (
    "qk_norm",
    "qk_norm_cross",
    "share_mod",
    "use_window_shift",
    "sparse_conditioning",
    "exact_mean",
    "pixel_aligned",
)
POSITIVE = ("mlp_ratio", "norm_eps", "scaling_factor", "coord_scale")
FINITE = ("shift_factor",)
CHOICES = {"attention_type": ("ssa", "window", "full"), "compression_version": ("v1", "v2")}
# Bounds of what a file can make this package allocate.
MOST_LAYERS = 1000
LARGEST_SIZE = 1 << 20


def check_configuration(config: Mapping[str, Any], optional: Collection[str] = ()) -> None:
    """
    Check the parameters of a model one by one. What depends on several of them is checked where the layers are made.

    Args:
        config: parameters by name; unknown names are not looked at.
        optional: names of the parameters that may be None.

    Raises:
        ValueError: naming the parameter that is of another type, or out of range.
    """
    for name, value in config.items():
        if value is None and name in optional:
            continue
        if name in FLAGS:
            check_choice(name, value, (False, True))
        elif name in CHOICES:
            check_choice(name, value, CHOICES[name])
        elif name in FINITE:
            check_number(name, value)
        elif name in POSITIVE:
            if check_number(name, value) <= 0:
                raise ValueError(f"`{name}` must be positive, got {value!r}")
        elif name.endswith("block_out_channels"):
            if not isinstance(value, (list, tuple)) or not value:
                raise ValueError(f"`{name}` must be a list of the channels of each level, got {value!r:.100}")
            for channels in value:
                check_integer(name, channels, 1, LARGEST_SIZE)
        elif name.endswith(COUNTS):
            check_integer(name, value, 0, MOST_LAYERS)
        elif name.endswith(SIZES):
            check_integer(name, value, 1, LARGEST_SIZE)
    for part in ("encoder", "decoder"):
        channels, heads = config.get(f"{part}_channels"), config.get(f"{part}_heads", 1)
        if channels is not None and (channels % 16 or channels % heads):
            raise ValueError(
                f"`{part}_channels` must be a multiple of 16 and of `{part}_heads` {heads}, got {channels}"
            )
