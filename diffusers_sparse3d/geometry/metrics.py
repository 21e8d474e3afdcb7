"""
How far a mesh is from a reference mesh.

Metrics are taken in the units of the meshes (model space: the cube [-1, 1]^3) at points drawn uniformly by area, with
a seed. The distance of a point to a mesh is, by default, to its surface (exact, by libigl), so two equal meshes are at
distance 0 however large they are. `point_to_point=True` takes the distance to the nearest sample of the other mesh
(by a k-d tree) as many publications do; with 100,000 samples on a mesh that fills the cube its floor is about 0.005,
too high for thresholds of 0.01.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import trimesh

from .distance import SurfaceDistance
from .mesh import fit_to_model_cube, normalize_mesh
from .outer_surface import OuterSurface


NUM_SAMPLES = 100_000
ALIGNMENT_YAWS = 24
ALIGNMENT_SAMPLES = 5_000


@dataclass
class SurfaceComparison:
    """
    Distances and normal agreement between two surfaces, in both directions.

    Attributes:
        prediction_distance: `[n]` distance of samples of the prediction to the reference.
        reference_distance: `[m]` distance of samples of the reference to the prediction.
        prediction_cosine: `[n]` |cos| of the angle between the normals at a sample of the prediction and at its
            closest point on the reference.
        reference_cosine: `[m]` the other way around.
    """

    prediction_distance: np.ndarray
    reference_distance: np.ndarray
    prediction_cosine: np.ndarray
    reference_cosine: np.ndarray

    def chamfer_l1(self) -> float:
        """Mean of the two mean distances."""
        return float((self.prediction_distance.mean() + self.reference_distance.mean()) / 2)

    def chamfer_l2(self) -> float:
        """Sum of the two mean squared distances."""
        return float((self.prediction_distance**2).mean() + (self.reference_distance**2).mean())

    def f1(self, threshold: float) -> float:
        """Harmonic mean of precision and recall, the shares of samples of the prediction and of the reference that are
        nearer than `threshold` to the other surface."""
        precision = (self.prediction_distance < threshold).mean()
        recall = (self.reference_distance < threshold).mean()
        return float(2 * precision * recall / max(precision + recall, np.finfo(float).tiny))

    def normal_consistency(self) -> float:
        """Mean of the two mean absolute cosines; 1 where all normals agree up to orientation."""
        return float((self.prediction_cosine.mean() + self.reference_cosine.mean()) / 2)


def _sample(mesh: trimesh.Trimesh, num_samples: int, seed: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Points `[n, 3]`, uniform by area, and the faces `[n]` they lie on."""
    if len(mesh.faces) == 0 or not mesh.area > 0:
        raise ValueError(f"`{name}` has no surface.")
    points, faces = trimesh.sample.sample_surface(mesh, num_samples, seed=seed)
    return np.asarray(points), np.asarray(faces)


def _normals(mesh: trimesh.Trimesh) -> np.ndarray:
    corners = np.asarray(mesh.triangles)
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    return normals / np.linalg.norm(normals, axis=1, keepdims=True).clip(np.finfo(float).tiny)


def compare_surfaces(
    prediction: trimesh.Trimesh,
    reference: trimesh.Trimesh,
    num_samples: int = NUM_SAMPLES,
    seed: int = 0,
    point_to_point: bool = False,
    outer_resolution: int | None = None,
) -> SurfaceComparison:
    """
    Measures the distances that the metrics of this module are made of.

    Args:
        prediction: the mesh to judge.
        reference: the mesh to compare with, in the same space.
        num_samples: samples per mesh.
        seed: of the sampling.
        point_to_point: distance to the nearest sample of the other mesh instead of its surface.
        outer_resolution: compare with the outer surface of the reference only (see [`OuterSurface`]), found on a grid
            of this many samples per axis; for references with faces inside a solid, which no closed surface can show.

    Raises:
        ValueError: if `prediction` or `reference` has no surface.
    """
    points, faces = _sample(prediction, num_samples, seed, "prediction")
    if outer_resolution is None:
        target, target_faces = _sample(reference, num_samples, seed + 1, "reference")
    else:
        # Drawn four times over, because the samples inside are rejected.
        target, target_faces = _sample(reference, 4 * num_samples, seed + 1, "reference")
        outer = OuterSurface(reference, outer_resolution).contains(target)
        target, target_faces = target[outer][:num_samples], target_faces[outer]
        visible, target_faces = np.unique(target_faces, return_inverse=True)
        reference = trimesh.Trimesh(reference.vertices, reference.faces[visible], process=False)
        target_faces = target_faces[:num_samples]
        if len(target) == 0:
            raise ValueError("`reference` has no outer surface.")

    normals, target_normals = _normals(prediction), _normals(reference)
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
        prediction_cosine=np.abs((normals[faces] * target_normals[nearest]).sum(axis=1)),
        reference_cosine=np.abs((target_normals[target_faces] * normals[target_nearest]).sum(axis=1)),
    )


