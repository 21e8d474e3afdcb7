"""
Planes of bits, and operations on them.

Of almost every sample marching cubes needs two facts only: whether it is known, and whether it is inside. They are
    kept
as bits, so that one operation on a word handles 64 samples.

- Tile: a block of 8^3 samples of the grid that has samples.
- Plane of bits: one bit for each sample of every tile, `[M, 8]` int64.
- Word: 64 bits of a plane, the samples of a tile that share x.
- Row: one byte of a word, the eight samples that share x and y; bit z is the sample at z.
- Place of a sample: 512 * tile + 64 x + 8 y + z with x, y, z counted from the tile's first sample. The place of a bit
  in a plane is the place of its sample.
- Pass: the tiles that one call of a vectorised operation handles.
"""

import contextlib
import math
import mmap

import numpy as np
import torch
from torch import Tensor


BLOCK_SIZE = 8
TILE_SAMPLES = BLOCK_SIZE**3
# Tiles in one pass: few enough for their temporary tensors to stay in the cache of a CPU, or enough to occupy a GPU.
CPU_TILE_CHUNK, GPU_TILE_CHUNK = 1 << 9, 1 << 15
# A pass over bits alone has this many times as many tiles; a pass over the caller's rows has this many times as many
# samples as another pass has tiles.
BIT_PASS_FACTOR, ROW_PASS_FACTOR = 2, 64

# The state of a sample in one byte: bit 0 is set for a sample with a value, bit 1 for one inside. 0 is no sample.
OUTSIDE, INSIDE = 1, 3

# In the entries of `step_table` the lowest 3 bits give the tile, the next 6 the shift, and the others the half word.
_WORD_SHIFT = 9
# The lowest bit of each byte of a word, which belongs to the sample at z = 0 of each row.
LOWEST_BITS = 0x0101010101010101


def tile_chunk(device: torch.device) -> int:
    """The number of tiles in one pass on a device."""
    return CPU_TILE_CHUNK if device.type == "cpu" else GPU_TILE_CHUNK


def allocate(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """
    A tensor `[count]` of zeros that, on Linux, has an anonymous memory mapping of its own.

    A mapping returns to the system as soon as it is freed, whereas the C library may keep freed memory in pieces that
    no larger tensor fits into. Large pages make the first access to fresh memory several times faster.
    """
    if device.type != "cpu" or count == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(count, dtype=dtype, device=device)
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # A Linux kernel may have been built without large pages.
    with contextlib.suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)


def with_zeros(rows: Tensor, count: int) -> Tensor:
    """A copy of `rows [n, ...]` with `count` rows of zeros after them, in memory from `allocate`."""
    shape = (len(rows) + count, *rows.shape[1:])
    longer = allocate(math.prod(shape), rows.dtype, rows.device).view(shape)
    longer[: len(rows)] = rows
    return longer


def offsets(span: range, device: torch.device) -> Tensor:
    """All triples of the integers in `span`, `[len(span)^3, 3]` int32, z fastest."""
    axis = torch.arange(span.start, span.stop, device=device, dtype=torch.int32)
    return torch.cartesian_prod(axis, axis, axis)


def flat_nonzero(flags: Tensor) -> Tensor:
    """The indices `[n]` int64 of the elements that are not zero in the flattened `flags`, bool or uint8."""
    if flags.device.type == "cpu":
        # On bool, NumPy's `flatnonzero` is several times as fast as PyTorch's `nonzero`.
        array = flags.numpy()
        return torch.from_numpy(np.flatnonzero(array if array.dtype == bool else array != 0))
    return flags.flatten().nonzero()[:, 0]


def pack_bits(flags: Tensor) -> Tensor:
    """Words `[n / 64]` int64 with one bit for each element of contiguous `flags` uint8, set where it is not zero."""
    if flags.device.type == "cpu":
        return torch.from_numpy(np.packbits(flags.flatten().numpy(), bitorder="little")).view(torch.int64)
    # The multiplication moves bit 0 of byte i to bit 56 + i.
    rows = (flags.flatten() != 0).view(torch.int64).mul(0x0102040810204080).bitwise_right_shift_(56)
    return rows.to(torch.uint8).view(torch.int64)


def unpack_bits(rows: Tensor) -> Tensor:
    """The bits of `rows [n]` uint8, lowest first, as `[8 n]` bool."""
    if rows.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(rows.numpy(), bitorder="little")).view(torch.bool)
    return (rows[:, None] >> torch.arange(8, dtype=torch.uint8, device=rows.device) & 1).view(torch.bool).flatten()


