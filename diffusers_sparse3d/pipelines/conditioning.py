"""Image tokens for the diffusion transformers, in the pipeline and in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel


def encode_image(image_encoder: PreTrainedModel, pixel_values: Tensor) -> Tensor:
    """Tokens of a DINOv2 encoder before its final norm, then a LayerNorm without affine.

    Args:
        image_encoder: `Dinov2WithRegistersModel`, or any vision transformer of transformers with a final norm.
        pixel_values: `[B, 3, S, S]`, normalised as `Sparse3DImageProcessor` does; cast to the encoder's dtype.

    Returns:
        `[B, L, D]` in the encoder's dtype (the norm computes in float32): class token, register tokens, then the patch
        tokens row by row.
    """
    outputs = image_encoder(pixel_values.to(image_encoder.dtype), output_hidden_states=True)
    hidden_states = outputs.hidden_states[-1]
    return F.layer_norm(hidden_states.float(), hidden_states.shape[-1:]).to(hidden_states.dtype)


def sparse_conditioning(
    tokens: Tensor, mask: Tensor, patch_size: int, num_prefix_tokens: int
) -> tuple[Tensor, Tensor]:
    """The tokens of the foreground, packed, with a coordinate for each.

    Args:
        tokens: `[B, L, D]`: prefix tokens (class and registers), then (S / patch_size)^2 patch tokens row by row.
        mask: `[B, 1, S, S]`, foreground where positive; a patch counts from its first foreground pixel on.
        patch_size: edge of a patch in pixels.
        num_prefix_tokens: tokens in front of the patch tokens, always kept.

    Returns:
        The packed tokens `[M, D]`, sample after sample, and their coordinates `[M, 4]` int32: (sample, 0, 0, 1) for
        prefix tokens, (sample, column, row, 0) for patches.

    Raises:
        ValueError: if a sample has no foreground.
    """
    foreground = F.max_pool2d(mask.float(), patch_size)[:, 0] > 0
    empty = (~foreground.flatten(1).any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"`image` has no foreground (index {empty}): its alpha or mask is zero everywhere")

    batch_size, rows, columns = foreground.shape
    prefix = foreground.new_ones(batch_size, num_prefix_tokens)
    batch_index, token_index = torch.cat([prefix, foreground.flatten(1)], dim=1).nonzero(as_tuple=True)

    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    patch_coords = torch.stack([column, row, torch.zeros_like(row)], dim=-1).reshape(-1, 3)
    prefix_coords = torch.tensor([[0, 0, 1]]).expand(num_prefix_tokens, 3)
    token_coords = torch.cat([prefix_coords, patch_coords]).to(tokens.device)

    coords = torch.cat([batch_index[:, None], token_coords[token_index]], dim=1).int()
    return tokens[batch_index, token_index], coords


def select_samples(conditioning: Mapping[str, Tensor], samples: Sequence[int]) -> dict[str, Tensor]:
    """The conditioning of a batch made of some samples of another, in the order given; a sample may come repeatedly.

    Args:
        conditioning: as the stages prepare it: `encoder_hidden_states [B, L, D]`, or packed `[M, D]` with
            `encoder_coords [M, 4]`.
        samples: which ones.
    """
    tokens = conditioning["encoder_hidden_states"]
    if "encoder_coords" not in conditioning:
        return {"encoder_hidden_states": tokens[list(samples)]}
    coords = conditioning["encoder_coords"]
    rows = [(coords[:, 0] == sample).nonzero().flatten() for sample in samples]
    coords = torch.cat([F.pad(coords[own, 1:], (1, 0), value=place) for place, own in enumerate(rows)])
    return {"encoder_hidden_states": tokens[torch.cat(rows)], "encoder_coords": coords}
