"""Any triangles: a closed surface, or a sentence; the order of rows does not matter."""

import numpy as np
import pytest
import torch
import trimesh
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from diffusers_sparse3d.geometry.clean_up import fill_holes, remove_floaters, remove_inner_parts, simplify_mesh
from diffusers_sparse3d.geometry.marching_cubes import sparse_sdf_to_mesh
from diffusers_sparse3d.geometry.mesh import EXPORT_SUFFIXES, check_mesh, load_mesh
from diffusers_sparse3d.geometry.sdf import mesh_to_sparse_sdf
from tests.properties.strategies import meshes, voxels


FEW = settings(max_examples=max(50, settings().max_examples // 4))


@FEW
@given(meshes(), st.sampled_from(["floaters", "inner parts", "holes", "faces"]))
def test_clean_up(mesh, step):
    steps = {
        "floaters": remove_floaters,
        "inner parts": remove_inner_parts,
        "holes": fill_holes,
        "faces": lambda mesh: simplify_mesh(mesh, 4),
    }
    try:
        result = steps[step](mesh)
    except ValueError as error:
        assert step == "faces" and "`mesh`" in str(error)
    else:
        check_mesh(result)


@FEW
@given(meshes(), st.randoms(use_true_random=False))
def test_signed_distances(mesh, random):
    try:
        expected = mesh_to_sparse_sdf(mesh, 16)
    except ValueError as error:
        assume("`mesh`" not in str(error))
        raise
    assert expected.feats.abs().max() < 1
    surface = sparse_sdf_to_mesh(expected.feats, expected.coords, 16)
    assert surface.is_watertight and surface.is_winding_consistent
    generator = np.random.default_rng(random.randrange(2**32))
    place = generator.permutation(len(mesh.vertices))
    vertices = np.empty_like(mesh.vertices)
    vertices[place] = mesh.vertices
    faces = generator.permuted(place[generator.permutation(mesh.faces)], axis=1)
    found = mesh_to_sparse_sdf(trimesh.Trimesh(vertices, faces, process=False), 16)
    assert torch.equal(found.coords, expected.coords) and torch.equal(found.feats, expected.feats)


@given(voxels(size=5, samples=1, least=1), st.data(), st.sampled_from([5, 8, 16]))
def test_every_surface_is_closed(coords, data, resolution):
    values = data.draw(st.lists(st.integers(-63, 63), min_size=len(coords), max_size=len(coords)))
    mesh = sparse_sdf_to_mesh(torch.tensor(values) / 64, coords, resolution)
    assert len(mesh.faces) == 0 or (mesh.is_watertight and mesh.is_winding_consistent)
    assert np.abs(mesh.vertices).max(initial=0) <= 1


@given(st.binary(max_size=200), st.sampled_from(EXPORT_SUFFIXES), st.booleans(), st.integers(0, 400))
def test_files_of_any_bytes(tmp_path_factory, data, suffix, is_mesh, place):
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    if is_mesh and suffix != ".3mf":
        whole = trimesh.creation.box().export(file_type=suffix[1:])
        whole = whole.encode() if isinstance(whole, str) else whole
        data = whole[:place] + data + whole[place + len(data) :]
    path.write_bytes(data)
    try:
        check_mesh(load_mesh(path))
    except ValueError as error:
        assert "`mesh`" in str(error)
    except ImportError:
        pytest.skip("lxml or networkx is missing")
