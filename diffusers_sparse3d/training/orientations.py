"""Quarter turns about the vertical axis, and mirroring, of the shapes of a dataset.

Both are exact on a voxel grid. Turning a shape so that it faces the camera of its image (`facing`) spares the
transformers to find out how a shape stood in the catalogue that it came from, and gives more shapes.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..geometry.sdf import SDFBlocks


class Orientation(NamedTuple):
    """What is done to a shape: first the turns, then the mirroring.

    Attributes:
        quarter_turns: about the y axis, from +z towards +x: what was seen from azimuth a is seen from a + 90 degrees
            times this.
        mirrored: left and right (x) are exchanged.
    """

    quarter_turns: int = 0
    mirrored: bool = False

    @property
    def prefix(self) -> str:
        """For names of files; empty for a shape as it is."""
        turns = f"turned{self.quarter_turns:+d}-" if self.quarter_turns else ""
        return turns + ("mirrored-" if self.mirrored else "")

    def apply_to_grid(self, grid: Tensor) -> Tensor:
        """`[..., x, y, z]` on a cube of samples."""
        grid = torch.rot90(grid, -self.quarter_turns, (-3, -1))
        return grid.flip(-3) if self.mirrored else grid

    def apply_to_blocks(self, blocks: SDFBlocks) -> SDFBlocks:
        """The blocks stay ascending."""
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
    """The quarter turns after which a view is at -45 to 45 degrees: `azimuth` in degrees, none where it is NaN."""
    return 0 if math.isnan(azimuth) else -round(azimuth / 90)
