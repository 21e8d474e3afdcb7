"""Meshes for 3D printing: in millimetres on the build plate, with a report of what a slicer would stumble over."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import trimesh

from ..checks import check_integer, check_number, check_packages, check_positive
from .mesh import check_mesh


# Points of the surface at which the thickness is measured.
SAMPLES = 4000
# Faces that look down more steeply than this, in degrees from the vertical, print in the air without supports.
OVERHANG_ANGLE = 45.0
# Faces this near to the plate, relative to the height, rest on it.
PLATE = 0.005


@dataclass(frozen=True)
class PrintReport:
    """
    What a mesh is like as a print.

    Attributes:
        size: width, depth and height in millimetres.
        volume: cubic centimetres; of the enclosed space if the mesh is closed, else a rough figure.
        area: of the surface, square centimetres.
        parts: connected pieces of the surface.
        open_edges: edges of one face only: holes.
        crowded_edges: edges of more than two faces.
        consistent: whether neighbouring faces have the same side out.
        thinnest_wall: millimetres, below which one per cent of the surface lies; None if nothing is behind the
            surface, which is inside out or a sheet then.
        thin_share: share of the surface whose wall is thinner than `min_wall`, or None likewise.
        min_wall: millimetres.
        overhang_share: share of the surface that looks down by more than 45 degrees and is off the plate.
    """

    size: tuple[float, float, float]
    volume: float
    area: float
    parts: int
    open_edges: int
    crowded_edges: int
    consistent: bool
    thinnest_wall: float | None
    thin_share: float | None
    min_wall: float
    overhang_share: float

    @property
    def watertight(self) -> bool:
        """Whether the surface is closed, with two faces at each edge."""
        return self.open_edges == self.crowded_edges == 0

    @property
    def problems(self) -> list[str]:
        """A sentence for each thing to mend before printing; empty for a mesh that prints as it is."""
        found = []
        if self.open_edges:
            found.append(f"The surface is open at {self.open_edges:,} edges: fill the holes (--fill-holes).")
        if self.crowded_edges:
            found.append(f"{self.crowded_edges:,} edges have more than two faces: slicers may drop some.")
        if not self.consistent:
            found.append("Neighbouring faces have different sides out.")
        if self.parts > 1:
            found.append(f"There are {self.parts:,} separate parts: loose ones fall off (--remove-floaters).")
        if self.thin_share is None:
            found.append("Nothing is behind the surface: it is inside out, or a sheet without thickness.")
        elif self.thin_share > 0.01:
            share = f"{100 * self.thin_share:.0f} % of the surface"
            found.append(f"{share} has walls thinner than {self.min_wall:g} mm: print larger, or thicken (--level).")
        return found

    def __str__(self) -> str:
        width, depth, height = self.size
        rows = {
            "size": f"{width:.1f} x {depth:.1f} x {height:.1f} mm",
            "volume": f"{self.volume:.2f} cm3",
            "surface": f"{self.area:.1f} cm2",
            "watertight": "yes" if self.watertight else "no",
            "parts": f"{self.parts:,}",
            "thinnest wall": "none found" if self.thinnest_wall is None else f"{self.thinnest_wall:.2f} mm",
            "overhangs": f"{100 * self.overhang_share:.0f} % of the surface needs supports",
        }
        lines = [f"{name:16}{value}" for name, value in rows.items()]
        return "\n".join([*lines, *(self.problems or ["Nothing stands against printing it."])])


def prepare_for_printing(mesh: trimesh.Trimesh, size: float = 100.0) -> trimesh.Trimesh:
    """
    A copy of a mesh in millimetres, z up, in the middle of the build plate, which is z = 0.

    A closed mesh that is inside out is turned right side out.

    Args:
        mesh: y up, in any units.
        size: longest side in millimetres.

    Raises:
        TypeError: if `mesh` is no Trimesh.
        ValueError: if `size` is not positive and finite, or the mesh has no extent.
    """
    size = check_positive("size", size)
    check_mesh(mesh)
    longest = float(np.ptp(mesh.vertices, axis=0).max()) if len(mesh.faces) else 0.0
    if not (np.isfinite(longest) and longest > 0):
        raise ValueError("`mesh` must have faces and a finite extent")
    x, y, z = np.asarray(mesh.vertices).T * (size / longest)
    vertices = np.stack([x, -z, y], axis=1)
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    vertices -= [*(low + high)[:2] / 2, low[2]]
    result = trimesh.Trimesh(vertices, mesh.faces, process=False)
    if result.is_watertight and result.is_winding_consistent and result.volume < 0:
        result.invert()
    return result


def print_report(mesh: trimesh.Trimesh, min_wall: float = 0.8) -> PrintReport:
    """
    Measures a mesh that [`prepare_for_printing`] has made.

    Walls are measured along rays inward from points spread over the surface. The points are the same in each call.

    Args:
        mesh: in millimetres, z up.
        min_wall: millimetres; two lines of a common nozzle of 0.4 mm by default.

    Raises:
        TypeError: if `mesh` is no Trimesh.
        ValueError: if the mesh has no surface, or `min_wall` is no number of at least 0.
        ImportError: if `embreex` is missing.
    """
    _, faces = check_mesh(mesh)
    if len(faces) == 0 or not mesh.area > 0:
        raise ValueError(f"`mesh` must have a surface, got one of {len(faces)} faces without area")
    min_wall = check_number("min_wall", min_wall, 0)
    counts = np.unique(mesh.edges_sorted, axis=0, return_counts=True)[1]
    walls = wall_thickness(mesh)
    normals = np.asarray(mesh.face_normals)
    heights = np.asarray(mesh.triangles_center)[:, 2]
    raised = heights > heights.min() + PLATE * np.ptp(mesh.vertices[:, 2])
    overhang = (normals[:, 2] < -np.sin(np.deg2rad(OVERHANG_ANGLE)) - 1e-6) & raised
    width, depth, height = (float(side) for side in np.ptp(mesh.vertices, axis=0))
    return PrintReport(
        size=(width, depth, height),
        volume=abs(float(mesh.volume)) / 1000,
        area=float(mesh.area) / 100,
        parts=int(mesh.body_count),
        open_edges=int((counts == 1).sum()),
        crowded_edges=int((counts > 2).sum()),
        consistent=bool(mesh.is_winding_consistent),
        thinnest_wall=float(np.quantile(walls, 0.01)) if len(walls) else None,
        thin_share=float((walls < min_wall).mean()) if len(walls) else None,
        min_wall=min_wall,
        overhang_share=float(mesh.area_faces[overhang].sum() / mesh.area),
    )


def wall_thickness(mesh: trimesh.Trimesh, samples: int = SAMPLES) -> np.ndarray:
    """
    Distances from points of a surface inward to the next surface, `[S]` in the units of the mesh.

    Args:
        mesh: oriented outward.
        samples: points; S is less where rays leave an open mesh.

    Raises:
        TypeError: if `mesh` is no Trimesh.
        ValueError: if `samples` is not positive.
        ImportError: if `embreex` is missing.
    """
    check_packages("measuring walls", "embreex")
    from embreex.mesh_construction import TriangleMesh
    from embreex.rtcore_scene import EmbreeScene

    check_mesh(mesh)
    samples = check_integer("samples", samples, 1)
    points, faces = trimesh.sample.sample_surface(mesh, samples, seed=0)
    inward = -np.asarray(mesh.face_normals)[faces]
    scene = EmbreeScene()
    TriangleMesh(scene, np.asarray(mesh.triangles, dtype=np.float32))
    # A ray must not hit the face that it starts from.
    offset = 1e-4 * float(np.ptp(mesh.vertices, axis=0).max())
    origins = np.ascontiguousarray(points + offset * inward, dtype=np.float32)
    hits = scene.run(origins, np.ascontiguousarray(inward, dtype=np.float32), output=True)
    return hits["tfar"][hits["primID"] >= 0] + offset
