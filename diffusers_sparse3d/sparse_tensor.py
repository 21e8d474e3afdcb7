"""Features on sparse voxels, and the cache of everything that depends on the coordinates alone."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .checks import check_integer
from .ops.checks import check_at_least
from .ops.coordinates import (
    MAX_RESOLUTION,
    MAX_SAMPLES,
    Partition,
    check_coords,
    check_voxel_rows,
    cumulative,
    downsample_coords,
    invert_permutation,
    neighbour_map,
    partition_coords,
    subdivide_coords,
    subdivide_neighbour_map,
)


Result = TypeVar("Result")


def _made(make: Callable[[], Result]) -> Result:
    """The result of `make()`, also for trainings: tensors of inference mode could not be saved for gradients."""
    if not torch.is_inference_mode_enabled():
        return make()
    with torch.inference_mode(False), torch.no_grad():
        return make()


def _version_of(coords: Tensor) -> int | None:
    """A number that changes with each change of a tensor in place; None where PyTorch counts none."""
    return None if torch.compiler.is_compiling() or coords.is_inference() else coords._version


def _for_trainings(coords: Tensor) -> Tensor:
    """The tensor, or a copy of one of inference mode: neither it nor a view of it could be saved for gradients."""
    if torch.compiler.is_compiling() or not coords.is_inference():
        return coords
    return _made(coords.clone)


class CoordinateCache:
    """
    Neighbour maps, partitions and derived grids of one set of voxels, each computed at its first use.

    Args:
        coords: `[N, 4]` int32 (batch, x, y, z), distinct, in any row order.
        batch_size: number of samples, counting empty ones; the largest batch index plus one if None.

    Raises:
        TypeError: if `coords` is no tensor, or `batch_size` no integer.
        ValueError: if it has another shape or no integers, or batch indices from 65,536 on (looked at without
            `batch_size` alone).
    """

    def __init__(self, coords: Tensor, batch_size: int | None = None):
        check_voxel_rows(coords)
        self.coords = _for_trainings(coords)
        self._version = _version_of(coords)
        if batch_size is None:
            lowest, highest = torch.stack(torch.aminmax(coords[:, 0])).tolist() if coords.shape[0] else (0, -1)
            if lowest < 0:
                raise ValueError(f"`coords` must have batch indices of at least 0, got {lowest}")
            batch_size = highest + 1
            if batch_size > MAX_SAMPLES:
                raise ValueError(f"`coords` must have batch indices below {MAX_SAMPLES}, got {batch_size - 1}")
        else:
            check_at_least(0, batch_size=batch_size)
        self.batch_size = batch_size
        self._parent: CoordinateCache | None = None
        self._seqlens: Tensor | None = None
        self._cu_seqlens: Tensor | None = None
        self._batch_partition: Partition | None = None
        self._partitions: dict[tuple[int, int], Partition] = {}
        self._neighbour_map: Tensor | None = None
        self._downsampled: dict[int, tuple[CoordinateCache, Tensor]] = {}
        # A weak reference, because the subdivided cache refers to this one: a cycle would delay the release of memory.
        self._subdivided: weakref.ref[CoordinateCache] | None = None
        self._kept_subdivided: CoordinateCache | None = None
        self._derived: dict[Hashable, Any] = {}

    @classmethod
    def of(cls, coords: Tensor) -> CoordinateCache:
        """
        The cache of voxels that are given without one, checked. It is kept as long as the tensor lives and is not
        changed: layers of other packages hand their coordinates from one to the next, and no cache.

        Raises:
            ValueError: if `coords` is no valid set of voxels.
        """
        version = _version_of(coords)
        kept_version, kept = _kept_caches.get(coords, (None, None))
        # Without versions, as of tensors of inference mode, the rows themselves tell, for which a GPU is waited for.
        if kept is not None and (torch.equal(kept.coords, coords) if version is None else kept_version == version):
            return kept
        batch_size = check_coords(coords)
        # Of an alias: a cache that refers to the tensor would keep it alive, and with it itself.
        cache = cls(coords.detach(), batch_size)
        _kept_caches[coords] = version, cache
        return cache

    @property
    def is_stale(self) -> bool:
        """Whether the coordinates were changed in place after the cache was made; unknown, and so False, if traced."""
        version = _version_of(self.coords)
        return None not in (version, self._version) and version != self._version

    @property
    def seqlens(self) -> Tensor:
        """The number of voxels of each sample, `[batch_size]` int64."""
        if self._seqlens is None:
            self._seqlens = _made(lambda: torch.bincount(self.coords[:, 0], minlength=self.batch_size))
        return self._seqlens

    @property
    def cu_seqlens(self) -> Tensor:
        """The first row of each sample once rows are grouped by sample, and N: `[batch_size + 1]` int32."""
        if self._cu_seqlens is None:
            self._cu_seqlens = _made(lambda: cumulative(self.seqlens))
        return self._cu_seqlens

    def batch_partition(self) -> Partition:
        """The rows grouped by sample, in their present order: one block for each sample, empty ones included."""
        if self._batch_partition is None:
            self._batch_partition = _made(self._group_by_sample)
        return self._batch_partition

    def _group_by_sample(self) -> Partition:
        batch = self.coords[:, 0].long()
        order = torch.argsort(batch, stable=True)
        samples = torch.arange(self.batch_size + 1, dtype=torch.int32, device=batch.device)
        in_order, longest = True, 0
        if self.batch_size:
            # One wait for both numbers.
            falls = (batch[1:] < batch[:-1]).any()
            falls, longest = torch.stack([falls.to(self.seqlens.dtype), self.seqlens.max()]).tolist()
            in_order = not falls
        return Partition(
            order=order,
            inverse=invert_permutation(order),
            cu_seqlens=self.cu_seqlens,
            max_seqlen=longest,
            coords=torch.nn.functional.pad(samples[:-1, None], (0, 3)),
            block_index=batch,
            batch_cu_blocks=samples,
            in_order=in_order,
        )

    def partition(self, block_size: int, shift: int = 0) -> Partition:
        """The rows grouped by sample and by (xyz + shift) // block_size, see `ops.coordinates.partition_coords`."""
        if (block_size, shift) not in self._partitions:
            check_at_least(1, block_size=block_size)
            check_at_least(0, shift=shift)
            self._partitions[block_size, shift] = _made(
                lambda: partition_coords(self.coords, block_size, shift, self.batch_size)
            )
        return self._partitions[block_size, shift]

    def neighbour_map(self) -> Tensor:
        """The rows `[27, N]` int32 of the 3x3x3 neighbours, N where missing: see `ops.coordinates.neighbour_map`."""
        if self._neighbour_map is None:
            if (parent := self._parent) is not None:
                self._neighbour_map = _made(lambda: subdivide_neighbour_map(parent.neighbour_map()))
            else:
                self._neighbour_map = _made(lambda: neighbour_map(self.coords))
        return self._neighbour_map

    def downsample(self, factor: int) -> tuple[CoordinateCache, Tensor]:
        """
        The voxels of the grid that is `factor` times as coarse, in ascending (batch, x, y, z) order.

        Returns:
            The cache of the coarse voxels, and the coarse row of each row, `[N]` int64.
        """
        if factor not in self._downsampled:
            check_at_least(1, factor=factor)
            coords, parents = _made(lambda: downsample_coords(self.coords, factor))
            self._downsampled[factor] = CoordinateCache(coords, self.batch_size), parents
        return self._downsampled[factor]

    def subdivide(self, keep: bool = False) -> CoordinateCache:
        """The cache of the eight children of every voxel; child j of row i is row 8 i + j.

        It lasts as long as something else refers to it; with `keep`, as long as this one.
        """
        if self._kept_subdivided is not None:
            return self._kept_subdivided
        subdivided = self._subdivided() if self._subdivided is not None else None
        if subdivided is None:
            subdivided = CoordinateCache(_made(lambda: subdivide_coords(self.coords)), self.batch_size)
            subdivided._parent = self
            self._subdivided = weakref.ref(subdivided)
        if keep:
            # All that it needs its parent for. Without that reference there is no cycle.
            subdivided.neighbour_map()
            subdivided._parent = None
            self._kept_subdivided = subdivided
        return subdivided

    def derived(self, key: Hashable, make: Callable[[], Result]) -> Result:
        """
        The result of `make()`, computed at the first call with `key` and kept.

        Args:
            key: names the result; it must hold everything that the result depends on besides the coordinates.
            make: computes the result from the coordinates.
        """
        if key not in self._derived:
            self._derived[key] = _made(make)
        return self._derived[key]


