"""
Sparse samples as bits: what marching cubes needs to know of almost all samples is whether they are there, and inside.

A tile is a block of 8^3 samples. Of each, a plane of bits has eight words int64, one per x; a word has eight rows of
eight bits, one per y, a byte each; bit z of a row is the sample at z. A sample's place is 512 * tile + 64 x + 8 y + z.
"""

import contextlib
import math
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

# Where the word is in the entries of `step_table`, above six bits for the place in it, above three for the tile.
_WORD_SHIFT = 9
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


def with_zeros(rows: Tensor, count: int) -> Tensor:
    """A copy of `rows [n, ...]` with `count` rows of zeros after them, in memory of its own: see `allocate`."""
    shape = (len(rows) + count, *rows.shape[1:])
    longer = allocate(math.prod(shape), rows.dtype, rows.device).view(shape)
    longer[: len(rows)] = rows
    return longer


def offsets(span: range, device: torch.device) -> Tensor:
    """`[len(span)^3, 3]` int32, x slowest."""
    axis = torch.arange(span.start, span.stop, device=device, dtype=torch.int32)
    return torch.cartesian_prod(axis, axis, axis)


def flat_nonzero(flags: Tensor) -> Tensor:
    """The places `[n]` int64 of what is not zero in a flat view of `flags`, bool or uint8."""
    if flags.device.type == "cpu":
        # Four times as fast as PyTorch's, if of bool.
        array = flags.numpy()
        return torch.from_numpy(np.flatnonzero(array if array.dtype == bool else array != 0))
    return flags.flatten().nonzero()[:, 0]


def pack_bits(flags: Tensor) -> Tensor:
    """Words int64, a bit for each of contiguous `flags`, uint8: whether it is not zero."""
    if flags.device.type == "cpu":
        return torch.from_numpy(np.packbits(flags.flatten().numpy(), bitorder="little")).view(torch.int64)
    # The product moves bit 0 of byte i to bit 56 + i.
    rows = (flags.flatten() != 0).view(torch.int64).mul(0x0102040810204080).bitwise_right_shift_(56)
    return rows.to(torch.uint8).view(torch.int64)


def unpack_bits(rows: Tensor) -> Tensor:
    """`[8 n]` bool: the bits of `rows [n]` uint8."""
    if rows.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(rows.numpy(), bitorder="little")).view(torch.bool)
    return (rows[:, None] >> torch.arange(8, dtype=torch.uint8, device=rows.device) & 1).view(torch.bool).flatten()


def rows_with_bits(words: Tensor) -> tuple[Tensor, Tensor]:
    """
    The rows `[n]` int32 of contiguous `words` int64 in which bits are set, 8 * word + byte; and these bits, `[k]`
    int64: 8 * place in the rows found + bit.
    """
    rows = words.flatten().view(torch.uint8)
    found = flat_nonzero(rows)
    return found.int(), flat_nonzero(unpack_bits(rows.index_select(0, found)))


def places_in_rows(rows: Tensor, bits: Tensor) -> Tensor:
    """The places `[k]` int32 of `bits [k]` of `rows [n]`: see `rows_with_bits`."""
    bits = bits.int()
    return rows.index_select(0, bits >> 3).mul_(8).add_(bits.bitwise_and_(7))


def bit_places(words: Tensor) -> Tensor:
    """The places `[n]` int32 of the bits that are set in contiguous `words` int64, ascending: 64 * word + bit."""
    # Few rows have any: to look through the bits of these alone takes half the time.
    return places_in_rows(*rows_with_bits(words))


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


def count_ones(rows: Tensor) -> Tensor:
    """How many bits of each of `rows [n]` uint8 are set, uint8."""
    if rows.device.type == "cpu" and hasattr(np, "bitwise_count"):
        ones = torch.empty_like(rows)
        np.bitwise_count(rows.numpy(), out=ones.numpy())
        return ones
    ones = rows - ((rows >> 1) & 0x55)
    ones = (ones & 0x33).add_((ones >> 2).bitwise_and_(0x33))
    return (ones >> 4).add_(ones).bitwise_and_(0x0F)


def ones_in_words(words: Tensor) -> Tensor:
    """How many bits of each of contiguous `words` int32 are set, int32, flat."""
    # The product adds up the bytes in the highest one.
    return count_ones(words.flatten().view(torch.uint8)).view(torch.int32).mul_(0x01010101).bitwise_right_shift_(24)


def count_bits(plane: Tensor) -> Tensor:
    """How many bits of each tile of a `plane [M, 8]` are set, `[M]` int64."""
    return ones_in_words(plane.view(torch.int32)).view(len(plane), -1).sum(dim=1)


