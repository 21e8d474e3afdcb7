"""The public functions of timestep modulation."""

from __future__ import annotations

from torch import Tensor

from ..checks import check_eps, check_floating, check_shape
from ..runtime.dispatch import runs_kernels
from .reference import gated_sum_reference, modulated_layer_norm_reference
from .samples import SampleRows


# Channels of a token that a kernel has in registers at once, at most.
MOST_CHANNELS = 8192


def _check(tokens: Tensor, name: str, samples: SampleRows, **values: Tensor) -> None:
    check_floating(**{name: tokens}, **values)
    if not isinstance(samples, SampleRows):
        raise TypeError(f"`samples` must be SampleRows, got {type(samples).__name__}")
    if tokens.ndim < 2:
        raise ValueError(f"`{name}` must have shape [..., C], got {list(tokens.shape)}")
    rows = tokens.shape[:-1].numel()
    if rows % samples.batch_size if samples.index is None else rows != samples.index.shape[0]:
        parts = f"{samples.batch_size} equal parts" if samples.index is None else f"{samples.index.shape[0]} rows"
        raise ValueError(f"`{name}` must have the {parts} of `samples`, got {rows} rows")
    for value_name, value in values.items():
        if value.shape != (samples.batch_size, tokens.shape[-1]):
            raise ValueError(
                f"`{value_name}` must have shape [{samples.batch_size}, {tokens.shape[-1]}], a row for each sample,"
                f" got {list(value.shape)}"
            )


def modulated_layer_norm(
    hidden_states: Tensor, shift: Tensor, scale: Tensor, samples: SampleRows, eps: float = 1e-6
) -> Tensor:
    """Layer norm without affine, times 1 + `scale`, plus `shift`, which are those of each token's sample (adaLN).

    Differentiable (once). float16, bfloat16 and float32 on a GPU run Triton kernels if the package triton is
    installed, in one pass and computed in float32; everything else runs the reference.

    Args:
        hidden_states: `[..., C]` tokens: packed `[N, C]`, or `[B, L, C]`.
        shift: `[B, C]`; a view of a wider tensor costs no copy.
        scale: `[B, C]`; likewise.
        samples: the sample of each token.
        eps: added to the (biased) variance.

    Returns:
        A tensor of the shape and dtype of `hidden_states`.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if a shape or dtype does not fit.
    """
    _check(hidden_states, "hidden_states", samples, shift=shift, scale=scale)
    return _layer_norm(hidden_states, shift, scale, samples, eps, 1.0)


def affine_layer_norm(hidden_states: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """Layer norm of packed tokens, times `weight`, plus `bias`, computed in float32 or better.

    Differentiable (once); kernels run as for `modulated_layer_norm`.

    Args:
        hidden_states: `[..., C]` tokens: packed `[N, C]`, or `[B, L, C]`.
        weight: `[C]`.
        bias: `[C]`.
        eps: added to the (biased) variance.

    Returns:
        A tensor of the shape and dtype of `hidden_states`.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if a shape or dtype does not fit.
    """
    samples = SampleRows(1)
    check_floating(weight=weight, bias=bias)
    check_shape("weight", weight, "C")
    check_shape("bias", bias, "C")
    _check(hidden_states, "hidden_states", samples, weight=weight[None], bias=bias[None])
    return _layer_norm(hidden_states, bias[None], weight[None], samples, eps, 0.0)


def _layer_norm(
    hidden_states: Tensor, shift: Tensor, scale: Tensor, samples: SampleRows, eps: float, offset: float
) -> Tensor:
    check_eps(eps)
    rows = hidden_states.flatten(0, -2)
    if runs_kernels(rows) and rows.numel() and rows.shape[1] <= MOST_CHANNELS:
        from .operator import normalize_and_modulate

        fields = samples.index, samples.cu_rows, samples.order
        output = normalize_and_modulate(rows, shift, scale, *fields, eps, offset)
    else:
        output = modulated_layer_norm_reference(rows, shift, scale, samples, eps, offset)
    return output.view(hidden_states.shape)


def gated_sum(residual: Tensor, values: Tensor, gate: Tensor, samples: SampleRows) -> Tensor:
    """`residual + gate * values`, where `gate` is that of each token's sample.

    Differentiable (once); kernels run as for `modulated_layer_norm`.

    Args:
        residual: `[..., C]` tokens: packed `[N, C]`, or `[B, L, C]`.
        values: of the same shape.
        gate: `[B, C]`; a view of a wider tensor costs no copy.
        samples: the sample of each token.

    Returns:
        A tensor of the shape and dtype of `residual`.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if a shape or dtype does not fit.
    """
    _check(residual, "residual", samples, gate=gate)
    check_floating(values=values)
    if values.shape != residual.shape:
        raise ValueError(
            f"`values` must have the shape of `residual` {list(residual.shape)}, got {list(values.shape)}"
        )
    rows = residual.flatten(0, -2), values.flatten(0, -2)
    if runs_kernels(residual) and residual.numel() and residual.shape[-1] <= MOST_CHANNELS:
        from .operator import add_gated

        output = add_gated(*rows, gate, samples.index, samples.cu_rows, samples.order)
    else:
        output = gated_sum_reference(*rows, gate, samples)
    return output.view(residual.shape)