# Beside the tensors, not in attributes of theirs, which would be pickled and copied with them.
_kept_caches: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


@dataclass(init=False)
class SparseTensor:
    """
    Features on sparse voxels. The samples of a batch share one row axis and are told apart by `coords[:, 0]`.

    Args:
        feats: `[N, C]` features.
        coords: `[N, 4]` int32 (batch, x, y, z), distinct rows in any order.
        cache: the cache of what depends on the coordinates alone, shared by all tensors with the same coordinates; a
            new one if None.

    Raises:
        TypeError: if one of them has another type.
        ValueError: if the numbers of rows of `feats`, `coords` and `cache` do not match. Values are checked by
            `validate`.
    """

    feats: Tensor
    coords: Tensor
    cache: CoordinateCache

    def __init__(self, feats: Tensor, coords: Tensor, cache: CoordinateCache | None = None):
        check_voxel_rows(coords)
        if not isinstance(feats, Tensor):
            raise TypeError(f"`feats` must be a tensor, got {type(feats).__name__}")
        if feats.ndim != 2 or feats.shape[0] != coords.shape[0]:
            raise ValueError(
                f"`feats` must have shape [{coords.shape[0]}, C], as `coords` has as many rows, "
                f"got {list(feats.shape)}."
            )
        self.feats = feats
        self.coords = coords
        if cache is None:
            cache = CoordinateCache(coords)
        elif not isinstance(cache, CoordinateCache):
            raise TypeError(f"`cache` must be a CoordinateCache, got {type(cache).__name__}")
        elif cache.coords.shape[0] != coords.shape[0]:
            rows = coords.shape[0], cache.coords.shape[0]
            raise ValueError("`cache` must be that of the {} rows of `coords`, got one of {}".format(*rows))
        self.cache = cache

    @property
    def batch_size(self) -> int:
        """The number of samples of the batch, empty ones included."""
        return self.cache.batch_size

    @property
    def seqlens(self) -> Tensor:
        """The number of voxels of each sample, `[batch_size]` int64."""
        return self.cache.seqlens

    @property
    def cu_seqlens(self) -> Tensor:
        """The first row of each sample once rows are grouped by sample, and N: `[batch_size + 1]` int32."""
        return self.cache.cu_seqlens

    def replace(self, feats: Tensor) -> SparseTensor:
        """A tensor with other features `[N, C']` on the same voxels, and the same cache."""
        return SparseTensor(feats, self.coords, self.cache)

    def to(self, *args: Any, **kwargs: Any) -> SparseTensor:
        """
        A tensor on another device or with features of another dtype; the arguments are those of `torch.Tensor.to`.

        The cache is kept unless the device changes.
        """
        feats = self.feats.to(*args, **kwargs)
        if feats.device == self.coords.device:
            return self.replace(feats)
        coords = self.coords.to(feats.device)
        return SparseTensor(feats, coords, CoordinateCache(coords, self.batch_size))

    def validate(self, resolution: int | None = None) -> SparseTensor:
        """
        Checks the values of `feats` and `coords`, and returns the tensor itself.

        Args:
            resolution: exclusive upper bound of x, y and z, from 1; 2048 if None.

        Raises:
            ValueError: if `coords` is not int32, out of range or has duplicates, or `feats` has NaN or infinity.
        """
        if resolution is not None:
            resolution = check_integer("resolution", resolution, 1, MAX_RESOLUTION)
        check_coords(self.coords, resolution)
        if not torch.isfinite(self.feats).all():
            raise ValueError("`feats` must be finite.")
        return self
