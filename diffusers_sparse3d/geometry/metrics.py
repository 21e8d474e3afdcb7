"""
Metrics of the difference between a mesh and a reference mesh.

Metrics are in the units of the meshes (model space: the cube [-1, 1]^3) and are taken at points drawn uniformly by
area, with a seed. By default the distance of a point to a mesh is that to its surface (exact, by libigl), so that two
equal meshes are at distance 0 whatever their size. With `point_to_point=True` it is the distance to the nearest sample
of the other mesh (by a k-d tree), as in many publications. With 100,000 samples on a mesh that fills the cube, the
smallest value of that distance is about 0.005, which is too high for thresholds of 0.01.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import trimesh

from ..checks import check_integer, check_packages, check_positive
from .distance import SurfaceDistance
from .mesh import fit_to_model_cube, normalize_mesh
from .sdf.outer_surface import OuterSurface


if TYPE_CHECKING:
    from typing_extensions import Unpack


NUM_SAMPLES = 100_000
# A few GB of points and distances.
MOST_SAMPLES = 10_000_000
ALIGNMENT_YAWS = 24
ALIGNMENT_SAMPLES = 5_000


class ComparisonOptions(TypedDict, total=False):
    """The optional arguments of [`compare_surfaces`], where they are explained."""

    num_samples: int
    seed: int
    point_to_point: bool
    outer_resolution: int | None


@dataclass
class SurfaceComparison:
    """
    Distances and normal agreement between two surfaces, in both directions.

    Attributes:
        prediction_distance: `[n]`, the distances of samples of the prediction to the reference.
        reference_distance: `[m]`, the distances of samples of the reference to the prediction.
        prediction_cosine: `[n]`, |cos| of the angle between the normals at a sample of the prediction and at its
            closest point on the reference.
        reference_cosine: `[m]`, the same for samples of the reference and their closest points on the prediction.
    """

    prediction_distance: np.ndarray
    reference_distance: np.ndarray
    prediction_cosine: np.ndarray
    reference_cosine: np.ndarray

    def chamfer_l1(self) -> float:
        """The L1 Chamfer distance: the mean of the two mean distances."""
        return float((self.prediction_distance.mean() + self.reference_distance.mean()) / 2)

    def chamfer_l2(self) -> float:
        """The squared L2 Chamfer distance: the sum of the two mean squared distances."""
        return float((self.prediction_distance**2).mean() + (self.reference_distance**2).mean())

    def f1(self, threshold: float) -> float:
        """
        The F1 score: the harmonic mean of precision and recall, the shares of samples of the prediction and of the
        reference that are nearer than `threshold` to the other surface.
        """
        precision = (self.prediction_distance < threshold).mean()
        recall = (self.reference_distance < threshold).mean()
        return float(2 * precision * recall / max(precision + recall, np.finfo(float).tiny))

    def normal_consistency(self) -> float:
        """The mean of the two mean absolute cosines; 1 if all normals agree up to orientation."""
        return float((self.prediction_cosine.mean() + self.reference_cosine.mean()) / 2)


def _sample(mesh: trimesh.Trimesh, num_samples: int, seed: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Points `[n, 3]` drawn uniformly by area, and the faces `[n]` they lie on; errors call the mesh `name`."""
    _check_is_mesh(name, mesh)
    if len(mesh.faces) == 0 or not mesh.area > 0:
        raise ValueError(f"`{name}` must have a surface, got one of {len(mesh.faces)} faces without area.")
    points, faces = trimesh.sample.sample_surface(mesh, num_samples, seed=seed)
    return np.asarray(points), np.asarray(faces)