def rows_with_bits(words: Tensor) -> tuple[Tensor, Tensor]:
    """
    The rows that have bits set, and the bits that are set in them.

    Args:
        words: int64, contiguous, any shape.

    Returns:
        - The rows `[n]` int32, as 8 * word + byte.
        - The bits `[k]` int64, as 8 * index in the rows returned + bit.
    """
    rows = words.flatten().view(torch.uint8)
    found = flat_nonzero(rows)
    return found.int(), flat_nonzero(unpack_bits(rows.index_select(0, found)))


def places_in_rows(rows: Tensor, bits: Tensor) -> Tensor:
    """The places `[k]` int32 of `bits [k]` in `rows [n]`, both as `rows_with_bits` returns them."""
    bits = bits.int()
    return rows.index_select(0, bits >> 3).mul_(8).add_(bits.bitwise_and_(7))


def bit_places(words: Tensor) -> Tensor:
    """The places `[n]` int32, 64 * word + bit, of the bits set in contiguous `words` int64, ascending."""
    # Few rows have any bit set. Unpacking these alone takes half the time.
    return places_in_rows(*rows_with_bits(words))


def corner_planes(plane: Tensor, around: Tensor) -> list[Tensor]:
    """
    A plane of bits shifted to the corners of the cells of some tiles.

    Bit (x, y, z) of word `(c >> 2) + x` of result `c & 3` is the bit of corner c of the cell at (x, y, z), which is
    the sample at (x + (c >> 2), y + (c >> 1 & 1), z + (c & 1)).

    Args:
        plane: `[M, 8]` int64, the plane of all tiles.
        around: `[m, 8]` int32, the tiles around the upper corner of each tile, see `TileIndex.neighbours`.

    Returns:
        Four planes `[m, 9]` int64.
    """
    first = plane[:, 0]

    def words(tile: int) -> Tensor:
        return torch.cat(
            [plane.index_select(0, around[:, tile]), first.index_select(0, around[:, tile + 4])[:, None]], dim=1
        )

    def step_z(word: Tensor, following: Tensor) -> Tensor:
        return (
            (word >> 1).bitwise_and_(0x7F * LOWEST_BITS).bitwise_or_((following & LOWEST_BITS).bitwise_left_shift_(7))
        )

    here, next_z, next_y, next_yz = (words(tile) for tile in range(4))
    along_z = step_z(here, next_z)
    planes = [here, along_z]
    for word, following in ((here, next_y), (along_z, step_z(next_y, next_yz))):
        planes.append((word >> 8).bitwise_and_((1 << 56) - 1).bitwise_or_(following << 56))
    return planes


def count_ones(rows: Tensor) -> Tensor:
    """The number of bits set in each of `rows [n]` uint8, `[n]` uint8."""
    if rows.device.type == "cpu" and hasattr(np, "bitwise_count"):
        ones = torch.empty_like(rows)
        np.bitwise_count(rows.numpy(), out=ones.numpy())
        return ones
    ones = rows - ((rows >> 1) & 0x55)
    ones = (ones & 0x33).add_((ones >> 2).bitwise_and_(0x33))
    return (ones >> 4).add_(ones).bitwise_and_(0x0F)


def ones_in_words(words: Tensor) -> Tensor:
    """The number of bits set in each of contiguous `words` int32, int32, flattened."""
    # The multiplication sums the four bytes in the highest one.
    return count_ones(words.flatten().view(torch.uint8)).view(torch.int32).mul_(0x01010101).bitwise_right_shift_(24)


def count_bits(plane: Tensor) -> Tensor:
    """The number of bits set in each tile of a `plane [M, 8]`, `[M]` int64."""
    return ones_in_words(plane.view(torch.int32)).view(len(plane), -1).sum(dim=1)


def transpose_bytes(words: Tensor) -> Tensor:
    """Words `[n]` int64, each transposed as an 8 x 8 matrix of bits: bit c of byte z is bit z of byte c of `words`."""
    for shift, mask in ((7, 0x00AA00AA00AA00AA), (14, 0x0000CCCC0000CCCC), (28, 0x00000000F0F0F0F0)):
        swapped = ((words >> shift) ^ words) & mask
        words = words ^ swapped ^ (swapped << shift)
    return words


def _stepped(steps: Tensor) -> tuple[Tensor, Tensor]:
    """
    The destinations of steps from every sample of a tile.

    Args:
        steps: `[k, 3]`, each component 0 or 1.

    Returns:
        - The tile of each destination, `[512, k]`, as its index in the rows of `TileIndex.neighbours`.
        - The position in that tile, `[512, k, 3]`.
    """
    position = offsets(range(BLOCK_SIZE), steps.device)[:, None] + steps
    tile = position >> 3
    return 4 * tile[..., 0] + 2 * tile[..., 1] + tile[..., 2], position & 7


