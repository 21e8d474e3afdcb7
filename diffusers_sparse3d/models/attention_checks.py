"""Checks of what attention processors for packed sparse tokens are given: backends, names, masks, modules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .attention_layouts import AttentionModule


if TYPE_CHECKING:
    from .attention import SpatialSparseAttention


def check_attention_backend(backend: str | None) -> None:
    """Raise a ValueError unless `backend` is None or "native": diffusers' others cannot attend to packed tokens."""
    name = getattr(backend, "value", backend)
    if name is not None and name != "native":
        raise ValueError(
            f"`backend` must be 'native' for attention among packed sparse tokens, got {name!r}: the backends of"
            " diffusers take no boundaries of samples, windows and blocks. On a GPU these processors run PyTorch's"
            " variable-length flash attention and the Triton kernels of this package without being told to."
        )


def resolve_processor(processor: Any, classes: Mapping[str, type]) -> Any:
    """The processor that `processor` names, or itself if it is one.

    Args:
        processor: a key of `classes`, or a callable object.
        classes: the classes of the processors that have names.

    Raises:
        ValueError: for an unknown name.
        TypeError: for a class, or an object that cannot be called.
    """
    if isinstance(processor, str):
        if processor not in classes:
            raise ValueError(f"`processor` must be one of {sorted(classes)} or a processor, got {processor!r}")
        return classes[processor]()
    if isinstance(processor, type):
        raise TypeError(f"`processor` must be an instance, got the class {processor.__name__}: add parentheses")
    if not callable(processor):
        raise TypeError(f"`processor` must be one of {sorted(classes)} or a processor, got {processor!r}")
    return processor


def refuse(**arguments: Any) -> None:
    """Raise a ValueError that names the first of the arguments that is not None."""
    name = next(name for name, value in arguments.items() if value is not None)
    raise ValueError(
        f"`{name}` must be None for attention among packed sparse tokens, whose samples `coords` tell apart: leave"
        " out the rows that a mask would hide, and encode positions in `hidden_states`"
    )


def get_window_size(processor: Any, attn: AttentionModule) -> int:
    """Edge of the attention windows of a module, in voxels.

    Raises:
        ValueError: if the module has none.
    """
    window_size = getattr(attn, "window_size", None)
    if window_size is None:
        raise ValueError(
            f"`window_size` must be given to {type(processor).__name__} or to the {type(attn).__name__}, got neither"
        )
    return window_size


def get_ssa(attn: AttentionModule, processor: str) -> SpatialSparseAttention:
    """The parameters of SSA in a module.

    Raises:
        ValueError: if the module has none; it names the `processor` that needs them.
    """
    ssa = getattr(attn, "ssa", None)
    if ssa is None:
        raise ValueError(
            f"`attn` must have the submodule `ssa` for {processor}, got a {type(attn).__name__} without: configure the"
            " model with SSA, or equip it with `enable_spatial_sparse_attention(model)`"
        )
    return ssa
