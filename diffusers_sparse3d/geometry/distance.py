"""
Exact distance to a mesh, on the CPU by the AABB tree of libigl.

libigl (MPL-2.0) has wheels on PyPI. A query takes about a microsecond on one core; queries run on several threads,
limited by libigl's own environment variable `IGL_NUM_THREADS`.
"""

from functools import cached_property
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..checks import check_packages
from .rasterized_distance import BandSamples, band_distance


# Points in one call of libigl.
QUERY_CHUNK = 1 << 19

CELL_CORNERS = np.stack(np.meshgrid([0, 1], [0, 1], [0, 1], indexing="ij"), axis=-1).reshape(8, 3).astype(np.int32)


class SurfaceDistance:
    """
    Distances and closest points to triangles or segments.

    Args:
        vertices: `[V, 3]`.
        elements: `[E, 3]` triangles, or `[E, 2]` segments.
        device: where `samples_within` computes; on a GPU it does not use libigl.

    Raises:
        ImportError: if libigl is missing.
    """

    def __init__(self, vertices: np.ndarray, elements: np.ndarray, device: torch.device | str = "cpu"):
        self.vertices = np.ascontiguousarray(vertices, dtype=np.float64)
        self.elements = np.ascontiguousarray(elements, dtype=np.int64)
        self.device = torch.device(device)

    @cached_property
    def tree(self) -> Any:  # libigl has no type stubs.
        """The AABB tree of libigl, built at its first use."""
        check_packages("the distance to a mesh", "igl")
        import igl

        tree = igl.AABB()
        tree.init(self.vertices, self.elements)
        return tree

    def closest(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Distances `[n]`, nearest elements `[n]` and closest points `[n, 3]` float64 of `points [n, 3]`."""
        squared, element, closest = self.tree.squared_distance(self.vertices, self.elements, points)
        return np.sqrt(squared), element.reshape(-1), closest

    def samples_within(self, resolution: int, reach: float, progress: tqdm | None = None) -> BandSamples:
        """
        The grid samples nearer than `reach`, found by descending an octree, on `device`.

        A cell of the octree is dropped if the distance at its centre exceeds its radius plus `reach`. As the distance
        is 1-Lipschitz, no sample is lost.

        Args:
            resolution: samples per axis; sample i lies at `-1 + 2 i / (resolution - 1)`.
            reach: distance in model space.
            progress: a bar that counts the queries.
        """
        if self.device.type != "cpu":
            return band_distance(self.vertices, self.elements, resolution, reach, self.device)
        spacing = 2 / (resolution - 1)
        size = 1 << (resolution - 1).bit_length()
        cells = np.zeros((1, 3), dtype=np.int32)
        while True:
            size //= 2
            radius = (size - 1) / 2 * spacing * 3**0.5
            if progress is not None:
                progress.total = (progress.total or 0) + 8 * len(cells)
            # For each chunk: the near children, their distances and elements, and the grid cells of the closest
            # points.
            kept: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
            for start in range(0, len(cells), QUERY_CHUNK // 8):
                parents = cells[start : start + QUERY_CHUNK // 8]
                children = (parents[:, None] * 2 + CELL_CORNERS).reshape(-1, 3)
                children = children[(children * size < resolution).all(axis=1)]
                distance, element, closest = self.closest((children * size + (size - 1) / 2) * spacing - 1)
                near = distance < reach + radius
                cell = np.floor((closest[near] + 1) / spacing).clip(0, resolution - 2).astype(np.int32)
                kept.append((children[near], distance[near], element[near].astype(np.int32), cell))
                if progress is not None:
                    progress.update(8 * len(parents))
            results = [np.concatenate(parts) for parts in zip(*kept)]
            cells = results[0]
            if size == 1:
                return BandSamples(*(torch.from_numpy(result) for result in results))
