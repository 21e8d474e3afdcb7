"""Shapes in cells that are not exactly those of their surface, as the dense stage makes them.

The transformer of a sparse stage learns in the cells that the narrow band of a shape covers. The dense stage, which
picks the cells of a generated shape, gives some that the surface does not cross, and lacks others. A training that has
seen such cells draws a closed surface within them, where one that has not perforates it.
"""

import hashlib

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_number
from ..geometry.sdf import SDFBlocks


# Width of the blobs in which cells are added and left out, as the standard deviation of a Gaussian, in cells.
BLOB_WIDTH = 1.5
# Shares of the shapes that keep their cells, and that lose some.
EXACT, THINNED = 0.25, 0.4
# The largest share of the cells of a surface that is left out.
MAX_LOST = 0.05


def loosen_cells(blocks: SDFBlocks, share: float, seed: int) -> SDFBlocks:
    """Returns the blocks of a shape with some around them in addition, and without some of theirs.

    A quarter of the seeds leave the shape as it is. Others add up to `share` of the cells that touch those of the
    surface by a face, an edge or a corner, in blobs; all samples of an added block are exactly 1 outside of the shape,
    and -1 inside. Two fifths of these seeds also leave out up to 5 % of the cells of the surface.

    Args:
        blocks: The narrow band of a shape.
        share: Largest share of the surrounding cells that is added, in [0, 1].
        seed: Seed of the random choice, at least 0.

    Returns:
        The blocks in ascending order of their coordinates.

    Raises:
        ValueError: if `share` is not in [0, 1].
    """
    check_number("share", share, 0, 1)
    rng = np.random.default_rng(seed)
    if share == 0 or rng.random() < EXACT:
        return blocks
    size = blocks.resolution // blocks.values.shape[-1]
    cells = np.zeros((size,) * 3, dtype=bool)
    cells[tuple(blocks.coords.T.numpy())] = True
    added = _pick(_surrounding(cells), rng.uniform(0, share), rng)
    lost = np.zeros_like(cells)
    if rng.random() < THINNED:
        lost = _pick(cells, rng.uniform(0, MAX_LOST), rng)
    kept = torch.from_numpy(~lost[tuple(blocks.coords.T.numpy())])
    coords = torch.from_numpy(np.argwhere(added)).to(blocks.coords.dtype)
    signs = _signs(blocks, cells)[tuple(coords.long().T.numpy())]
    ones = torch.ones(len(coords), *blocks.values.shape[1:], dtype=blocks.values.dtype)
    values = ones * torch.from_numpy(signs).to(ones.dtype)[:, None, None, None]
    coords = torch.cat([blocks.coords[kept], coords])
    order = (coords.long() @ torch.tensor([size**2, size, 1])).argsort()
    return SDFBlocks(
        coords=coords[order],
        values=torch.cat([blocks.values[kept], values])[order],
        sharp=torch.cat([blocks.sharp[kept], torch.zeros_like(values, dtype=torch.bool)])[order],
        resolution=blocks.resolution,
    )


def encoder_rows(target: Tensor) -> Tensor:
    """Returns which voxels of blocks are the input of SparseVAE's encoder, bool like `target`.

    Those are the voxels of the narrow band and, of a block without any (see `loosen_cells`), its eight corners, which
    say on which side of the surface it is.

    Args:
        target: Values s / tau, clamped to [-1, 1], `[M, s, s, s]`.
    """
    in_band = target.abs() < 1
    size = target.shape[-1]
    # Written into a tensor, truth values would come from the host, for which a GPU is waited for.
    places = torch.arange(size, device=target.device)
    end = (places == 0) | (places == size - 1)
    corners = end[:, None, None] & end[:, None] & end
    empty = ~in_band.flatten(1).any(1)
    return in_band | (empty[:, None, None, None] & corners)


def seed_of(name: str) -> int:
    """Returns the seed of a mesh, which depends on its id alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


def _surrounding(cells: np.ndarray) -> np.ndarray:
    """Returns the cells of a grid that touch an occupied one without being one."""
    grid = torch.from_numpy(cells)[None, None].float()
    return (F.max_pool3d(grid, 3, 1, 1)[0, 0] > 0).numpy() & ~cells


def _pick(cells: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Returns the grid of a share of some cells that lie together in blobs."""
    from scipy import ndimage

    noise = ndimage.gaussian_filter(rng.standard_normal(cells.shape), BLOB_WIDTH)
    picked = np.zeros_like(cells)
    count = round(share * int(cells.sum()))
    if count:
        picked[cells] = noise[cells] >= np.partition(noise[cells], -count)[-count]
    return picked


def _signs(blocks: SDFBlocks, cells: np.ndarray) -> np.ndarray:
    """Returns the side of the surface of each cell that the surface does not cross: 1 outside, -1 inside; else 0.

    Cells that are joined by faces and not by the surface are on the same side, that of the voxels beside them.
    """
    from scipy import ndimage

    labels, count = ndimage.label(~cells)
    votes = np.zeros(count + 1)
    coords, values = blocks.coords.numpy(), blocks.values.numpy()
    for axis in range(3):
        for side in (0, -1):
            beside = coords.copy()
            beside[:, axis] += 1 if side else -1
            inside = ((beside >= 0) & (beside < len(cells))).all(axis=1)
            face = values.take(side, axis=axis + 1).reshape(len(coords), -1).mean(axis=1)
            np.add.at(votes, labels[tuple(beside[inside].T)], face[inside])
    # The corner of the grid, and what it is joined with, is outside whatever the voxels say.
    votes[labels[0, 0, 0]] = 1.0
    votes[0] = 0.0
    signs: np.ndarray = np.where(votes < 0, -1, 1)[labels] * (labels > 0)
    return signs