def step_table(steps: Tensor, planes: list[int]) -> Tensor:
    """
    For every sample of a tile and every step: the tile, half word and bit of the sample that the step leads to.

    Args:
        steps: `[k, 3]`, each component 0 or 1.
        planes: for each step, which of the planes of a `RankedBits` the bit is in.

    Returns:
        `[512 * k]` int32, entries for `RankedBits.numbers`; that of step i from local place p is at k * p + i.
    """
    tile, place = _stepped(steps)
    bit = place[..., 0] << 6 | place[..., 1] << 3 | place[..., 2]
    word = (bit >> 5) + 16 * torch.tensor(planes, device=steps.device)
    return (word << _WORD_SHIFT | 32 - (bit & 31) << 3 | tile).flatten().int()


def row_step_table(steps: Tensor) -> Tensor:
    """
    For every row of a tile and every step: the tile and row that the step leads to.

    Args:
        steps: `[k, 3]`, x and y 0 or 1, z 0.

    Returns:
        `[k, 64]` int32: 8 * row of the destination + its tile, as an index in the rows of `TileIndex.neighbours`.
    """
    tile, place = _stepped(steps)
    row = place[..., 0] << 3 | place[..., 1]
    return (row << 3 | tile)[::BLOCK_SIZE].int().T.contiguous()


class RankedBits:
    """
    Numbers the bits that are set in one or more planes, in ascending order of tile, plane, x, y, z.

    Args:
        words: `[M, planes, 8]` int64; not copied.
        neighbours: `[M, 8]` int32, see `TileIndex.neighbours`.

    Attributes:
        words: `[M * planes * 16]` int32, the planes in half words.
        first: `[M * planes * 16 + 1]` int32, the number of bits set before each half word.
    """

    def __init__(self, words: Tensor, neighbours: Tensor):
        self._words_of_tile = 16 * words.shape[1]
        self.words = words.view(-1).view(torch.int32)
        self.first = allocate(len(self.words) + 1, torch.int32, words.device)
        chunk = 64 * tile_chunk(words.device)
        for part, count in zip(self.words.split(chunk), self.first[1:].split(chunk)):
            count.copy_(ones_in_words(part))
        self.first[1:].cumsum_(0)
        self._set_neighbours(neighbours)

    def __len__(self) -> int:
        """The number of bits that are set."""
        return int(self.first[-1])

    def _set_neighbours(self, neighbours: Tensor) -> None:
        self._first_words = neighbours.view(-1) * self._words_of_tile

    def add_tiles(self, neighbours: Tensor) -> None:
        """Appends tiles without bits; `neighbours [M, 8]` int32 are those of all tiles, old and new."""
        count = self._words_of_tile * len(neighbours) - len(self.words)
        self.words = with_zeros(self.words, count)
        self.first = torch.cat([self.first, self.first[-1:].expand(count)])
        self._set_neighbours(neighbours)

    def numbers(self, tile: Tensor, step: Tensor) -> Tensor:
        """
        The numbers of bits that are set, each given by a sample and a step from it.

        Args:
            tile: `[n]` int32, 8 times the tile of the sample.
            step: `[n]` int32, the entry of the `step_table` for the sample's local place and the step.

        Returns:
            `[n]` int32.
        """
        word, _, below = self._below(tile, step)
        return self._numbers(word, below)

    def numbers_and_gaps(self, tile: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        The numbers of bits, of which some may not be set; for a single plane.

        Args:
            tile, step: see `numbers`.

        Returns:
            - The numbers `[n]` int32; they are meaningless for bits that are not set.
            - The indices `[k]` int64 of the bits that are not set.
            - The places `[k]` int32 of these.
        """
        word, shift, below = self._below(tile, step)
        # Shifted left by one less, a word has the requested bit as its sign.
        signed = self.words.index_select(0, word).bitwise_left_shift_(shift - 1)
        # Usually every bit is set, which the maximum shows faster than a search for gaps.
        gaps = flat_nonzero(signed >= 0) if len(word) and signed.amax() >= 0 else word.new_empty(0, dtype=torch.int64)
        places = word.index_select(0, gaps).add_(1).mul_(32).sub_(shift.index_select(0, gaps))
        return self._numbers(word, below), gaps, places

    def _below(self, tile: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        Finds the half words of requested bits.

        Returns:
            The index in `words` `[n]`, the left shift that removes the requested bit and those above it `[n]`, and the
            half words shifted so, which keep the bits below `[n]`.
        """
        word = self._first_words.index_select(0, (step & 7).add_(tile)).add_(step >> _WORD_SHIFT)
        shift = (step >> 3).bitwise_and_(63)
        return word, shift, self.words.index_select(0, word).bitwise_left_shift_(shift)

    def _numbers(self, word: Tensor, below: Tensor) -> Tensor:
        """The numbers of bits: those set before their half words, plus those set below them in their half words."""
        return ones_in_words(below).add_(self.first.index_select(0, word))
