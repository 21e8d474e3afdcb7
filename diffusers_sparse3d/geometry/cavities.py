"""
Cavities of signed distance fields that open to the outside through small holes only, and filling them.

A generated surface that is torn somewhere, even by a hole of one sample, is a shell: the outside reaches its inside,
and marching cubes gives it a second, inner wall. `fill_cavities` makes what lies behind such holes solid.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_integer, check_number
from ..ops.coordinates import MAX_RESOLUTION
from .marching_cubes.extraction import check_field
from .marching_cubes.sample_bits import offsets, pack_bits, unpack_bits
from .sdf.block_grid import BlockGrid


# Widest openings in model space: what is wider is part of the shape.
MAX_OPENING = 0.5
BLOCK_SIZE = 8
# Steps by which the outside is followed into corners that a ball does not reach; a leak through a hole stays as short.
CORNER_STEPS = 3
# Half width, in samples, of the transition between inside and outside where a hole is closed.
SMOOTHING = 3
# Blocks in one pass over their neighbourhoods: what fits a cache, or about 0.2 GB.
CPU_CHUNK, GPU_CHUNK = 1 << 10, 1 << 15


def fill_cavities(
    feats: Tensor, coords: Tensor, resolution: int, level: float = 0.0, max_opening: float = 1 / 16
) -> tuple[Tensor, Tensor]:
    """
    A signed distance field whose cavities are solid where no opening to the outside is as wide as they are.

    For balls of growing diameter, up to `max_opening`: where such a ball fits into free space, but cannot get to from
    outside the grid, is a cavity. It becomes inside, with all that is connected with it and that the ball cannot touch
    from outside. Gaps that are open to the outside and nowhere wider than at their mouths, as those between the slats
    of a chair, are left alone, and so are holes that go through an object.

    On any device, plain PyTorch but for the flood fill; time and memory grow with the surface.

    Args:
        feats: `[N, 1]` or `[N]`, s / tau, negative inside; any floating dtype.
        coords: `[N, 4]` integers (batch, x, y, z), all of one sample of the batch, or `[N, 3]`; distinct.
        resolution: samples per axis; sample i lies at `-1 + 2 i / (resolution - 1)`.
        level: the iso-level of the surface, in the units of `feats`.
        max_opening: width of the widest opening of a cavity in model space, whose cube [-1, 1]^3 is 2 wide.

    Returns:
        Values `[M, 1]` float32 and coordinates `[M, 3]` int32: the samples given, in their order, then those that
        close the openings. The tensors given, as they are, if there is no cavity.

    Raises:
        TypeError: if `feats` or `coords` is no tensor.
        ValueError: if `max_opening` is not between 0 and 1/2, `resolution` or `level` is out of range, or the rows are
            not as above. Rows that repeat and values that are not finite are left for `sparse_marching_cubes` to find.
    """
    resolution, level = check_integer("resolution", resolution, 2, MAX_RESOLUTION), check_number("level", level)
    check_field(feats, coords, resolution)
    check_number("max_opening", max_opening, 0, MAX_OPENING)
    widest = int(max_opening * resolution / 4)  # radius in samples
    radii = [radius for radius in (1 << step for step in range(8)) if radius < widest] + [widest] * (widest > 0)
    if len(coords) == 0 or not radii:
        return feats, coords
    values, rows = feats.detach().reshape(-1).float(), coords[:, -3:].int()
    samples = _Blocks(rows, resolution, reach=2 * widest)
    walls = samples.set_of(values < level)
    filled = find_cavities(samples, walls, radii)
    # The inside of a solid, of which a narrow band is known, is a cavity too, but one without free samples.
    if not samples.contains(filled).any():
        return feats, coords
    return _fill(samples, values, rows, walls, filled, level)


def find_cavities(samples: "_Blocks", walls: Tensor, radii: list[int]) -> Tensor:
    """The set of free samples that belong to cavities, by balls of these radii in samples; `walls` is that inside."""
    solid = walls
    for radius in radii:
        fits = ~samples.dilate(solid, radius)
        outside = samples.flood_from_outside(fits)
        cavity = fits & ~outside
        cavity[-1] = 0
        if not cavity.any():
            continue
        touched = samples.dilate(outside, radius)
        closed = ~(solid | samples.dilate(touched & ~solid, CORNER_STEPS, within=~solid))
        # A ball fills all but corners and narrow places; what is connected with it there closes the openings.
        solid = solid | samples.dilate(cavity & closed, 3 * radius + CORNER_STEPS, within=closed)
    return solid & ~walls


def _fill(
    samples: "_Blocks", values: Tensor, coords: Tensor, walls: Tensor, filled: Tensor, level: float
) -> tuple[Tensor, Tensor]:
    """The field of `fill_cavities`, from its values `[N]` float32, coordinates `[N, 3]` and two sets."""
    inside = walls | filled
    openings = samples.dilate(filled, 1) & ~inside
    closing = samples.dilate(openings, SMOOTHING) & ~walls
    closing[-1] = 0
    smooth = samples.share_around(inside, SMOOTHING, closing).mul_(-2).add_(1 + level)

    # Inner walls vanish, because both their sides are inside.
    values = values.clone()
    flipped, near = samples.contains(filled), samples.contains(closing)
    values[flipped] = torch.minimum(2 * level - values[flipped], values.new_tensor(level - 0.1))
    own = smooth[samples.slots[near]]
    values[near] = torch.where(flipped[near], own, torch.minimum(values[near], own))
    added = samples.unpack(closing)
    added[samples.slots] = False
    added = added.nonzero()[:, 0]
    places = samples.grid.coords(added) - samples.shift
    kept = ((places >= 0) & (places < samples.resolution)).all(1)
    return torch.cat([values, smooth[added[kept]]])[:, None], torch.cat([coords, places[kept]])


class _Blocks:
    """
    Sets of samples near a field, as bits of blocks of 8^3.

    A set is `[M + 1, 8, 8]` uint8: bit z of an element is the sample at x, y and z of a block; the last block stands
    for all that are not stored, and is not changed by the methods.

    Args:
        coords: `[N, 3]` int32, the samples of the field.
        resolution: samples per axis.
        reach: samples around the blocks of `coords` that are stored, too.
    """

    def __init__(self, coords: Tensor, resolution: int, reach: int):
        # A margin of blocks around the grid lets the outside in from all sides.
        ring = -(-reach // BLOCK_SIZE)
        self.resolution, self.shift = resolution, BLOCK_SIZE * (ring + 1)
        blocks = -(-resolution // BLOCK_SIZE) + 2 * (ring + 1)
        stored = torch.zeros((1, 1, blocks, blocks, blocks), device=coords.device)
        stored[0, 0][((coords + self.shift) // BLOCK_SIZE).long().unbind(1)] = 1
        for _ in range(ring):
            stored = F.max_pool3d(stored, 3, 1, 1)
        self.grid = BlockGrid(stored[0, 0].nonzero().int() * BLOCK_SIZE, blocks * BLOCK_SIZE, BLOCK_SIZE)
        table = F.pad(self.grid.table.long(), (1,) * 6, value=-1)
        table[table < 0] = len(self.grid.blocks)
        around = self.grid.blocks[:, None] + offsets(range(3), coords.device)
        self.neighbours = table[around.unbind(2)]
        self.slots = self.grid.slots(coords + self.shift)
        self._chunk = CPU_CHUNK if coords.device.type == "cpu" else GPU_CHUNK

    def set_of(self, chosen: Tensor) -> Tensor:
        """The set of those samples of the field that `chosen [N]` bool tells."""
        flags = self.grid.full(False, torch.bool)
        flags[self.slots] = chosen
        return self._packed(flags)

    def contains(self, samples: Tensor) -> Tensor:
        """Whether the samples of the field are in a set, `[N]` bool."""
        return self.unpack(samples)[self.slots]

    def unpack(self, samples: Tensor) -> Tensor:
        """A set as `[size + 1]` bool in the order of the slots of `grid`."""
        return unpack_bits(samples.flatten())[: self.grid.size + 1]

    def _packed(self, flags: Tensor) -> Tensor:
        rows = pack_bits(flags[: self.grid.size].view(torch.uint8)).view(torch.uint8)
        return F.pad(rows, (0, BLOCK_SIZE**2)).view(-1, BLOCK_SIZE, BLOCK_SIZE)

    def flood_from_outside(self, free: Tensor) -> Tensor:
        """The samples of a set that paths through faces connect with the outside; what is not stored is free."""
        return self._packed(self.grid.flood_from_outside(self.unpack(free)))

    def _around(self, samples: Tensor, margin: int, blocks: Tensor) -> Tensor:
        """Blocks of a set with `margin` samples around them, `[m, s, s]` int32 of s bits, s = 8 + 2 margin."""
        size = BLOCK_SIZE + 2 * margin
        # What is taken of the block before, of the block itself and of the block behind, and where it goes.
        parts = slice(BLOCK_SIZE - margin, None), slice(None), slice(0, margin)
        places = slice(0, margin), slice(margin, -margin), slice(size - margin, None)
        result = torch.empty(len(blocks), size, size, dtype=torch.int32, device=samples.device)
        rows = self.neighbours[blocks].view(-1, 3, 3, 3)
        for x in range(3):
            for y in range(3):
                low, here, high = (samples[rows[:, x, y, z]][:, parts[x], parts[y]].int() for z in range(3))
                bits = low >> BLOCK_SIZE - margin | here << margin | (high & (1 << margin) - 1) << BLOCK_SIZE + margin
                result[:, places[x], places[y]] = bits
        return result

    def dilate(self, samples: Tensor, radius: int, within: Tensor | None = None) -> Tensor:
        """
        The samples at most `radius` steps from those of a set.

        Steps through faces and through corners take turns, which makes a ball within a quarter of round.

        Args:
            samples: the set.
            radius: steps.
            within: a set that is not left: only its samples are reached, by steps through faces.
        """
        while radius > 0:
            steps = min(radius, BLOCK_SIZE // 2)
            result = torch.zeros_like(samples)
            inner = slice(steps, steps + BLOCK_SIZE)
            some = samples.flatten(1).any(1)[self.neighbours].any(1).nonzero()[:, 0]
            for blocks in some.split(self._chunk):
                near = self._around(samples, steps, blocks)
                allowed = None if within is None else self._around(within, steps, blocks)
                for step in range(steps):
                    near = _grow(near, through_corners=step % 2 == 1) if allowed is None else _grow(near) & allowed
                result[blocks] = (near[:, inner, inner] >> steps).to(torch.uint8)
            samples, radius = result, radius - steps
        return samples

    def share_around(self, samples: Tensor, radius: int, wanted: Tensor) -> Tensor:
        """The share of a set in the neighbourhood of the samples of another one, `[size + 1]` float32; elsewhere 0."""
        result = self.grid.full(0.0, torch.float32)
        size = BLOCK_SIZE + 2 * radius
        for blocks in wanted[:-1].flatten(1).any(1).nonzero()[:, 0].split(self._chunk):
            bits = self._around(samples, radius, blocks)[..., None]
            share = (bits >> torch.arange(size, dtype=torch.int32, device=bits.device) & 1)[:, None].float()
            for _ in range(radius):
                share = F.avg_pool3d(share, 3, 1)
            self.grid.tiles(result)[blocks] = share[:, 0]
        return result


def _grow(bits: Tensor, through_corners: bool = False) -> Tensor:
    """The samples `[m, s, s]` int32 of s bits, and their 6 neighbours, or all 26."""
    result = bits | bits << 1 | bits >> 1
    for axis in (1, 2):
        last = bits.shape[axis] - 1
        source = result.clone() if through_corners else bits
        result.narrow(axis, 1, last).bitwise_or_(source.narrow(axis, 0, last))
        result.narrow(axis, 0, last).bitwise_or_(source.narrow(axis, 1, last))
    return result
