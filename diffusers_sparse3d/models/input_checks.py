"""Checks of the arguments of models: types and shapes, which cost nothing, and values, which wait for a GPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from ..checks import check_integer
from ..ops.checks import check_floating
from ..ops.coordinates import MAX_RESOLUTION, check_coords
from ..sparse_tensor import CoordinateCache
from .cache_rows import check_not_stale, raise_foreign


# That of pure noise: sigma 1.
MOST_TIMESTEP = 1000


def check_tensors(floating: dict[str, Tensor], others: dict[str, Tensor | None] | None = None) -> None:
    """
    Check that arguments are tensors of one device, and some of them floating point.

    Args:
        floating: the arguments that must be floating point, by name.
        others: further arguments by name, or None.

    Raises:
        TypeError: if one is no tensor.
        ValueError: if one has another dtype (the others: complex or bool), or is on another device than the first one.
    """
    check_floating(**floating)
    for name, tensor in (others or {}).items():
        if isinstance(tensor, Tensor) and (tensor.is_complex() or tensor.dtype == torch.bool):
            raise ValueError(f"`{name}` must be real numbers, got {tensor.dtype}")
    (first, leading), *_ = floating.items()
    for name, tensor in {**floating, **(others or {})}.items():
        if tensor is None and name not in floating:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"`{name}` must be a tensor, got {type(tensor).__name__}")
        if tensor.device != leading.device:
            raise ValueError(f"`{name}` must be on {leading.device}, as `{first}` is, got {tensor.device}")


def check_dtypes(layer: nn.Module, **tensors: Tensor) -> None:
    """
    Check that arguments have the dtype of the weights, unless something casts them: autocast, hooks, quantisation.

    Args:
        layer: the first layer that the first argument meets.
        tensors: the arguments by name.

    Raises:
        ValueError: if one has another dtype.
    """
    if torch.compiler.is_compiling() or type(layer) is not nn.Linear or hasattr(layer, "_diffusers_hook"):
        return
    dtype = layer.weight.dtype
    for name, tensor in tensors.items():
        if tensor.dtype != dtype and not torch.is_autocast_enabled(tensor.device.type):
            raise ValueError(f"`{name}` must be {dtype}, as the weights of the model, got {tensor.dtype}")


def check_cache(
    name: str, cache: CoordinateCache | None, coords: Tensor | None, batch_size: int | None = None
) -> None:
    """
    Check that a cache, if there is one, has the size of what it is for.

    Args:
        name: of the argument, which ends in "cache".
        cache: the argument.
        coords: the rows that it is for.
        batch_size: the number of samples that it is for; any if None.

    Raises:
        TypeError: if it is no cache.
        ValueError: if it has other sizes.
    """
    if cache is None:
        return
    if not isinstance(cache, CoordinateCache):
        raise TypeError(f"`{name}` must be a CoordinateCache, got {type(cache).__name__}")
    # Not `in`, which torch.compile does not understand for sizes that are symbols.
    other_batch = batch_size is not None and batch_size != cache.batch_size
    if coords is None or cache.coords.shape != coords.shape or other_batch:
        samples = "" if batch_size is None else f" and {batch_size} samples"
        raise ValueError(
            f"`{name}` must be that of `{name.replace('cache', 'coords')}`{samples}, got one of"
            f" {cache.coords.shape[0]} rows and {cache.batch_size} samples"
        )


def check_cache_rows(name: str, cache: CoordinateCache | None, coords: Tensor | None) -> None:
    """Raise a ValueError that names the argument if it is a cache of other rows than `coords`, of the same number."""
    if cache is None or coords is None:
        return
    check_not_stale(name, cache)
    if cache.coords is not coords and not torch.equal(cache.coords, coords):
        raise_foreign(name)


def check_dense_transformer_inputs(
    hidden_states: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    shape: tuple[int, ...],
    channels: int,
    num_unconditional: int,
) -> None:
    """
    Check the types and shapes of the arguments of `DenseDiT.forward`.

    Args:
        hidden_states, timestep, encoder_hidden_states: the arguments.
        shape: of a sample of `hidden_states`.
        channels: of `encoder_hidden_states`.
        num_unconditional: samples without tokens.

    Raises:
        TypeError: if one is no tensor.
        ValueError: naming the argument that does not fit; on a CPU also timesteps out of range, and tokens with
            NaN or infinity.
    """
    floating = {"hidden_states": hidden_states, "encoder_hidden_states": encoder_hidden_states}
    check_tensors(floating, {"timestep": timestep})
    if hidden_states.shape[1:] != shape:
        raise ValueError(f"`hidden_states` must have shape [B, *{shape}], got {list(hidden_states.shape)}")
    batch_size = hidden_states.shape[0]
    if timestep.shape != (batch_size,):
        raise ValueError(f"`timestep` must have shape [{batch_size}], got {list(timestep.shape)}")
    # At least one sample has tokens.
    check_integer("num_unconditional", num_unconditional, 0, batch_size - 1)
    _check_tokens(encoder_hidden_states, batch_size - num_unconditional, channels)
    # On a GPU the host would have to wait for the values, or while tracing has none. Latents that a step of sampling
    # made are looked at when they are decoded, where more can be said of them.
    if hidden_states.device.type == "cpu" and not (torch.compiler.is_compiling() or is_fake(hidden_states)):
        check_timestep(timestep)
        check_finite(encoder_hidden_states, "encoder_hidden_states")


def _check_tokens(tokens: Tensor, batch_size: int, channels: int) -> None:
    """Check the shape of image tokens that are not packed."""
    if tokens.ndim != 3 or tokens.shape[0] != batch_size or tokens.shape[2] != channels:
        raise ValueError(
            f"`encoder_hidden_states` must have shape [{batch_size}, L, {channels}] (without `encoder_coords`), got"
            f" {list(tokens.shape)}"
        )


def check_timestep(timestep: Tensor) -> None:
    """Raise a ValueError that names the argument unless its values are from 0 to 1000."""
    check_finite(timestep, "timestep")
    if timestep.numel() and not 0 <= float(timestep.min()) <= float(timestep.max()) <= MOST_TIMESTEP:
        raise ValueError(f"`timestep` must be from 0 to {MOST_TIMESTEP}, got {timestep.tolist()!s:.100}")


def check_finite(values: Tensor, name: str) -> None:
    """Raise a ValueError that names the argument if it has NaN or infinity."""
    if not torch.isfinite(values).all():
        raise ValueError(f"`{name}` must be finite, got values that are not")


def check_features(
    values: Tensor,
    coords: Tensor,
    name: str,
    channels: int,
    check_values: bool,
    cache: CoordinateCache | None = None,
) -> None:
    """
    Check features on voxels.

    Args:
        values: must be floating point `[N, channels]`, and finite.
        coords: `[N, 4]`, the voxels.
        name: name of the argument `values`.
        channels: channels that the model takes.
        check_values: check that the values are finite, and that `cache` is of these very rows.
        cache: the cache of `coords`, if there is one.

    Raises:
        TypeError: if one is no tensor.
        ValueError: naming the argument that does not fit.
    """
    check_tensors({name: values}, {"coords": coords})
    if values.ndim != 2 or values.shape[1] != channels:
        raise ValueError(
            f"`{name}` must be a floating point tensor of shape [rows, {channels}], got {values.dtype}"
            f" {list(values.shape)}"
        )
    if values.shape[0] != coords.shape[0]:
        raise ValueError(f"`coords` must have the {values.shape[0]} rows of `{name}`, got {coords.shape[0]}")
    check_cache("cache", cache, coords)
    if check_values:
        check_finite(values, name)
        check_cache_rows("cache", cache, coords)


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
        TypeError: if one is no tensor, or a cache is something else.
        ValueError: naming the argument that does not fit.
    """
    floating = {"hidden_states": hidden_states, "encoder_hidden_states": encoder_hidden_states}
    check_tensors(floating, {"coords": coords, "timestep": timestep, "encoder_coords": encoder_coords})
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
        _check_tokens(encoder_hidden_states, batch_size, channels)
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
    check_cache("cache", cache, coords, batch_size)
    check_cache("encoder_cache", encoder_cache, encoder_coords, batch_size)


