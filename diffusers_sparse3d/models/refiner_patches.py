"""Patches of sparse volumes for the refiners: which there are, how they are filled, and how their results are read.

`PatchRefiner` is the base class of both refiners.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.utils import logging
from torch import Tensor

from ..checks import check_integer
from ..ops.checks import check_floating
from ..ops.coordinates import MAX_RESOLUTION, check_coords, decode_coords, encode_coords
from ..ops.pooling import sparse_mean_pool
from ..sparse_tensor import CoordinateCache
from .hub import HubModelMixin
from .input_checks import check_features
from .refiner_layers import RefinerUNet
from .single_file import OriginalCheckpointMixin


@dataclass
class Patch:
    """One cubic patch of a volume: the voxels that it holds, and the rows of the output that it contributes to.

    Attributes:
        input_rows, input_index: rows of the input in the patch, and their flat index in it, both `[n]` int64.
        output_rows, output_index: the same for the output.
        weights: `[m, 1]` float32, the share of this patch in each of its output rows.
    """

    input_rows: Tensor
    input_index: Tensor
    output_rows: Tensor
    output_index: Tensor
    weights: Tensor

    def gather(self, volume: Tensor) -> Tensor:
        """Weighted values `[m, C]`, float32 or better, of this patch's output `[C, X, Y, Z]`."""
        return volume.movedim(0, -1).flatten(0, 2)[self.output_index] * self.weights


