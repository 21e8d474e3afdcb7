"""Arguments of the geometry that do not fit are refused before any work, by their names."""

from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh

from diffusers_sparse3d.geometry import metrics
from diffusers_sparse3d.geometry.cell_mesh import cells_to_mesh
from diffusers_sparse3d.geometry.marching_cubes import sparse_sdf_to_mesh
from diffusers_sparse3d.geometry.mesh import export_mesh, fit_to_model_cube, normalize_mesh
from diffusers_sparse3d.geometry.printing import prepare_for_printing, print_report, wall_thickness
from diffusers_sparse3d.geometry.render import render_mesh_views
from diffusers_sparse3d.geometry.sdf import mesh_to_sparse_sdf
from diffusers_sparse3d.geometry.silhouettes import best_view, frame_mask, surface_points
from diffusers_sparse3d.geometry.surface_cells import cells_near_surface
from diffusers_sparse3d.geometry.turntable import render_turntable, write_turntable


BOX = trimesh.creation.box()
SCENE = trimesh.Scene(BOX)
FLAT = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [2, 0, 0]], [[0, 1, 2]], process=False)
NAN = float("nan")
CELLS = np.zeros((1, 3), dtype=int)
VIEW = [(0.0, 0.0, 50.0)]
SAMPLES = torch.zeros(2, 4, dtype=torch.int32)
BAD = {
    "thresholds": [
        lambda: metrics.f1_score(BOX, BOX, thresholds=(-0.1,)),
        lambda: metrics.f1_score(BOX, BOX, thresholds=0.1),
        lambda: metrics.evaluate_mesh(BOX, BOX, thresholds=(NAN,)),
    ],
    "num_samples": [
        lambda: metrics.compare_surfaces(BOX, BOX, num_samples=0),
        lambda: metrics.chamfer_distance(BOX, BOX, num_samples=10**12),
        lambda: metrics.volume_iou(BOX, BOX, num_samples=-5),
    ],
    "seed": [
        lambda: metrics.normal_consistency(BOX, BOX, seed=-1),
        lambda: metrics.volume_iou(BOX, BOX, seed="a"),
        lambda: metrics.align_meshes(BOX, BOX, seed=0.5),
    ],
    "prediction": [
        lambda: metrics.compare_surfaces(SCENE, BOX),
        lambda: metrics.volume_iou("box.ply", BOX),
        lambda: metrics.align_meshes(None, BOX),
    ],
    "reference": [lambda: metrics.chamfer_distance(BOX, SCENE), lambda: metrics.align_meshes(BOX, SCENE)],
    "device": [
        lambda: mesh_to_sparse_sdf(BOX, 16, device="toaster"),
        lambda: mesh_to_sparse_sdf(BOX, 16, device="meta"),
        lambda: cells_near_surface(BOX, 64, device=3.5),
    ],
    "coords": [
        lambda: cells_to_mesh(np.zeros((2, 3)), 8),
        lambda: sparse_sdf_to_mesh(torch.zeros(2, 1), SAMPLES.tolist(), 16),
    ],
    "resolution": [lambda: cells_to_mesh(CELLS, 0), lambda: cells_to_mesh(CELLS, 8.0)],
    "feats": [lambda: sparse_sdf_to_mesh(torch.zeros(2, 1).to_sparse(), SAMPLES, 16)],
    "vertices": [
        lambda: fit_to_model_cube("abc"),
        lambda: fit_to_model_cube(np.zeros((4, 2))),
        lambda: fit_to_model_cube(np.zeros((0, 3))),
    ],
    "path": [lambda: export_mesh(BOX, 5)],
    "scale": [lambda: export_mesh(BOX, "box.glb", scale=NAN), lambda: export_mesh(BOX, "box.glb", scale="1")],
    "size": [
        lambda: prepare_for_printing(BOX, "10"),
        lambda: render_mesh_views(BOX, VIEW, 0),
        lambda: render_mesh_views(BOX, VIEW, "big"),
        lambda: render_turntable(BOX, 2, size=0),
        lambda: frame_mask(np.ones((2, 2)), 0),
    ],
    "min_wall": [lambda: print_report(BOX, "a"), lambda: print_report(BOX, NAN)],
    "samples": [lambda: wall_thickness(BOX, 0)],
    "mesh": [
        lambda: print_report(FLAT),
        lambda: prepare_for_printing(SCENE),
        lambda: wall_thickness("box.ply"),
        lambda: normalize_mesh(trimesh.Trimesh(BOX.vertices * 1e-310, BOX.faces, process=False)),
    ],
    "num_frames": [lambda: render_turntable(BOX, 1), lambda: write_turntable(BOX, "box.gif", 10**6)],
    "seconds": [
        lambda: write_turntable(BOX, "box.gif", seconds=NAN),
        lambda: write_turntable(BOX, "box.gif", seconds=0),
        lambda: write_turntable(BOX, "box.gif", seconds=1e9),
    ],
    "elevation": [lambda: render_turntable(BOX, 2, 16, elevation=NAN)],
    "views": [lambda: render_mesh_views(BOX, None), lambda: render_mesh_views(BOX, [(0.0, 0.0)])],
    "focal_mm": [lambda: render_mesh_views(BOX, [(0.0, 0.0, 0.0)], 16)],
    "mask": [
        lambda: frame_mask(np.ones((2, 2, 3))),
        lambda: frame_mask([[1]]),
        lambda: best_view(torch.zeros(5, 3), torch.zeros(4, 4)),
    ],
    "num_points": [lambda: surface_points(BOX, 0)],
    "points": [lambda: best_view(torch.zeros(5, 2), torch.ones(4, 4, dtype=torch.bool))],
}


@pytest.mark.parametrize(
    "name, call", [(name, call) for name, calls in BAD.items() for call in calls], ids=lambda value: str(value)[:12]
)
def test_the_argument_is_named(name, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((TypeError, ValueError), match=f"`{name}` must"):
        call()
    assert not list(Path().iterdir())