def check_transformer_values(
    hidden_states: Tensor,
    coords: Tensor,
    timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_coords: Tensor | None,
    cache: CoordinateCache | None,
    encoder_cache: CoordinateCache | None,
    sample_size: int,
) -> None:
    """
    Check the values of the arguments of `SparseDiT.forward`, whose shapes fit.

    Args:
        hidden_states, coords, timestep, encoder_hidden_states, encoder_coords, cache, encoder_cache: the arguments.
        sample_size: resolution of the latent grid.

    Raises:
        ValueError: naming the argument that has values out of range, duplicates, NaN or infinity, or a cache that is
            that of other rows.
    """
    last_sample = check_coords(coords, sample_size) - 1
    check_cache_rows("cache", cache, coords)
    check_cache_rows("encoder_cache", encoder_cache, encoder_coords)
    batch_size = timestep.shape[0]
    if last_sample >= batch_size:
        raise ValueError(
            f"`coords` must have batch indices below {batch_size}, the length of `timestep`, got {last_sample}"
        )
    check_timestep(timestep)
    check_finite(hidden_states, "hidden_states")
    check_finite(encoder_hidden_states, "encoder_hidden_states")
    if encoder_coords is None or encoder_coords.shape[0] == 0:
        return
    # Tokens without a place in the image share the coordinates (0, 0, 1), so duplicates are fine here.
    batch_index = encoder_coords[:, 0]
    if not 0 <= int(batch_index.min()) <= int(batch_index.max()) < batch_size:
        raise ValueError(f"`encoder_coords` must have batch indices from 0 to {batch_size - 1}, got others")
    lowest, highest = (int(value) for value in torch.aminmax(encoder_coords[:, 1:]))
    if lowest < 0 or highest >= MAX_RESOLUTION:
        raise ValueError(
            f"`encoder_coords` must have columns and rows from 0 to {MAX_RESOLUTION - 1}, got {lowest} to {highest}"
        )