def locate(coords: Tensor, sample: int, start: Tensor, end: Tensor, patch_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The voxels of one sample in a box.

    Args:
        coords: `[N, 4]` int32 (batch, x, y, z).
        sample: batch index of the sample.
        start: `[3]` int32, the corner of the box, which is that of a patch.
        end: `[3]` int32, the exclusive upper bound of the box.
        patch_size: edge of the patch in voxels.

    Returns:
        Rows of `coords` `[n]`, their place in the patch `[n, 3]`, and the flat index of that place `[n]`; all int64.
    """
    position = coords[:, 1:]
    inside = (coords[:, 0] == sample) & ((position >= start) & (position < end)).all(dim=1)
    rows = inside.nonzero()[:, 0]
    local = position[rows].long() - start
    return rows, local, (local[:, 0] * patch_size + local[:, 1]) * patch_size + local[:, 2]


def find_patches(
    coords: Tensor, output_coords: Tensor, resolution: int, patch_size: int, patch_stride: int, blend: bool
) -> Iterator[Patch]:
    """The patches of a volume that at least one row of the output depends on.

    Patches start at multiples of `patch_stride` and may reach beyond the volume.

    Args:
        coords: `[N, 4]` int32 (batch, x, y, z) of the input.
        output_coords: `[M, 4]` int32, where the refined volume is wanted.
        resolution: samples per axis of the volume.
        patch_size: edge of a patch in voxels.
        patch_stride: distance of neighbouring patches.
        blend: mix the results of overlapping patches linearly across the overlap; else take that of the last one.
    """
    last = max(0, -(-(resolution - patch_size) // patch_stride))
    overlap = patch_size - patch_stride
    ramp = torch.linspace(0, 1, overlap, device=coords.device)
    rising = torch.cat([ramp, ramp.new_ones(patch_stride)])
    falling = torch.cat([ramp.new_ones(patch_stride), 1 - ramp])
    for sample in output_coords[:, 0].unique().tolist():
        for index in itertools.product(range(last + 1), repeat=3):
            start = coords.new_tensor(index) * patch_stride
            ends = [patch_size if blend or i == last else patch_stride for i in index]
            end = start + coords.new_tensor(ends)
            output_rows, local, output_index = locate(output_coords, sample, start, end, patch_size)
            if output_rows.numel() == 0:
                continue
            weights = torch.ones(output_rows.numel(), device=coords.device)
            if blend:
                for axis, i in enumerate(index):
                    if i > 0:
                        weights = weights * rising[local[:, axis]]
                    if i < last:
                        weights = weights * falling[local[:, axis]]
            input_rows, _, input_index = locate(coords, sample, start, start + patch_size, patch_size)
            yield Patch(input_rows, input_index, output_rows, output_index, weights[:, None])


def scatter_to_patches(patches: list[Patch], values: Tensor, background: Tensor, patch_size: int) -> Tensor:
    """Dense patches `[B, C, size, size, size]` with `values [N, C]` at their voxels and `background [C]` elsewhere."""
    volume = background.expand(len(patches), patch_size**3, -1).contiguous()
    for i, patch in enumerate(patches):
        volume[i, patch.input_index] = values[patch.input_rows]
    # The channels are last in memory, as the convolutions of a GPU like them.
    return volume.unflatten(1, (patch_size,) * 3).movedim(-1, 1)


def batches(patches: Iterator[Patch], batch_size: int) -> Iterator[list[Patch]]:
    """The patches in lists of `batch_size`; the last list may be shorter."""
    while batch := list(itertools.islice(patches, batch_size)):
        yield batch


def check_refine_inputs(
    values: dict[str, tuple[Tensor, int]],
    coords: Tensor,
    output_coords: Tensor | None,
    resolution: int,
    patch_batch_size: int,
    check_values: bool,
) -> None:
    """
    Check the arguments of a refiner's `refine`.

    Args:
        values: by name of the argument, a tensor that must have a row for each of `coords`, and its channels.
        coords: `[N, 4]`, the voxels of the input.
        output_coords: `[M, 4]`, where the refined volume is wanted, or None.
        resolution: samples per axis of the volume.
        patch_batch_size: patches to compute at a time.
        check_values: look at the values of the tensors, too, which waits for a GPU.

    Raises:
        ValueError: naming the argument that does not fit.
    """
    check_integer("resolution", resolution, 1, MAX_RESOLUTION)
    check_integer("patch_batch_size", patch_batch_size, 1)
    if check_values:
        check_coords(coords, resolution)
        if output_coords is not None:
            check_coords(output_coords, resolution, "output_coords")
    for name, (tensor, channels) in values.items():
        check_features(tensor, coords, name, channels, check_values)


class PatchRefiner(HubModelMixin, OriginalCheckpointMixin):
    """Base of the refiners: networks on overlapping cubic patches of sparse volumes, with their U-Net in `unet`."""

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns = ["norm"]

    def _init_unet(
        self,
        in_channels: int,
        block_out_channels: tuple[int, ...],
        layers_per_block: int,
        mid_layers: int,
        norm_num_groups: int,
        patch_size: int,
        patch_stride: int,
    ) -> None:
        """Make the U-Net, for patches that fit it.

        Raises:
            ValueError: if the configuration does not hold together.
        """
        factor = 2 ** (len(block_out_channels) - 1)
        if patch_size % factor or patch_size < factor:
            raise ValueError(f"`patch_size` must be a multiple of {factor}, got {patch_size}")
        if not patch_size <= 2 * patch_stride <= 2 * patch_size:
            raise ValueError(
                f"`patch_stride` must be from half of `patch_size` to `patch_size` ({patch_size}), got {patch_stride}"
            )
        if any(channels % norm_num_groups for channels in block_out_channels):
            raise ValueError(
                f"`block_out_channels` must be multiples of `norm_num_groups` {norm_num_groups}, got"
                f" {tuple(block_out_channels)}"
            )
        self.patch_stride = patch_stride
        self.spatial_compression_ratio = factor
        self.unet = RefinerUNet(in_channels, block_out_channels, layers_per_block, mid_layers, norm_num_groups)

    def enable_tiling(self, slab_size: int = 16) -> None:
        """Compute the widest volumes of a patch in slabs: the same result (up to rounding) in less memory.

        It has no effect with gradients, and where blocks are offloaded or placed one by one.

        Args:
            slab_size (`int`, defaults to `16`): Planes of a slab, even.

        Raises:
            ValueError: if `slab_size` is not positive and even.
        """
        if check_integer("slab_size", slab_size) < 2 or slab_size % 2:
            raise ValueError(f"`slab_size` must be positive and even, got {slab_size}")
        self.unet.slab_size = slab_size

    def disable_tiling(self) -> None:
        """Compute patches in one piece again."""
        self.unet.slab_size = None

    def _check_patches(self, sample: Tensor) -> None:
        """Raise a ValueError unless `sample` is a batch of patches `[B, in_channels, X, Y, Z]` for the U-Net."""
        check_floating(sample=sample)
        channels, factor = self.config.in_channels, self.spatial_compression_ratio
        sizes = sample.shape[2:]
        if sample.ndim != 5 or sample.shape[1] != channels or any(size % factor or size == 0 for size in sizes):
            raise ValueError(
                f"`sample` must have shape [B, {channels}, X, Y, Z] with sizes that are multiples of {factor}, got"
                f" {list(sample.shape)}"
            )

    def _patch_batches(
        self,
        coords: Tensor,
        output_coords: Tensor,
        resolution: int,
        blend: bool,
        patch_batch_size: int,
        show_progress: bool,
    ) -> Iterable[list[Patch]]:
        """The patches of a volume in lists of `patch_batch_size`, with a progress bar; see `find_patches`."""
        patches = find_patches(coords, output_coords, resolution, self.config.patch_size, self.patch_stride, blend)
        return logging.tqdm(batches(patches, patch_batch_size), desc="Refining", disable=not show_progress)


def surrounding_coords(coords: Tensor, resolution: int) -> Tensor:
    """The voxels of the grid that touch one of `coords` (26-neighbourhood) and are not among them.

    Args:
        coords: `[N, 4]` int32 (batch, x, y, z), distinct.
        resolution: samples per axis of the grid.

    Returns:
        `[K, 4]` int32, ascending.
    """
    own_keys = encode_coords(coords).sort().values
    # The key of a neighbour differs from that of the voxel by a constant for each axis, in the grid or just outside.
    corner_and_neighbours = F.pad(torch.eye(4, dtype=torch.int32, device=coords.device)[:, 1:], (1, 0))
    corner_key, *neighbour_keys = encode_coords(corner_and_neighbours).tolist()
    keys = own_keys
    # The set is dilated along one axis after the other, so that few neighbours are new at a time.
    for neighbour_key in neighbour_keys:
        step = neighbour_key - corner_key
        neighbours = [shifted[~find_keys(keys, shifted)[1]] for shifted in (keys - step, keys + step)]
        keys = torch.cat([keys, *neighbours]).unique()
    surroundings = decode_coords(keys[~find_keys(own_keys, keys)[1]])
    position = surroundings[:, 1:]
    return surroundings[((position >= 0) & (position < resolution)).all(dim=1)]


def coarse_volume(feats: Tensor, coords: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """The volume at a `factor` times coarser resolution: means of voxels `[n, C]`, and their coordinates `[n, 4]`."""
    # The cache ends here: what pooling derives from the coordinates takes more memory than the result.
    cache = CoordinateCache(coords)
    return sparse_mean_pool(feats, cache, factor), cache.downsample(factor)[0].coords


def look_up(feats: Tensor, coords: Tensor, output_coords: Tensor) -> tuple[Tensor, Tensor]:
    """Features of given voxels at other places.

    Args:
        feats: `[N, C]`.
        coords: `[N, 4]` int32, their voxels.
        output_coords: `[M, 4]` int32.

    Returns:
        `[M, C]`, the features at `output_coords`, uninitialised where these are not among `coords`; and `[K]` int64,
        the rows where they are not.
    """
    keys, order = encode_coords(coords).sort()
    place, known = find_keys(keys, encode_coords(output_coords))
    sample = feats.new_empty(output_coords.shape[0], feats.shape[1])
    sample[known] = feats[order[place[known]]]
    return sample, (~known).nonzero()[:, 0]


def find_keys(keys: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """The index of each of `queries` in ascending `keys`, and whether it is there at all."""
    place = torch.searchsorted(keys, queries)
    # Keys are not negative, so that the padding past the end matches no query.
    return place, F.pad(keys, (0, 1), value=-1)[place] == queries
