"""
Sparse samples as bits: what marching cubes needs to know of almost all samples is whether they are there, and inside.

A tile is a block of 8^3 samples. Of each, a plane of bits has eight words int64, one per x; a word has eight rows of
eight bits, one per y, a byte each; bit z of a row is the sample at z. A sample's place is 512 * tile + 64 x + 8 y + z.
"""

import contextlib
import mmap

import numpy as np
import torch
from torch import Tensor


BLOCK_SIZE = 8
TILE_SAMPLES = BLOCK_SIZE**3
# Tiles in one pass over the surface in them: few enough for the cache of a CPU, or enough to fill a GPU.
CPU_TILE_CHUNK, GPU_TILE_CHUNK = 1 << 9, 1 << 15
# Times so many: tiles in one pass over their bits alone, and samples in one pass over given rows.
BIT_PASS_FACTOR, ROW_PASS_FACTOR = 2, 64

# What a sample is, in one byte: bit 0 for those with a value, bit 1 for those inside.
OUTSIDE, INSIDE = 1, 3

# The lowest bit of each byte, which is also z = 0 of each row.
_ONES = 0x0101010101010101


def tile_chunk(device: torch.device) -> int:
    return CPU_TILE_CHUNK if device.type == "cpu" else GPU_TILE_CHUNK


def allocate(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """
    `[count]` zeros. On Linux, in memory of their own: it goes back to the system as soon as it is freed, where the C
    library would keep it in pieces that larger tensors do not fit in; and its pages are large ones, of which a fresh
    one takes a seventh of the time.
    """
    if device.type != "cpu" or count == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(count, dtype=dtype, device=device)
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A kernel may have been built without them.
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)


def offsets(span: range, device: torch.device) -> Tensor:
    """`[len(span)^3, 3]` int32, x slowest."""
    axis = torch.arange(span.start, span.stop, device=device, dtype=torch.int32)
    return torch.cartesian_prod(axis, axis, axis)


def flat_nonzero(flags: Tensor) -> Tensor:
    """The places `[n]` int64 of what is not zero in a flat view of `flags`, bool or uint8."""
    if flags.device.type == "cpu":
        # Four times as fast as PyTorch's; for what is bool already the comparison costs little.
        return torch.from_numpy(np.flatnonzero(flags.numpy() != 0))
    return flags.flatten().nonzero()[:, 0]


def pack_bits(flags: Tensor) -> Tensor:
    """Words int64 of the lowest bits of contiguous `flags`, uint8, 64 for each."""
    # The product moves bit 0 of byte i to bit 56 + i.
    rows = (flags.flatten().view(torch.int64) & _ONES).mul_(0x0102040810204080).bitwise_right_shift_(56)
    return rows.to(torch.uint8).view(torch.int64)


def unpack_bits(rows: Tensor) -> Tensor:
    """`[8 n]` bool: the bits of `rows [n]` uint8."""
    if rows.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(rows.numpy(), bitorder="little")).view(torch.bool)
    return (rows[:, None] >> torch.arange(8, dtype=torch.uint8, device=rows.device) & 1).view(torch.bool).flatten()


def bit_places(words: Tensor) -> Tensor:
    """The places `[n]` int64 of the bits that are set in contiguous `words` int64, ascending: 64 * word + bit."""
    return flat_nonzero(unpack_bits(words.flatten().view(torch.uint8)))


def corner_planes(plane: Tensor, around: Tensor) -> list[Tensor]:
    """
    A plane `[M, 8]` of tiles seen from the corners of cells, four `[m, 9]`.

    Bit (x, y, z) of corner c is in plane c & 3, at `[:, (c >> 2) + x]`: that of the sample at (x + (c >> 2),
    y + (c >> 1 & 1), z + (c & 1)). `around [m, 8]` has the tiles in these directions, the tile itself first.
    """
    first = plane[:, 0]

    def words(tile: int) -> Tensor:
        return torch.cat(
            [plane.index_select(0, around[:, tile]), first.index_select(0, around[:, tile + 4])[:, None]], dim=1
        )

    def step_z(word: Tensor, following: Tensor) -> Tensor:
        return (word >> 1).bitwise_and_(0x7F * _ONES).bitwise_or_((following & _ONES).bitwise_left_shift_(7))

    here, next_z, next_y, next_yz = (words(tile) for tile in range(4))
    along_z = step_z(here, next_z)
    planes = [here, along_z]
    for word, following in ((here, next_y), (along_z, step_z(next_y, next_yz))):
        planes.append((word >> 8).bitwise_and_((1 << 56) - 1).bitwise_or_(following << 56))
    return planes


def _ones_in_bytes(words: Tensor) -> Tensor:
    ones = words - ((words >> 1) & 0x55 * _ONES)
    ones = (ones & 0x33 * _ONES).add_((ones >> 2).bitwise_and_(0x33 * _ONES))
    return (ones >> 4).add_(ones).bitwise_and_(0x0F * _ONES)


