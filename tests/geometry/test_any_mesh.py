"""Meshes and arguments of every kind: a result, or a sentence that names the argument; never a crash or a hang."""

import numpy as np
import pytest
import torch
import trimesh

from diffusers_sparse3d.geometry.clean_up import (
    MeshCleanUp,
    fill_holes,
    remove_floaters,
    remove_inner_parts,
    simplify_mesh,
)
from diffusers_sparse3d.geometry.marching_cubes import sparse_sdf_to_mesh
from diffusers_sparse3d.geometry.mesh import check_mesh, export_mesh, load_mesh, normalize_mesh
from diffusers_sparse3d.geometry.sdf import mesh_to_sparse_sdf
from diffusers_sparse3d.geometry.surface_cells import cells_near_surface


BOX = trimesh.creation.box((1, 1, 1))
OUT_OF_RANGE = trimesh.Trimesh(BOX.vertices, BOX.faces + 5, process=False)
NOT_FINITE = trimesh.Trimesh(BOX.vertices * np.nan, BOX.faces, process=False)


def simplify(mesh):
    return simplify_mesh(mesh, max(4, len(getattr(mesh, "faces", ())) // 2))


STEPS = [remove_floaters, remove_inner_parts, fill_holes, simplify]


@pytest.mark.parametrize("step", [*STEPS, normalize_mesh, lambda mesh: export_mesh(mesh, "mesh.glb"), check_mesh])
@pytest.mark.parametrize("mesh", [OUT_OF_RANGE, NOT_FINITE, None, "box.obj", trimesh.Scene()], ids=range(5))
def test_meshes_are_checked_before_a_library_sees_them(step, mesh):
    with pytest.raises((TypeError, ValueError), match="`mesh`"):
        step(mesh)


def random_mesh(generator):
    """Triangles on few vertices, or a ball with faces that are missing, doubled or flipped."""
    if generator.random() < 0.4:
        ball = trimesh.creation.icosphere(subdivisions=1)
        kept = ball.faces[generator.random(len(ball.faces)) < 0.9]
        more = [ball.faces[: generator.integers(0, 5)], ball.faces[: generator.integers(0, 3), ::-1]]
        return trimesh.Trimesh(ball.vertices, np.concatenate([kept, *more]), process=False)
    vertices = generator.normal(size=(generator.integers(1, 40), 3)) * 10.0 ** generator.integers(-20, 20)
    vertices[generator.random(vertices.shape) < 0.2] = 0
    faces = generator.integers(0, len(vertices), size=(generator.integers(0, 80), 3))
    return trimesh.Trimesh(vertices, faces, process=False)


@pytest.mark.parametrize("step", STEPS)
def test_clean_up_survives_any_mesh(step):
    generator = np.random.default_rng(0)
    for _ in range(100):
        mesh = random_mesh(generator)
        try:
            result = step(mesh)
        except ValueError as error:
            assert "`mesh`" in str(error) and step is simplify
        else:
            check_mesh(result)


def test_doubled_faces_do_not_stop_simplification():
    ball = trimesh.creation.icosphere(subdivisions=2)
    doubled = trimesh.Trimesh(
        ball.vertices, np.concatenate([ball.faces, ball.faces[:9], ball.faces[:5, ::-1]]), process=False
    )
    result = simplify_mesh(doubled, 100)
    assert result.is_watertight and len(result.faces) == 100
    turned = ball.faces.copy()
    turned[0] = turned[0, ::-1]
    with pytest.raises(ValueError, match="opposite orientation"):
        simplify_mesh(trimesh.Trimesh(ball.vertices, turned, process=False), 100)


@pytest.mark.parametrize(
    ("option", "value"), [("fill_holes", "no"), ("remove_floaters", 2), ("num_faces", 3), ("num_faces", 4.0)]
)
def test_options_of_clean_up(option, value):
    with pytest.raises(ValueError, match=f"`{option}`"):
        MeshCleanUp(**{option: value})


SAMPLES = torch.tensor([[-0.5], *[[1.0]] * 7])
COORDS = torch.nn.functional.pad(torch.cartesian_prod(*[torch.arange(2)] * 3), (1, 0)).int()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        *[("resolution", (SAMPLES, COORDS, resolution)) for resolution in (1, 0, -1, 2049, 16.0, "16", None)],
        *[("level", (SAMPLES, COORDS, 16, level)) for level in (float("nan"), float("inf"), "0", None)],
        ("feats", (SAMPLES.cfloat(), COORDS, 16)),
        ("feats", (SAMPLES.int(), COORDS, 16)),
        ("feats", (SAMPLES.numpy(), COORDS, 16)),
        ("coords", (SAMPLES, COORDS.numpy(), 16)),
        ("coords", (SAMPLES, COORDS.cfloat(), 16)),
    ],
)
def test_marching_cubes_names_what_does_not_fit(name, arguments):
    with pytest.raises((TypeError, ValueError), match=f"`{name}`"):
        sparse_sdf_to_mesh(*arguments)