def _with_area(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    """The mesh without the faces that have no area: a point may be nearest to one, and it has no normal."""
    proper = mesh.area_faces > 0
    return mesh if proper.all() else trimesh.Trimesh(mesh.vertices, mesh.faces[proper], process=False)


def _check_sampling(num_samples: int, seed: int) -> tuple[int, int]:
    """The number of samples and the seed, checked; both enter sums, which an integer of NumPy would overflow."""
    return check_integer("num_samples", num_samples, 1, MOST_SAMPLES), check_integer("seed", seed, 0)


def _check_is_mesh(name: str, mesh: trimesh.Trimesh) -> None:
    """Raise a TypeError that names the argument unless it is a Trimesh."""
    if not isinstance(mesh, trimesh.Trimesh):
        raise TypeError(f"`{name}` must be a trimesh.Trimesh, got {type(mesh).__name__}")


def _check_thresholds(thresholds: Sequence[float]) -> None:
    """Raise a ValueError that names the argument unless it holds distances."""
    if not isinstance(thresholds, Sequence) or isinstance(thresholds, str):
        raise ValueError(f"`thresholds` must be a list of distances, got {thresholds!r:.100}")
    for threshold in thresholds:
        check_positive("thresholds", threshold)


def _normals(mesh: trimesh.Trimesh, faces: np.ndarray) -> np.ndarray:
    """The unit normals `[n, 3]` of the faces with the numbers `[n]`; zero for faces without area."""
    corners = np.asarray(mesh.vertices)[np.asarray(mesh.faces)[faces]]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    return normals / np.linalg.norm(normals, axis=1, keepdims=True).clip(np.finfo(float).tiny)


def _cosines(mesh: trimesh.Trimesh, faces: np.ndarray, other: trimesh.Trimesh, others: np.ndarray) -> np.ndarray:
    """|cos| `[n]` of the angles between the normals of faces `[n]` of one mesh and of another one."""
    cosines: np.ndarray = np.abs((_normals(mesh, faces) * _normals(other, others)).sum(axis=1))
    return cosines


def compare_surfaces(
    prediction: trimesh.Trimesh,
    reference: trimesh.Trimesh,
    num_samples: int = NUM_SAMPLES,
    seed: int = 0,
    point_to_point: bool = False,
    outer_resolution: int | None = None,
) -> SurfaceComparison:
    """
    Distances and normal agreement at samples of two surfaces, from which the metrics of this module are computed.

    Args:
        prediction: the mesh to judge.
        reference: the mesh to compare with, in the same space.
        num_samples: samples per mesh.
        seed: seed of the sampling.
        point_to_point: whether to measure to the nearest sample of the other mesh instead of its surface.
        outer_resolution: if given, only the outer surface of the reference counts (see [`OuterSurface`]), found on a
            grid of this many samples per axis. It is meant for references with faces inside a solid.

    Raises:
        TypeError: if `prediction` or `reference` is no Trimesh.
        ValueError: if one of them has no surface, or another argument is out of range.
    """
    num_samples, seed = _check_sampling(num_samples, seed)
    _check_is_mesh("prediction", prediction)
    _check_is_mesh("reference", reference)
    prediction, reference = _with_area(prediction), _with_area(reference)
    points, faces = _sample(prediction, num_samples, seed, "prediction")
    if outer_resolution is None:
        target, target_faces = _sample(reference, num_samples, seed + 1, "reference")
    else:
        # Four times as many are drawn, because samples inside the solid are rejected.
        target, target_faces = _sample(reference, 4 * num_samples, seed + 1, "reference")
        outer = OuterSurface(reference, outer_resolution).contains(target)
        target, target_faces = target[outer][:num_samples], target_faces[outer]
        visible, target_faces = np.unique(target_faces, return_inverse=True)
        reference = trimesh.Trimesh(reference.vertices, reference.faces[visible], process=False)
        target_faces = target_faces[:num_samples]
        if len(target) == 0:
            raise ValueError("`reference` must have an outer surface, but no sample of it is reached from outside.")

    if point_to_point:
        from scipy.spatial import cKDTree

        distance, nearest = cKDTree(target).query(points)
        nearest = target_faces[nearest]
        target_distance, target_nearest = cKDTree(points).query(target)
        target_nearest = faces[target_nearest]
    else:
        distance, nearest, _ = SurfaceDistance(reference.vertices, reference.faces).closest(points)
        target_distance, target_nearest, _ = SurfaceDistance(prediction.vertices, prediction.faces).closest(target)
    return SurfaceComparison(
        prediction_distance=distance,
        reference_distance=target_distance,
        prediction_cosine=_cosines(prediction, faces, reference, nearest),
        reference_cosine=_cosines(reference, target_faces, prediction, target_nearest),
    )


def chamfer_distance(
    prediction: trimesh.Trimesh,
    reference: trimesh.Trimesh,
    squared: bool = False,
    **options: Unpack[ComparisonOptions],
) -> float:
    """
    The Chamfer distance between two meshes.

    Args:
        prediction, reference, options: see [`compare_surfaces`].
        squared: if False, the L1 distance: the mean of the mean distances from prediction to reference and from
            reference to prediction. If True, the sum of the two mean squared distances.

    Raises:
        TypeError: if `prediction` or `reference` is no Trimesh.
        ValueError: if one of them has no surface, or another argument is out of range.
    """
    comparison = compare_surfaces(prediction, reference, **options)
    return comparison.chamfer_l2() if squared else comparison.chamfer_l1()


def f1_score(
    prediction: trimesh.Trimesh,
    reference: trimesh.Trimesh,
    thresholds: Sequence[float] = (0.01, 0.05),
    **options: Unpack[ComparisonOptions],
) -> dict[float, float]:
    """
    The F1 score for each threshold: the harmonic mean of precision and recall.

    Precision is the share of samples of the prediction nearer than the threshold to the reference, recall the share of
    samples of the reference nearer than it to the prediction.

    Args:
        prediction, reference, options: see [`compare_surfaces`].
        thresholds: distances in the units of the meshes.

    Raises:
        TypeError: if `prediction` or `reference` is no Trimesh.
        ValueError: if one of them has no surface, or another argument is out of range.
    """
    _check_thresholds(thresholds)
    comparison = compare_surfaces(prediction, reference, **options)
    return {threshold: comparison.f1(threshold) for threshold in thresholds}


def normal_consistency(
    prediction: trimesh.Trimesh, reference: trimesh.Trimesh, **options: Unpack[ComparisonOptions]
) -> float:
    """
    The mean |cos| of the angle between the normals at a sample and at its closest point on the other surface, averaged
    over both directions. The orientation of faces does not matter.

    Args:
        prediction, reference, options: see [`compare_surfaces`].

    Raises:
        TypeError: if `prediction` or `reference` is no Trimesh.
        ValueError: if one of them has no surface, or another argument is out of range.
    """
    return compare_surfaces(prediction, reference, **options).normal_consistency()


def volume_iou(
    prediction: trimesh.Trimesh, reference: trimesh.Trimesh, num_samples: int = NUM_SAMPLES, seed: int = 0
) -> float:
    """
    The volume of the intersection of two solids divided by the volume of their union.

    The volumes are estimated from points drawn uniformly in the bounding box of both meshes. A point is inside if the
    absolute value of the generalised winding number exceeds a half.

    Args:
        prediction, reference: watertight meshes in the same space.
        num_samples: number of points.
        seed: seed of the sampling.

    Raises:
        TypeError: if `prediction` or `reference` is no Trimesh.
        ValueError: if one of them is not watertight, or another argument is out of range.
        ImportError: if libigl is missing.
    """
    num_samples, seed = _check_sampling(num_samples, seed)
    for name, mesh in (("prediction", prediction), ("reference", reference)):
        _check_is_mesh(name, mesh)
        if not mesh.is_watertight:
            raise ValueError(f"`{name}` must be watertight.")
    check_packages("the volume IoU", "igl")
    import igl

    low = np.minimum(prediction.bounds[0], reference.bounds[0])
    high = np.maximum(prediction.bounds[1], reference.bounds[1])
    points = np.random.default_rng(seed).uniform(low, high, size=(num_samples, 3))
    inside = [
        # The absolute value also handles a watertight mesh that is turned inside out.
        np.abs(igl.fast_winding_number(np.array(mesh.vertices), np.array(mesh.faces, dtype=np.int64), points)) > 0.5
        for mesh in (prediction, reference)
    ]
    union = (inside[0] | inside[1]).sum()
    return float((inside[0] & inside[1]).sum() / max(union, 1))


def evaluate_mesh(
    prediction: trimesh.Trimesh,
    reference: trimesh.Trimesh,
    thresholds: Sequence[float] = (0.01, 0.02, 0.05),
    **options: Unpack[ComparisonOptions],
) -> dict[str, float | bool | None]:
    """
    All metrics of this module, on the same samples.

    Args:
        prediction, reference, options: see [`compare_surfaces`].
        thresholds: distances for the F1 scores, in the units of the meshes.

    Returns:
        `chamfer_l1`, `chamfer_l2` (squared), `f1_<threshold>` for each threshold, `normal_consistency`, `volume_iou`
        (None unless both meshes are watertight) and `watertight` (whether the prediction is).

    Raises:
        TypeError: if `prediction` or `reference` is no Trimesh.
        ValueError: if one of them has no surface, or another argument is out of range.
    """
    _check_thresholds(thresholds)
    comparison = compare_surfaces(prediction, reference, **options)
    watertight = bool(prediction.is_watertight)
    return {
        "chamfer_l1": comparison.chamfer_l1(),
        "chamfer_l2": comparison.chamfer_l2(),
        **{f"f1_{threshold:g}": comparison.f1(threshold) for threshold in thresholds},
        "normal_consistency": comparison.normal_consistency(),
        "volume_iou": volume_iou(prediction, reference) if watertight and reference.is_watertight else None,
        "watertight": watertight,
    }


def align_meshes(
    prediction: trimesh.Trimesh, reference: trimesh.Trimesh, seed: int = 0
) -> tuple[trimesh.Trimesh, trimesh.Trimesh, float]:
    """
    A generated mesh and its reference in one frame, for metrics of generation.

    The prediction is turned about the vertical axis y by each of 24 angles, 15 degrees apart, and normalised (bounding
    box centred, longest side 1.9). The angle with the smallest L1 Chamfer distance to the normalised reference is
    chosen, measured point to point on 5,000 samples. There is no finer search, and no other change of scale, tilt or
    reflection.

    Args:
        prediction: the generated mesh.
        reference: the mesh to compare with.
        seed: seed of the sampling.

    Returns:
        The aligned prediction, the normalised reference, and the yaw in degrees.

    Raises:
        TypeError: if `prediction` or `reference` is no Trimesh.
        ValueError: if one of them has no surface, or another argument is out of range.
    """
    from scipy.spatial import cKDTree

    seed = check_integer("seed", seed, 0)
    _check_is_mesh("prediction", prediction)
    _check_is_mesh("reference", reference)
    reference, _, _ = normalize_mesh(reference)
    target, _ = _sample(reference, ALIGNMENT_SAMPLES, seed + 1, "reference")
    points, _ = _sample(prediction, ALIGNMENT_SAMPLES, seed, "prediction")
    vertices, tree = np.asarray(prediction.vertices), cKDTree(target)
    candidates = []
    for yaw in np.arange(ALIGNMENT_YAWS) * 360 / ALIGNMENT_YAWS:
        rotation = trimesh.transformations.rotation_matrix(np.radians(yaw), [0, 1, 0])[:3, :3]
        center, scale = fit_to_model_cube(vertices @ rotation.T)
        moved = (points @ rotation.T - center) * scale
        distance = tree.query(moved)[0].mean() + cKDTree(moved).query(target)[0].mean()
        candidates.append((float(distance), float(yaw), rotation))
    _, best_yaw, rotation = min(candidates, key=lambda candidate: candidate[0])
    aligned = prediction.copy()
    aligned.vertices = vertices @ rotation.T
    return normalize_mesh(aligned)[0], reference, best_yaw
