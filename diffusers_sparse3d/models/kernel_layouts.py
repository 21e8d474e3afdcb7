"""Weights of 3D convolutions from other libraries, in the layout of [`SparseConv3d`]."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor


# Axes of a kernel of size 3: in and out for channels, 0 to 2 for the columns x, y, z of the coordinates. Here, they
# become [27, in, out] with x fastest.
_FROM_5D: Mapping[str, Callable[[Tensor], Tensor]] = {
    "spconv": lambda weight: weight.permute(3, 2, 1, 4, 0),  # [out, 0, 1, 2, in], from version 2 on
    "spconv1": lambda weight: weight.permute(2, 1, 0, 3, 4),  # [0, 1, 2, in, out]
    "dense": lambda weight: weight.permute(4, 3, 2, 1, 0),  # [out, in, 0, 1, 2], torch.nn.Conv3d over [B, C, X, Y, Z]
}
LAYOUTS = (*_FROM_5D, "torchsparse")


def convert_kernel(
    weight: Tensor, in_channels: int, out_channels: int, kernel_size: int, layout: str | None = None
) -> Tensor:
    """
    The weight of a convolution of another library, as [`SparseConv3d`] has it.

    Args:
        weight: "spconv" `[out, K, K, K, in]`, "spconv1" `[K, K, K, in, out]`, "dense" `[out, in, K, K, K]` (of
            `torch.nn.Conv3d`), "torchsparse" `[K^3, in, out]` or for K = 1 `[in, out]`. One of `[K^3, in, out]` or
            `[in, out]` may be of this package too: it is the same.
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: K, 1 or 3.
        layout: one of these names; found from the shape if None.

    Returns:
        `[27, in, out]`, or `[in, out]` for K = 1.

    Raises:
        ValueError: if the shape is none of these, not that of `layout`, or may be several.
    """
    size = (kernel_size,) * 3
    channels = (in_channels, out_channels)
    shapes = {
        "spconv": (out_channels, *size, in_channels),
        "spconv1": (*size, *channels),
        "dense": (out_channels, in_channels, *size),
        "torchsparse": channels if kernel_size == 1 else (kernel_size**3, *channels),
    }
    if layout is not None and layout not in shapes:
        raise ValueError(f"`layout` must be one of {LAYOUTS}, got {layout!r}")
    fitting = [name for name, shape in shapes.items() if weight.shape == shape and layout in (None, name)]
    if not fitting:
        expected = list(shapes.values()) if layout is None else shapes[layout]
        raise ValueError(f"`weight` must have shape {expected}, got {tuple(weight.shape)}")
    if len(fitting) > 1:
        raise ValueError(f"`layout` must be given for a weight of shape {tuple(weight.shape)}: one of {fitting}")
    (name,) = fitting
    if name == "torchsparse":
        return weight
    if kernel_size == 1:
        # spconv multiplies by the weight read as [in, out], whatever its axes are called.
        return weight.reshape(out_channels, in_channels).T if name == "dense" else weight.reshape(channels)
    return _FROM_5D[name](weight).reshape(kernel_size**3, *channels)