def count_bits(plane: Tensor) -> Tensor:
    """How many bits of each tile of a `plane [M, 8]` are set, `[M]` int64."""
    return _ones_in_bytes(plane).mul_(_ONES).bitwise_right_shift_(56).sum(dim=1)


def transpose_bytes(words: Tensor) -> Tensor:
    """Words whose byte z has as bit c bit z of byte c."""
    for shift, mask in ((7, 0x00AA00AA00AA00AA), (14, 0x0000CCCC0000CCCC), (28, 0x00000000F0F0F0F0)):
        swapped = ((words >> shift) ^ words) & mask
        words = words ^ swapped ^ (swapped << shift)
    return words


def step_table(steps: Tensor, planes: list[int]) -> Tensor:
    """
    How to reach the sample a step `[k, 3]`, each axis 0 or 1, away from each sample of a tile, and its bit in a plane
    of those that `RankedBits` holds; `[512 * k]` int32, for `RankedBits.numbers`.
    """
    position = offsets(range(BLOCK_SIZE), steps.device)[:, None] + steps
    tile, place = position >> 3, position & 7
    row = 64 * torch.tensor(planes, device=steps.device) + 8 * place[..., 0] + place[..., 1]
    below = (1 << place[..., 2]) - 1
    return (row << 10 | below << 3 | 4 * tile[..., 0] + 2 * tile[..., 1] + tile[..., 2]).flatten().int()


class RankedBits:
    """
    Bits that are numbered, those that are set, in their order: tile, plane, x, y, z.

    Attributes:
        rows: `[M * planes * 64]` int16, the eight bits of a row, and 256 times how many come before it in its word.
        first: `[M * planes * 8 + 1]` int32, how many come before each word.
    """

    def __init__(self, words: Tensor):
        """From `words [M, planes, 8]`."""
        self.planes = words.shape[1]
        words = words.flatten()
        self.rows = allocate(8 * len(words), torch.int16, words.device)
        self.first = allocate(len(words) + 1, torch.int32, words.device)
        chunk = 64 * tile_chunk(words.device)
        for word, row, count in zip(words.split(chunk), self.rows.split(8 * chunk), self.first[1:].split(chunk)):
            # In byte i, those of bytes 0 to i.
            ones = _ones_in_bytes(word).mul_(_ONES)
            count.copy_(ones >> 56)
            before = ones.bitwise_left_shift_(8).view(torch.uint8)
            row.copy_(before).mul_(256).add_(word.view(torch.uint8))
        self.first[1:].cumsum_(0)
        self.ones_below = torch.tensor([byte.bit_count() for byte in range(128)], dtype=torch.int32).to(words.device)

    def words(self, start: int, stop: int) -> Tensor:
        """The words of tiles `start` to `stop`, flat."""
        size = 64 * self.planes
        return self.rows[start * size : stop * size].to(torch.uint8).view(torch.int64)

    def add_tiles(self, count: int) -> None:
        """Appends tiles without bits."""
        self.rows = torch.cat([self.rows, self.rows.new_zeros(64 * self.planes * count)])
        self.first = torch.cat([self.first, self.first[-1:].expand(8 * self.planes * count)])

    def numbers(self, neighbours: Tensor, tile: Tensor, step: Tensor) -> Tensor:
        """
        The numbers `[n]` int32 of bits a step away from samples.

        Args:
            neighbours: `[M, 8]` int32, the tiles around the upper corner of each tile, itself first.
            tile: `[n]` int32, 8 times the tile of each sample.
            step: `[n]` int32, from the `step_table` of these planes.
        """
        return self._numbers(*self._rows(neighbours, tile, step))

    def numbers_and_gaps(self, neighbours: Tensor, tile: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        As `numbers`, of a single plane; the numbers where no bit is set count for nothing. Which ones these are
        `[k]` int64, and the places there, `[k]` int32.
        """
        row, bits, below = self._rows(neighbours, tile, step)
        there = bits.bitwise_and(below + 1)
        # Mostly there is none, which is found faster than which ones.
        gaps = flat_nonzero(there == 0) if len(there) and there.amin() == 0 else row.new_empty(0, dtype=torch.int64)
        places = row.index_select(0, gaps).mul_(BLOCK_SIZE)
        places += self.ones_below.index_select(0, below.index_select(0, gaps))
        return self._numbers(row, bits, below), gaps, places

    def _rows(self, neighbours: Tensor, tile: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        row = neighbours.view(-1).index_select(0, (step & 7).add_(tile)).mul_(64 * self.planes).add_(step >> 10)
        return row, self.rows.index_select(0, row).int(), (step >> 3).bitwise_and_(127)

    def _numbers(self, row: Tensor, bits: Tensor, below: Tensor) -> Tensor:
        ones = self.ones_below.index_select(0, below.bitwise_and_(bits))
        return ones.add_(bits.bitwise_right_shift_(8)).add_(self.first.index_select(0, row.bitwise_right_shift_(3)))
