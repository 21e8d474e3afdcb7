"""Checks of the arguments of the sparse models: shapes, which cost nothing, and values, which wait for a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.coordinates import check_coords
from ..sparse_tensor import CoordinateCache


def check_finite(values: Tensor, name: str) -> None:
    """Raise a ValueError that names the argument if it has NaN or infinity."""
    if not torch.isfinite(values).all():
        raise ValueError(f"`{name}` must be finite, got values that are not")


def check_features(values: Tensor, coords: Tensor, name: str, channels: int, check_values: bool) -> None:
    """
    Check features on voxels.

    Args:
        values: must be floating point `[N, channels]`, and finite.
        coords: `[N, 4]`, the voxels.
        name: name of the argument `values`.
        channels: channels that the model takes.
        check_values: check that the values are finite.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    if not values.is_floating_point() or values.ndim != 2 or values.shape[1] != channels:
        raise ValueError(
            f"`{name}` must be a floating point tensor of shape [rows, {channels}], got {values.dtype}"
            f" {list(values.shape)}"
        )
    if values.shape[0] != coords.shape[0]:
        raise ValueError(f"`coords` must have the {values.shape[0]} rows of `{name}`, got {coords.shape[0]}")
    if check_values:
        check_finite(values, name)


def check_transformer_shapes(
    hidden_states: Tensor,
    coords: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_coords: Tensor | None,
    cache: CoordinateCache | None,
    encoder_cache: CoordinateCache | None,
    in_channels: int,
    cross_attention_dim: int,
    sparse_conditioning: bool,
) -> None:
    """
    Check the shapes of the arguments of `SparseDiT.forward`.

    Args:
        hidden_states, coords, timestep, encoder_hidden_states, encoder_coords, cache, encoder_cache: the arguments.
        in_channels, cross_attention_dim, sparse_conditioning: from the configuration of the model.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    if timestep.ndim != 1:
        raise ValueError(f"`timestep` must have shape [B], got {list(timestep.shape)}")
    batch_size, channels = timestep.shape[0], cross_attention_dim
    if hidden_states.ndim != 2 or hidden_states.shape[1] != in_channels:
        raise ValueError(f"`hidden_states` must have shape [N, {in_channels}], got {list(hidden_states.shape)}")
    if coords.shape[0] != hidden_states.shape[0]:
        raise ValueError(
            f"`coords` must have the {hidden_states.shape[0]} rows of `hidden_states`, got {coords.shape[0]}"
        )
    if encoder_coords is None:
        if sparse_conditioning:
            raise ValueError("`encoder_coords` must be given to a model with `sparse_conditioning`")
        if encoder_hidden_states.ndim != 3 or encoder_hidden_states.shape[::2] != (batch_size, channels):
            raise ValueError(
                f"`encoder_hidden_states` without `encoder_coords` must have shape [{batch_size}, L, {channels}],"
                f" got {list(encoder_hidden_states.shape)}"
            )
    else:
        if encoder_hidden_states.ndim != 2 or encoder_hidden_states.shape[1] != channels:
            raise ValueError(
                f"`encoder_hidden_states` with `encoder_coords` must have shape [M, {channels}], got"
                f" {list(encoder_hidden_states.shape)}"
            )
        if encoder_coords.shape != (encoder_hidden_states.shape[0], 4) or encoder_coords.dtype != torch.int32:
            raise ValueError(
                f"`encoder_coords` must be int32 of shape [{encoder_hidden_states.shape[0]}, 4], got"
                f" {encoder_coords.dtype} of shape {list(encoder_coords.shape)}"
            )
    for name, kept, rows in (("cache", cache, coords), ("encoder_cache", encoder_cache, encoder_coords)):
        if kept is None:
            continue
        if rows is None or kept.coords.shape != rows.shape or kept.batch_size != batch_size:
            raise ValueError(
                f"`{name}` must be that of `{name.replace('cache', 'coords')}` and {batch_size} samples, got one of"
                f" {kept.coords.shape[0]} rows and {kept.batch_size} samples"
            )


def check_transformer_values(
    hidden_states: Tensor,
    coords: Tensor,
    batch_size: int,
    encoder_hidden_states: Tensor,
    encoder_coords: Tensor | None,
    cache: CoordinateCache | None,
    encoder_cache: CoordinateCache | None,
    sample_size: int,
) -> None:
    """
    Check the values of the arguments of `SparseDiT.forward`, whose shapes fit.

    Args:
        hidden_states, coords, encoder_hidden_states, encoder_coords, cache, encoder_cache: the arguments.
        batch_size: number of samples, from `timestep`.
        sample_size: resolution of the latent grid.

    Raises:
        ValueError: naming the argument that has values out of range, duplicates, NaN or infinity, or a cache that is
            that of other rows.
    """
    check_coords(coords, sample_size)
    for name, kept, rows in (("cache", cache, coords), ("encoder_cache", encoder_cache, encoder_coords)):
        if kept is None or rows is None or kept.coords is rows:
            continue
        if not torch.equal(kept.coords, rows):
            raise ValueError(f"`{name}` must be that of `{name.replace('cache', 'coords')}`, got one of other rows")
    highest = int(coords[:, 0].max()) if coords.shape[0] else -1
    if highest >= batch_size:
        raise ValueError(
            f"`coords` must have batch indices below {batch_size}, the length of `timestep`, got {highest}"
        )
    check_finite(hidden_states, "hidden_states")
    check_finite(encoder_hidden_states, "encoder_hidden_states")
    if encoder_coords is None or encoder_coords.shape[0] == 0:
        return
    # Tokens without a place in the image share the coordinates (0, 0, 1), so duplicates are fine here.
    batch_index = encoder_coords[:, 0]
    if not 0 <= int(batch_index.min()) <= int(batch_index.max()) < batch_size:
        raise ValueError(f"`encoder_coords` must have batch indices from 0 to {batch_size - 1}, got others")