@pytest.mark.parametrize("resolution", [2, np.int64(16), 2048])
def test_marching_cubes_at_the_ends_of_the_range(resolution):
    mesh = sparse_sdf_to_mesh(SAMPLES, COORDS, resolution)
    assert mesh.is_watertight and len(mesh.faces) >= 8


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        *[("resolution", (BOX, resolution)) for resolution in (0, 12, 4096, 64.0, "64")],
        *[("cell_size", (BOX, 64, size)) for size in (0, -8, 8.0)],
        *[("reach", (BOX, 64, 8, reach)) for reach in (0, float("nan"), "1")],
        ("mesh", (BOX.copy().apply_translation((5, 0, 0)), 64)),
        ("mesh", (OUT_OF_RANGE, 64)),
        ("mesh", (None, 64)),
    ],
)
def test_cells_near_a_surface_name_what_does_not_fit(name, arguments):
    with pytest.raises((TypeError, ValueError), match=f"`{name}`"):
        cells_near_surface(*arguments)


@pytest.mark.parametrize("resolution", [8, 20, 4096, 64.0, "64", None])
def test_sdf_resolutions(resolution):
    with pytest.raises(ValueError, match="`resolution`"):
        mesh_to_sparse_sdf(BOX, resolution)
    assert len(mesh_to_sparse_sdf(BOX, np.int64(16)).feats)


FILES = {
    "empty.glb": b"",
    "cut.glb": trimesh.creation.box().export(file_type="glb")[:200],
    "empty.ply": b"",
    "cut.ply": trimesh.creation.box().export(file_type="ply")[:300],
    "range.obj": b"v 0 0 0\nf 1 2 3\n",
    "text.stl": b"no mesh",
    "empty.gltf": b"{}",
    "unknown.docx": b"",
    "points.xyz": b"0 0 0\n1 1 1\n",
}


@pytest.mark.parametrize("name", FILES)
def test_damaged_files_get_a_sentence(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(FILES[name])
    with pytest.raises(ValueError, match=f"`mesh` .*{name}"):
        load_mesh(path)
    for missing in (tmp_path / "none.obj", tmp_path):
        with pytest.raises(FileNotFoundError, match="`mesh`"):
            load_mesh(missing)


def overlapping_boxes():
    boxes = [trimesh.creation.box((1, 1, 1)), trimesh.creation.box((1, 0.6, 0.5)).apply_translation((0.5, 0.1, 0.2))]
    return trimesh.util.concatenate(boxes)


@pytest.mark.parametrize("change", ["corners", "orientation", "faces", "vertices"])
def test_orders_do_not_change_a_signed_distance(change):
    generator, mesh = np.random.default_rng(0), overlapping_boxes()
    vertices, faces = mesh.vertices.copy(), mesh.faces.copy()
    if change == "corners":
        faces = np.stack([np.roll(face, generator.integers(3)) for face in faces])
    elif change == "orientation":
        faces[::2] = faces[::2, ::-1]
    elif change == "faces":
        faces = generator.permutation(faces)
    else:
        place = generator.permutation(len(vertices))
        vertices[place], faces = mesh.vertices, place[faces]
    expected = mesh_to_sparse_sdf(mesh, 64, return_sharp=True)
    found = mesh_to_sparse_sdf(trimesh.Trimesh(vertices, faces, process=False), 64, return_sharp=True)
    assert torch.equal(found[0].coords, expected[0].coords) and torch.equal(found[1], expected[1])
    assert torch.equal(found[0].feats, expected[0].feats)
