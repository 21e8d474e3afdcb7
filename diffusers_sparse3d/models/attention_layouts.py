"""What a processor reads from an attention module, of this package or another: projections, norms, output layers."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from ..sparse_tensor import CoordinateCache


class AttentionModule(Protocol):
    """The attributes that every attention module has, named as in diffusers.

    Modules of other packages may have `to_qkv` in place of `to_q`, `to_k` and `to_v`, and a single layer as `to_out`.
    They may lack what [`SparseAttention`] has besides: `norm_q`, `norm_k`, `window_size`, `window_shift` and `ssa`.
    """

    heads: int
    to_q: nn.Module
    to_k: nn.Module
    to_v: nn.Module
    to_out: nn.ModuleList


# What the norms of queries and keys are called: in diffusers, and in two other families of models.
_NORM_NAMES = {"query": ("norm_q", "q_norm", "q_rms_norm"), "key": ("norm_k", "k_norm", "k_rms_norm")}


def has_fused_projections(attn: nn.Module) -> bool:
    """Whether one layer projects query, key and value: `to_qkv`, or for cross-attention `to_kv` beside `to_q`.

    diffusers keeps the single layers beside the fused one, and says in `fused_projections` which of them are in use.
    """
    return bool(getattr(attn, "fused_projections", False)) or getattr(attn, "to_k", None) is None


def output_width(attn: nn.Module) -> int:
    """Channels of all query heads, which the output layer takes."""
    to_out = attn.to_out
    first = to_out[0] if isinstance(to_out, nn.ModuleList | nn.Sequential) else to_out
    return first.in_features  # type: ignore[return-value, union-attr]


def project(
    attn: AttentionModule, hidden_states: Tensor, encoder_hidden_states: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of an attention module, normalised where it has norms.

    Args:
        attn: the module. With a true `heads_first` it keeps query, key and value of a head side by side.
        hidden_states: `[N, C]`.
        encoder_hidden_states: `[M, D]`; self-attention if None.

    Returns:
        `[N, H, D]`, `[M, H_kv, D]`, `[M, H_kv, D]`.
    """
    source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    if not has_fused_projections(attn):  # type: ignore[arg-type]
        query, key, value = attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source)
    elif encoder_hidden_states is None:
        fused, width = attn.to_qkv(hidden_states), output_width(attn)  # type: ignore[attr-defined, arg-type]
        query, key, value = fused.split([width, *[(fused.shape[-1] - width) // 2] * 2], dim=-1)
    else:
        query = attn.to_q(hidden_states)
        key, value = attn.to_kv(source).chunk(2, dim=-1)  # type: ignore[attr-defined]

    if getattr(attn, "heads_first", False):
        interleaved = torch.cat([query, key, value], dim=-1).unflatten(-1, (attn.heads, -1))
        query, key, value = (part.flatten(-2) for part in interleaved.chunk(3, dim=-1))
    dim_head = query.shape[-1] // attn.heads
    return (
        _norm_heads(attn, "query", query, dim_head),
        _norm_heads(attn, "key", key, dim_head),
        value.unflatten(-1, (-1, dim_head)),
    )


def _norm_heads(attn: AttentionModule, role: str, projected: Tensor, dim_head: int) -> Tensor:
    """`[N, H * D]` to `[N, H, D]`, through the module's norm of each head, or of all heads together, if it has one."""
    norm = next((found for name in _NORM_NAMES[role] if (found := getattr(attn, name, None)) is not None), None)
    heads = projected.unflatten(-1, (-1, dim_head))
    if norm is None:
        return heads
    weight = getattr(norm, "weight", None)
    across_heads = weight is not None and weight.shape == projected.shape[-1:] and heads.shape[-2] > 1
    return norm(projected).unflatten(-1, (-1, dim_head)) if across_heads else norm(heads)


def project_output(attn: AttentionModule, attended: Tensor) -> Tensor:
    """The output layer, and the dropout after it where there is one: `[N, H * D]` to `[N, C]`."""
    if not isinstance(attn.to_out, nn.ModuleList):
        return attn.to_out(attended)
    for layer in attn.to_out:
        attended = layer(attended)
    return attended


def coordinate_cache(coords: Tensor | None, num_rows: int) -> CoordinateCache:
    """The cache of the coordinates of `num_rows` tokens, which were given without one.

    Raises:
        ValueError: if `coords` are missing, no valid set of voxels, or of other rows.
    """
    if coords is None:
        raise ValueError("`coords` or `cache` must be given, to tell the samples of packed tokens apart")
    cache = CoordinateCache.of(coords)
    if coords.shape[0] != num_rows:
        raise ValueError(f"`coords` must have the {num_rows} rows of `hidden_states`, got {coords.shape[0]}")
    return cache