def chamfer_distance(
    prediction: trimesh.Trimesh, reference: trimesh.Trimesh, squared: bool = False, **kwargs
) -> float:
    """
    Chamfer distance. L1 (default): the mean of the mean distance from prediction to reference and from reference to
    prediction. Squared L2 (`squared=True`): the sum of the two mean squared distances. Further arguments and errors:
    [`compare_surfaces`].
    """
    comparison = compare_surfaces(prediction, reference, **kwargs)
    return comparison.chamfer_l2() if squared else comparison.chamfer_l1()


def f1_score(
    prediction: trimesh.Trimesh, reference: trimesh.Trimesh, thresholds: Sequence[float] = (0.01, 0.05), **kwargs
) -> dict[float, float]:
    """
    F1 score for each threshold: the harmonic mean of precision (share of samples of the prediction nearer than the
    threshold to the reference) and recall (share of samples of the reference nearer than it to the prediction).
    Further arguments and errors: [`compare_surfaces`].
    """
    comparison = compare_surfaces(prediction, reference, **kwargs)
    return {threshold: comparison.f1(threshold) for threshold in thresholds}


def normal_consistency(prediction: trimesh.Trimesh, reference: trimesh.Trimesh, **kwargs) -> float:
    """
    Mean |cos| of the angle between the normal at a sample and at its closest point on the other surface, averaged over
    both directions; orientation does not count. Further arguments and errors: [`compare_surfaces`].
    """
    return compare_surfaces(prediction, reference, **kwargs).normal_consistency()


def volume_iou(
    prediction: trimesh.Trimesh, reference: trimesh.Trimesh, num_samples: int = NUM_SAMPLES, seed: int = 0
) -> float:
    """
    Volume of the intersection over the volume of the union, by points drawn uniformly in the box around both meshes;
    inside is where the generalised winding number exceeds a half.

    Raises:
        ValueError: if `prediction` or `reference` is not watertight.
        ImportError: if libigl is missing.
    """
    for name, mesh in (("prediction", prediction), ("reference", reference)):
        if not mesh.is_watertight:
            raise ValueError(f"`{name}` must be watertight to have a volume.")
    try:
        import igl
    except ImportError as error:
        raise ImportError("The volume IoU needs libigl: `pip install libigl`.") from error
    low = np.minimum(prediction.bounds[0], reference.bounds[0])
    high = np.maximum(prediction.bounds[1], reference.bounds[1])
    points = np.random.default_rng(seed).uniform(low, high, size=(num_samples, 3))
    inside = [
        # The absolute value, because a watertight mesh may be turned inside out.
        np.abs(igl.fast_winding_number(np.array(mesh.vertices), np.array(mesh.faces, dtype=np.int64), points)) > 0.5
        for mesh in (prediction, reference)
    ]
    union = (inside[0] | inside[1]).sum()
    return float((inside[0] & inside[1]).sum() / max(union, 1))


def evaluate_mesh(
    prediction: trimesh.Trimesh,
    reference: trimesh.Trimesh,
    thresholds: Sequence[float] = (0.01, 0.02, 0.05),
    **kwargs,
) -> dict[str, float | bool | None]:
    """
    All metrics of this module on the same samples. Further arguments and errors: [`compare_surfaces`].

    Returns:
        `chamfer_l1`, `chamfer_l2` (squared), `f1_<threshold>` for each threshold, `normal_consistency`, `volume_iou`
        (None unless both meshes are watertight) and `watertight` (of the prediction).
    """
    comparison = compare_surfaces(prediction, reference, **kwargs)
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
    Brings a generated mesh and its reference into one frame before generation metrics are taken: of 24 yaw rotations
    of the prediction about the vertical axis y, 15 degrees apart, each followed by normalisation to the model cube
    (bounding box centred, longest side 1.9), the one with the smallest L1 chamfer distance to the normalised reference
    is taken, measured point to point on 5,000 samples. There is no finer search, no change of scale, tilt or
    reflection.

    Returns:
        The aligned prediction, the normalised reference, and the yaw in degrees.

    Raises:
        ValueError: if `prediction` or `reference` has no surface.
    """
    from scipy.spatial import cKDTree

    reference, _, _ = normalize_mesh(reference)
    target, _ = _sample(reference, ALIGNMENT_SAMPLES, seed + 1, "reference")
    points, _ = _sample(prediction, ALIGNMENT_SAMPLES, seed, "prediction")
    vertices, tree = np.asarray(prediction.vertices), cKDTree(target)
    best = None
    for yaw in np.arange(ALIGNMENT_YAWS) * 360 / ALIGNMENT_YAWS:
        rotation = trimesh.transformations.rotation_matrix(np.radians(yaw), [0, 1, 0])[:3, :3]
        center, scale = fit_to_model_cube(vertices @ rotation.T)
        moved = (points @ rotation.T - center) * scale
        distance = tree.query(moved)[0].mean() + cKDTree(moved).query(target)[0].mean()
        if best is None or distance < best[0]:
            best = (distance, rotation, float(yaw))
    aligned = prediction.copy()
    aligned.vertices = vertices @ best[1].T
    return normalize_mesh(aligned)[0], reference, best[2]