def transpose_bytes(words: Tensor) -> Tensor:
    """Words whose byte z has as bit c bit z of byte c."""
    for shift, mask in ((7, 0x00AA00AA00AA00AA), (14, 0x0000CCCC0000CCCC), (28, 0x00000000F0F0F0F0)):
        swapped = ((words >> shift) ^ words) & mask
        words = words ^ swapped ^ (swapped << shift)
    return words


def _stepped(steps: Tensor) -> tuple[Tensor, Tensor]:
    """Where steps `[k, 3]` from each sample of a tile lead: `[512, k]`, around which corner, and `[512, k, 3]`."""
    position = offsets(range(BLOCK_SIZE), steps.device)[:, None] + steps
    tile = position >> 3
    return 4 * tile[..., 0] + 2 * tile[..., 1] + tile[..., 2], position & 7


def step_table(steps: Tensor, planes: list[int]) -> Tensor:
    """
    How to reach the sample a step `[k, 3]`, each axis 0 or 1, away from each sample of a tile, and its bit in a plane
    of those that `RankedBits` holds; `[512 * k]` int32, for `RankedBits.numbers`.
    """
    tile, place = _stepped(steps)
    bit = place[..., 0] << 6 | place[..., 1] << 3 | place[..., 2]
    word = (bit >> 5) + 16 * torch.tensor(planes, device=steps.device)
    return (word << _WORD_SHIFT | 32 - (bit & 31) << 3 | tile).flatten().int()


def row_step_table(steps: Tensor) -> Tensor:
    """
    As `step_table`, for the rows of a tile and steps `[k, 3]` along x and y: `[k, 64]` int32, 8 * row there + tile.
    """
    tile, place = _stepped(steps)
    row = place[..., 0] << 3 | place[..., 1]
    return (row << 3 | tile)[::BLOCK_SIZE].int().T.contiguous()


class RankedBits:
    """
    Bits that are numbered, those that are set, in their order: tile, plane, x, y, z.

    Attributes:
        words: `[M * planes * 16]` int32, half a word of the planes each.
        first: `[M * planes * 16 + 1]` int32, how many come before each of them.
    """

    def __init__(self, words: Tensor, neighbours: Tensor):
        """From `words [M, planes, 8]`, not copied; `neighbours [M, 8]`: see `TileIndex.neighbours`."""
        self._words_of_tile = 16 * words.shape[1]
        self.words = words.view(-1).view(torch.int32)
        self.first = allocate(len(self.words) + 1, torch.int32, words.device)
        chunk = 64 * tile_chunk(words.device)
        for part, count in zip(self.words.split(chunk), self.first[1:].split(chunk)):
            count.copy_(ones_in_words(part))
        self.first[1:].cumsum_(0)
        self._set_neighbours(neighbours)

    def __len__(self) -> int:
        return int(self.first[-1])

    def _set_neighbours(self, neighbours: Tensor) -> None:
        self._first_words = neighbours.view(-1) * self._words_of_tile

    def add_tiles(self, neighbours: Tensor) -> None:
        """Appends tiles without bits; `neighbours [M, 8]` of all."""
        count = self._words_of_tile * len(neighbours) - len(self.words)
        self.words = with_zeros(self.words, count)
        self.first = torch.cat([self.first, self.first[-1:].expand(count)])
        self._set_neighbours(neighbours)

    def numbers(self, tile: Tensor, step: Tensor) -> Tensor:
        """
        The numbers `[n]` int32 of bits a step away from samples.

        Args:
            tile: `[n]` int32, 8 times the tile of each sample.
            step: `[n]` int32, from the `step_table` of these planes.
        """
        word, _, below = self._below(tile, step)
        return self._numbers(word, below)

    def numbers_and_gaps(self, tile: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        As `numbers`, of a single plane; the numbers where no bit is set count for nothing. Which ones these are
        `[k]` int64, and the places there, `[k]` int32.
        """
        word, shift, below = self._below(tile, step)
        # Shifted by one less, a word has the bit asked for as its sign.
        signed = self.words.index_select(0, word).bitwise_left_shift_(shift - 1)
        # Mostly there is none, which is found faster than which ones.
        gaps = flat_nonzero(signed >= 0) if len(word) and signed.amax() >= 0 else word.new_empty(0, dtype=torch.int64)
        places = word.index_select(0, gaps).add_(1).mul_(32).sub_(shift.index_select(0, gaps))
        return self._numbers(word, below), gaps, places

    def _below(self, tile: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where in `words` the bits asked for are, the shifts that leave those before each in its word, and these."""
        word = self._first_words.index_select(0, (step & 7).add_(tile)).add_(step >> _WORD_SHIFT)
        shift = (step >> 3).bitwise_and_(63)
        return word, shift, self.words.index_select(0, word).bitwise_left_shift_(shift)

    def _numbers(self, word: Tensor, below: Tensor) -> Tensor:
        return ones_in_words(below).add_(self.first.index_select(0, word))
