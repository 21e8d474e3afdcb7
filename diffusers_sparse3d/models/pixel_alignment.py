"""Pixel-aligned conditioning: image features at the pixels that the cells of a grid project to."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# The camera before anything is learnt, which sees the cube [-1, 1]^3 from a little above and nearly fills the picture.
ELEVATION, LOG_DISTANCE = math.radians(23.0), math.log(4.5)
# Least distance of a point from the plane of the camera: points behind it would change sides.
NEAREST = 0.2
# Image encoders have a class token and a few registers. More than that before a square of patches are none of theirs.
MAX_PREFIX_TOKENS = 16


def project(points: Tensor, cameras: Tensor) -> Tensor:
    """
    Pixels that points project to, for cameras in front of the object (azimuth 0) that look at the origin.

    Args:
        points: `[N, 3]` in model space, the cube [-1, 1]^3: x to the right, y up, z towards the camera.
        cameras: `[B, 6]`: elevation (positive from above) and roll (positive ones turn the picture clockwise) in
            radians; the logarithms of the distance and of the scale, half pictures per unit of length at the origin;
            the shift of the picture's centre from the projected origin to the right and down, in half pictures.

    Returns:
        `[B, N, 2]`: right and down, in [-1, 1] inside of the picture.
    """
    elevation, roll, log_distance, log_scale = cameras[:, :4, None].unbind(1)
    shift = cameras[:, None, 4:]
    x, y, z = points[None].unbind(2)
    up = elevation.cos() * y - elevation.sin() * z
    depth = elevation.sin() * y + elevation.cos() * z
    right, up = roll.cos() * x + roll.sin() * up, roll.cos() * up - roll.sin() * x
    distance = log_distance.exp()
    size = log_scale.exp() * distance / (distance - depth).clamp(min=NEAREST)
    return torch.stack([right * size, -up * size], 2) - shift


def patch_grid_size(num_tokens: int) -> int:
    """
    The edge of the largest square of patches that `num_tokens` image tokens end with.

    Raises:
        ValueError: if more than `MAX_PREFIX_TOKENS` come before it.
    """
    side = math.isqrt(num_tokens)
    if side == 0 or num_tokens - side**2 > MAX_PREFIX_TOKENS:
        raise ValueError(
            "`encoder_hidden_states` must be the tokens of a square of patches for a model with `pixel_aligned`, after"
            f" at most {MAX_PREFIX_TOKENS} others, got {num_tokens} tokens"
        )
    return side


class CameraHead(nn.Module):
    """The camera of an image, from its tokens: attention of learnt queries, then an MLP.

    Args:
        token_dim: channels of the image tokens.
        num_queries: learnt queries.
        dim: channels of each.
    """

    def __init__(self, token_dim: int, num_queries: int = 4, dim: int = 64):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(num_queries, dim) * dim**-0.5)
        self.to_k = nn.Linear(token_dim, dim)
        self.to_v = nn.Linear(token_dim, dim)
        self.proj_in = nn.Linear(num_queries * dim, 4 * dim)
        self.proj_out = nn.Linear(4 * dim, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        """Cameras `[B, 6]` in float32, as [`project`] takes them, of tokens `[B, L, token_dim]`."""
        queries = self.queries.to(tokens.dtype).expand(len(tokens), 1, -1, -1)
        key, value = self.to_k(tokens)[:, None], self.to_v(tokens)[:, None]
        pooled = F.scaled_dot_product_attention(queries, key, value).flatten(1)
        change = self.proj_out(F.gelu(self.proj_in(pooled))).float()
        # Numbers, not a tensor of them: CUDA graphs capture no copies from the host.
        elevation, roll, log_distance, *others = change.unbind(1)
        return torch.stack([elevation + ELEVATION, roll, log_distance + LOG_DISTANCE, *others], 1)


class PixelAlignment(nn.Module):
    """
    What an image shows where the cells of a grid project to, to be added to their tokens.

    The idea is that of Pixal3D (arXiv 2605.10922). Image tokens, reduced to few channels, are sampled bilinearly at
    the pixels of several points of each cell. The camera is predicted from the tokens: it is trained through the
    positions of the samples. Tokens of zeros, as those of the unconditional prediction, give zeros.

    Args:
        dim: channels of the tokens of the grid.
        token_dim: channels of the image tokens.
        grid_size: cells of an edge of the grid, which fills the cube [-1, 1]^3.
        channels: channels that the image tokens are reduced to.
        points_per_axis: points in each cell along each axis.
    """

    def __init__(self, dim: int, token_dim: int, grid_size: int, channels: int = 48, points_per_axis: int = 2):
        super().__init__()
        self.grid_size, self.points_per_axis = grid_size, points_per_axis
        self.camera = CameraHead(token_dim)
        self.proj_in = nn.Linear(token_dim, channels, bias=False)
        self.proj_out = nn.Linear(channels * points_per_axis**3, dim, bias=False)

    def reset_output(self) -> None:
        """Makes the module give zeros and the same camera for all images, as at the start of a training."""
        for parameter in (self.proj_out.weight, *self.camera.proj_out.parameters()):
            nn.init.zeros_(parameter)

    def points(self, device: torch.device) -> Tensor:
        """`[grid_size^3 * points_per_axis^3, 3]` points in model space: cells x-major, and so the points of each."""
        count = self.grid_size * self.points_per_axis
        axis = (2 * torch.arange(count, device=device, dtype=torch.float32) + 1) / count - 1
        points = torch.cartesian_prod(axis, axis, axis)
        points = points.view(*(self.grid_size, self.points_per_axis) * 3, 3)
        return points.permute(0, 2, 4, 1, 3, 5, 6).reshape(-1, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        """
        What to add to the tokens of the grid.

        Args:
            tokens: `[B, L, token_dim]` image tokens: a few others, then those of a square of patches, row by row.

        Returns:
            `[B, grid_size^3, dim]`, x-major.

        Raises:
            ValueError: if the tokens are no square, see [`patch_grid_size`].
        """
        side = patch_grid_size(tokens.shape[1])
        patches = self.proj_in(tokens[:, tokens.shape[1] - side**2 :])
        picture = patches.transpose(1, 2).unflatten(2, (side, side))
        pixels = project(self.points(tokens.device), self.camera(tokens))
        # In float32: positions in 16 bits are off by a tenth of a patch.
        sampled = F.grid_sample(picture.float(), pixels[:, None], padding_mode="border", align_corners=False)
        features = sampled[:, :, 0].transpose(1, 2).unflatten(1, (-1, self.points_per_axis**3)).flatten(2)
        return self.proj_out(features.to(patches.dtype))
