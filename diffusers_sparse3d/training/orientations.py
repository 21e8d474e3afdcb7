"""Quarter turns about the vertical axis, and mirroring, of the shapes of a dataset.

Both are exact on a voxel grid. A shape that is turned to face the camera of its image (`facing`) spares the
transformers from learning how shapes stood in the catalogue that they came from; its views give more training shapes.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..geometry.sdf import SDFBlocks


class Orientation(NamedTuple):
    """Quarter turns of a shape and, after them, mirroring.

    Attributes:
        quarter_turns: Turns by 90 degrees about the y axis, from +z towards +x. A view from azimuth a becomes the view
            from a + 90 quarter_turns degrees.
        mirrored: Whether left and right (the x axis) are exchanged.
    """

    quarter_turns: int = 0
    mirrored: bool = False

    @property
    def prefix(self) -> str:
        """Prefix of the names of cached files; empty for an unchanged shape."""
        turns = f"turned{self.quarter_turns:+d}-" if self.quarter_turns else ""
        return turns + ("mirrored-" if self.mirrored else "")

    def apply_to_grid(self, grid: Tensor) -> Tensor:
        """Returns a cube of samples `[..., x, y, z]` in this orientation."""
        grid = torch.rot90(grid, -self.quarter_turns, (-3, -1))
        return grid.flip(-3) if self.mirrored else grid

    def apply_to_blocks(self, blocks: SDFBlocks) -> SDFBlocks:
        """Returns SDF blocks in this orientation, again in ascending order of their coordinates."""
        if self == UNCHANGED:
            return blocks
        size = blocks.resolution // blocks.values.shape[-1]
        x, y, z = blocks.coords.unbind(1)
        for _ in range(self.quarter_turns % 4):
            x, z = z, size - 1 - x
        if self.mirrored:
            x = size - 1 - x
        coords = torch.stack([x, y, z], dim=1)
        order = (coords.long() @ torch.tensor([size**2, size, 1])).argsort()
        values, sharp = (self.apply_to_grid(tensor)[order] for tensor in (blocks.values, blocks.sharp))
        return SDFBlocks(coords=coords[order], values=values, sharp=sharp, resolution=blocks.resolution)


UNCHANGED = Orientation()


def facing(azimuth: float) -> int:
    """Returns the quarter turns that bring a view at `azimuth` degrees to within 45 of the front; 0 for NaN."""
    return 0 if math.isnan(azimuth) else -round(azimuth / 90)
