"""Many shapes of a mesh: what they are, that SDF, occupancy and pictures are of the same one, and that runs agree."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
import trimesh

from diffusers_sparse3d.geometry.marching_cubes import sparse_sdf_to_mesh
from diffusers_sparse3d.geometry.mesh import normalize_mesh
from diffusers_sparse3d.geometry.metrics import compare_surfaces
from diffusers_sparse3d.geometry.outer_points import outer_cells, outer_surface_points
from diffusers_sparse3d.geometry.render import MeshRenderer, corner_normals, load_surface
from diffusers_sparse3d.geometry.sdf import mesh_to_sdf_blocks
from diffusers_sparse3d.models.pixel_alignment import project
from diffusers_sparse3d.pipelines.image_processor import Sparse3DImageProcessor
from diffusers_sparse3d.training.cameras import NEEDED_COLUMNS, PictureCameras
from diffusers_sparse3d.training.dataset import SparseSDFDataset
from diffusers_sparse3d.training.evaluation.command import make_references
from diffusers_sparse3d.training.evaluation.command import parse_arguments as parse_evaluation
from diffusers_sparse3d.training.evaluation.shapes import dataset_mesh, file_mesh
from diffusers_sparse3d.training.preparation import record
from diffusers_sparse3d.training.preparation.augmentation import deformation_of, random_deformation, turn
from diffusers_sparse3d.training.preparation.command import parse_arguments
from diffusers_sparse3d.training.preparation.deformation import BENT_SIDE, Deformation
from diffusers_sparse3d.training.preparation.groups import Part, iterate_groups
from diffusers_sparse3d.training.preparation.index import MeshEntry, MeshIndex, Selection
from diffusers_sparse3d.training.preparation.jobs import MeshJob, Options
from diffusers_sparse3d.training.preparation.report import read_rows
from diffusers_sparse3d.training.preparation.run import prepare_group
from diffusers_sparse3d.training.preparation.shapes import shapes_of
from tests.training.prepared import prepare, settings


AUGMENTED = ["--augment", "2", "--renderer", "raster", "--meshes_per_shard", "2"]


def chair():
    """A seat with a back, legs and one arm: it has no symmetry."""
    sizes = {
        (0, 0, 0): (1, 0.2, 1), (0, 0.5, -0.45): (1, 1, 0.2), (0.4, 0.3, 0): (0.2, 0.2, 0.8),
        (-0.4, -0.5, 0.4): (0.2, 1, 0.2), (0.4, -0.5, 0.4): (0.2, 1, 0.2), (0, -0.5, -0.4): (0.4, 1, 0.2),
    }  # fmt: skip
    return trimesh.util.concatenate(
        [
            trimesh.creation.box(size, trimesh.transformations.translation_matrix(place))
            for place, size in sizes.items()
        ]
    )


@pytest.fixture(scope="module")
def meshes(tmp_path_factory):
    """Two meshes for training, one for validation, and a file that is none."""
    root = tmp_path_factory.mktemp("input")
    chair().export(root / "chair.ply")
    trimesh.creation.cone(0.5, 1.5, sections=9).export(root / "cone.ply")
    (root / "bad.ply").write_text("no mesh")
    rows = ["id,mesh,split", "chair,chair.ply,train", "bad,bad.ply,train", "cone,cone.ply,train", "held,chair.ply,val"]
    (root / "index.csv").write_text("\n".join(rows) + "\n")
    return root


@pytest.fixture(scope="module")
def augmented(meshes, tmp_path_factory):
    output = tmp_path_factory.mktemp("output") / "augmented"
    prepare(meshes, output, *AUGMENTED)
    return output


def rows_of(dataset):
    return {row["id"]: row for row in parquet.read_table(dataset / "index.parquet").to_pylist()}


def azimuths_of(directions):
    """The azimuths in degrees of directions `[..., 3]`, 90 from +x."""
    return np.degrees(np.arctan2(directions[..., 0], directions[..., 2]))


def test_a_deformation_depends_on_mesh_number_and_seed():
    def numbers(*arguments):
        made = random_deformation(*arguments, (-90, 90), 0.2, 0.2)
        return (*made.matrix.ravel(), *made.bend)

    arguments = [(name, copy, seed) for name in ("a", "b") for copy in range(2) for seed in range(2)]
    assert len({numbers(*each) for each in arguments}) == 8
    assert numbers("a", 1, 0) == numbers("a", 1, 0)
    # Other limits change nothing but what they limit.
    plain = random_deformation("a", 1, 0, (-90, 90), 0.0, 0.0)
    assert not plain.bend.any() and np.allclose(plain.matrix @ plain.matrix.T, np.eye(3))


def test_deformations_are_within_their_limits():
    made = [random_deformation(f"mesh-{number}", 0, 0, (20, 60), 0.2, 0.1) for number in range(400)]
    scales = np.linalg.svd(np.stack([each.matrix for each in made]))[1]
    assert np.exp(-0.2) <= scales.min() < 0.83 and 1.2 < scales.max() <= np.exp(0.2)
    assert 0.5 < (np.ptp(scales, axis=1) > 1e-6).mean() < 0.7
    bends = np.stack([each.bend for each in made])
    assert 0.08 < np.abs(bends).max() <= 0.1 and 0.1 < bends.any(axis=1).mean() < 0.3
    assert 0.4 < (np.linalg.det(np.stack([each.matrix for each in made])) < 0).mean() < 0.6
    matrices = np.stack([each.matrix for each in made])
    # They are stretched along their own axes, then turned.
    gram = matrices.transpose(0, 2, 1) @ matrices
    assert np.abs(gram[:, ~np.eye(3, dtype=bool)]).max() < 1e-9
    turns = matrices / np.linalg.norm(matrices, axis=1, keepdims=True)
    front = turns[:, 2] * np.sign(np.linalg.det(turns))[:, None] ** [1, 0, 0]
    inside = (azimuths_of(front) >= 20) & (azimuths_of(front) <= 60)
    assert 0.68 < inside.mean() < 0.85
    # Up stays up.
    assert all((each.matrix @ [0, 1, 0])[[0, 2]] == pytest.approx(0) and each.matrix[1, 1] > 0 for each in made)


@pytest.mark.parametrize("azimuth", [50.0, -130.0])
def test_a_turned_shape_faces_the_camera(azimuth):
    """It looks from the front as the mesh looks from the azimuth; the mesh is a cube with a red and a blue side."""
    box = trimesh.creation.box((1, 0.6, 1))
    box.visual.face_colors = np.where(
        box.face_normals[:, :1] > 0.5,
        [220, 20, 20, 255],
        np.where(box.face_normals[:, 2:] > 0.5, [20, 20, 220, 255], 90),
    )
    surface = load_surface(box)
    shape = Deformation(turn(-azimuth), np.zeros(2)).surface(surface)
    view = {"size": 32, "crop": True, "sky_rays": 1}
    expected, found = (
        MeshRenderer(surface).render(azimuth, 30, 60, **view),
        MeshRenderer(shape).render(0, 30, 60, **view),
    )
    difference = np.abs(np.asarray(expected).astype(int) - np.asarray(found))
    assert difference[..., 3].mean() < 1 and difference.mean() < 2
    mirrored = MeshRenderer(Deformation(turn(azimuth), np.zeros(2)).surface(surface)).render(0, 30, 60, **view)
    assert np.abs(np.asarray(expected).astype(int) - np.asarray(mirrored)).mean() > 8


def test_mesh_and_surface_become_the_same_shape():
    bent = Deformation(turn(30) @ np.diag([-1.2, 0.9, 1.0]), np.array([0.2, -0.1]))
    surface, mesh = bent.surface(load_surface(chair())), bent.mesh(chair())
    assert len(mesh.faces) == len(surface.triangles) > len(chair().faces)
    for triangles in (surface.triangles, mesh.triangles):
        assert np.ptp(triangles.reshape(-1, 3), axis=0).max() == pytest.approx(1.9, abs=1e-5)
        assert np.linalg.norm(triangles - np.roll(triangles, 1, axis=1), axis=2).max() < 1.5 * BENT_SIDE
    centers = [np.sort(triangles.mean(axis=1).round(4).view([("", float)] * 3), axis=0) for triangles in (
        surface.triangles.astype(float), np.ascontiguousarray(mesh.triangles))]  # fmt: skip
    np.testing.assert_allclose(*(center.view(float).reshape(-1, 3) for center in centers), atol=3e-4)
    # Points of the mesh come along.
    points = np.asarray(normalize_mesh(chair())[0].vertices)
    moved = bent.points_like(points, normalize_mesh(chair())[0])
    assert np.abs(mesh.vertices[:, None] - moved).max(axis=2).min(axis=0).max() < 2e-3
    # Faces still look outward, though the matrix mirrors.
    sphere = bent.mesh(trimesh.creation.icosphere(subdivisions=3))
    sphere.merge_vertices()
    assert sphere.is_watertight and sphere.volume > 0


def test_a_bend_follows_the_square_of_the_height():
    plank = trimesh.creation.box((0.1, 2, 0.1))
    bent = Deformation(np.eye(3), np.array([0.2, 0.0])).mesh(plank)
    bent.merge_vertices()
    assert bent.is_watertight
    low, high = (bent.vertices[np.abs(bent.vertices[:, 1] - height) < 0.13][:, 0].mean() for height in (0, 0.9))
    assert high - low == pytest.approx(0.2 * 0.9**2, abs=0.02)


def test_normals_follow_the_shape():
    bent = Deformation(turn(40) @ np.diag([1.3, 0.8, -1.0]), np.array([0.25, -0.2]))
    surface = load_surface(trimesh.creation.icosphere(subdivisions=4))
    shape = bent.surface(surface)
    cosine = np.abs(np.einsum("fcd,fcd->fc", shape.normals, corner_normals(shape.triangles)))
    # Those of triangles that are cut, too.
    cut = bent.surface(load_surface(chair()))
    flat = np.cross(cut.triangles[:, 1] - cut.triangles[:, 0], cut.triangles[:, 2] - cut.triangles[:, 0])
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    assert np.abs(np.einsum("fcd,fd->fc", cut.normals, flat)).min() > 0.98
    assert cosine.min() > 0.97 and np.linalg.norm(shape.normals, axis=2) == pytest.approx(1, abs=1e-5)


def test_which_shapes_there_are(tmp_path):
    entry = MeshEntry("a", tmp_path / "a.ply", source="chairs", image=tmp_path / "a.png")
    assert shapes_of(entry, settings()) == [entry]
    assert deformation_of(entry, settings()) is None
    three = settings(augment=[("", 1.5), ("chairs", 3.0)])
    shapes = shapes_of(entry, three)
    assert [(shape.id, shape.mesh_id, shape.copy, shape.image) for shape in shapes] == [
        (f"a~{copy}", "a", copy, None) for copy in range(3)
    ]
    others = [MeshEntry(f"mesh-{number}", tmp_path / "a.ply") for number in range(200)]
    counts = [len(shapes_of(each, three)) for each in others]
    assert set(counts) == {1, 2} and sum(counts) == pytest.approx(300, abs=25)
    assert counts != [len(shapes_of(each, settings(augment=[("", 1.5)], seed=1))) for each in others]
    few = settings(augment=[("chairs", 0.0)])
    assert shapes_of(entry, few) == [] and len(shapes_of(others[0], few)) == 1
    right = settings(augment=[("", 1.0)], azimuth_range=(20, 60))
    held = MeshEntry("b", tmp_path / "a.ply", split="val", image=tmp_path / "a.png")
    (shape,) = shapes_of(held, three)
    turned = deformation_of(shape, three)
    assert (shape.id, shape.copy, shape.image) == ("b", None, None)
    assert np.linalg.det(turned.matrix) == pytest.approx(1) and not turned.bend.any()
    # What comes to lie in front, at +z, was where the cameras are otherwise.
    front = np.stack([deformation_of(replace(shape, id=str(number)), right).matrix[2] for number in range(50)])
    assert 20 <= azimuths_of(front).min() < 25 and 55 < azimuths_of(front).max() <= 60
    (refused,) = shapes_of(MeshEntry("a~1", tmp_path / "a.ply"), three)
    assert refused.problem == "its id must not have '~', which numbers shapes"


def test_pictures_show_the_shape_of_the_sdf_from_their_cameras(augmented):
    data = SparseSDFDataset(augmented, resolution=64, columns=["elevations", "focal_lengths", "rolls"])
    assert list(data.ids) == ["chair~0", "chair~1", "cone~0", "cone~1", "held"]
    assert [row["id"] for row in read_rows(augmented / "failures.csv")] == ["bad~0", "bad~1"]
    for index in range(len(data)):
        row, blocks = data.row(index), data.blocks(index, 64)
        coords, feats, _ = blocks.band()
        renderer = MeshRenderer(sparse_sdf_to_mesh(feats, coords, 64))
        assert data.azimuths(index) == [0, 0]
        for view, picture in enumerate(data.pictures(index)):
            camera = (0.0, row["elevations"][view], row["focal_lengths"][view])
            if row["rolls"][view]:
                continue
            expected = np.asarray(renderer.render(*camera, 32, crop=True, sky_rays=1))[..., 3] > 127
            shown = np.asarray(picture)[..., 3] > 127
            assert (shown & expected).sum() / (shown | expected).sum() > 0.85
    # Shapes of one mesh differ, and so does the occupancy.
    assert data.content("occupancy").to_pylist()[0] != data.content("occupancy").to_pylist()[1]
    card = (augmented / "README.md").read_text()
    assert "5 shapes, made of meshes by augmentation, as" in card and "all of its cameras are at azimuth 0" in card


@pytest.mark.parametrize("mirrored", [False, True])
def test_points_of_shapes_are_where_prepared_pictures_show_them(augmented, mirrored):
    data = SparseSDFDataset(augmented, resolution=64, columns=NEEDED_COLUMNS)
    processor = Sparse3DImageProcessor(56, 14)
    cameras = PictureCameras(data, processor)
    for index in range(len(data)):
        coords, feats, _ = data.blocks(index, 64).band()
        mesh = sparse_sdf_to_mesh(feats, coords, 64)
        points = trimesh.sample.sample_surface(mesh, 4000, seed=0)[0] * ((-1 if mirrored else 1), 1, 1)
        for view, picture in enumerate(data.pictures(index)):
            pixels = project(torch.tensor(points).float(), cameras.get(index, view, mirrored=mirrored)[None])[0]
            low, high = pixels.amin(0), pixels.amax(0)
            # Tips of the surface are cut off at this resolution.
            assert float((high - low).max()) == pytest.approx(2 * 56 / 60, abs=0.09)
            assert (low + high).abs().max() < 0.09
            _, mask = processor.preprocess([picture])
            shown = torch.nn.functional.max_pool2d(mask.flip(-1) if mirrored else mask, 2)[0, 0] > 0
            columns, rows = ((pixels + 1) * 14).long().clamp(0, 27).unbind(1)
            seen = torch.zeros_like(shown)
            seen[rows, columns] = True
            assert (shown & seen).sum() / (shown | seen).sum() > 0.85


def test_records_for_the_dense_stage(meshes, augmented, tmp_path):
    """They have the cells of the same shapes, but for a few, and no SDF."""
    prepare(meshes, tmp_path, *AUGMENTED, "--dense_only")
    data, whole = SparseSDFDataset(tmp_path, sdf=False), SparseSDFDataset(augmented)
    assert list(data.ids) == list(whole.ids) and data.resolutions == [] and data.dense_resolution == 4
    for index in range(len(data)):
        found, expected = data.occupied_cells(index), whole.occupied_cells(index)
        assert (found & expected).sum() / (found | expected).sum() > 0.9
        assert data[index]["occupancy"].shape == (1, 4, 4, 4)
        assert [picture.size for picture in data.pictures(index)] == [(32, 32)] * 2
    assert data.content("images") == whole.content("images")
    names = parquet.read_schema(tmp_path / "index.parquet").names
    assert not [name for name in names if name.startswith(("sdf", "tokens", "voxels"))]
    assert "signed distance" not in (tmp_path / "README.md").read_text()
    with pytest.raises(ValueError, match="`sdf` must be False for a dataset without SDFs"):
        SparseSDFDataset(tmp_path)


@pytest.mark.parametrize("kind", ["box", "sheet", "torus"])
def test_cells_of_points_are_those_of_the_sdf(kind):
    """An open sheet becomes a shell; a ball inside of a box does not count."""
    if kind == "box":
        mesh = trimesh.util.concatenate([trimesh.creation.box(), trimesh.creation.icosphere(radius=0.2)])
    elif kind == "sheet":
        mesh = trimesh.Trimesh([[0, 0, 0], [1, 0.3, 0], [1, 0.3, 1], [0, 0, 1]], [[0, 1, 2], [0, 2, 3]], process=False)
    else:
        mesh = trimesh.creation.torus(1, 0.3, major_sections=24, minor_sections=12)
    mesh, _, _ = normalize_mesh(mesh)
    coords = mesh_to_sdf_blocks(mesh, 64, 4, progress=False).coords
    outer = outer_surface_points(mesh, 64, num_points=50_000)
    expected, found = torch.zeros(2, 16, 16, 16, dtype=torch.bool)
    expected[coords.long().unbind(1)] = True
    found[outer_cells(outer, 64, 4).long().unbind(1)] = True
    assert (expected & found).sum() / (expected | found).sum() > 0.97
    assert not (found & ~expected).any()


def hashes(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".lock")
    }


def test_original_meshes_are_evaluated_as_the_shapes_of_the_dataset(meshes, augmented):
    """Of both splits: those for training are shapes of their own, those for validation are turned."""
    for split, ids in (("train", {"chair~0", "chair~1", "cone~0", "cone~1"}), ("val", {"held"})):
        arguments = ["reconstruction", "--model", "", "--data", str(augmented), "--output", "", "--split", split]
        args = parse_evaluation([*arguments, "--meshes", str(meshes)])
        data = SparseSDFDataset(augmented, split, 64)
        assert set(data.ids) == ids
        for name, reference in zip(data.ids, make_references(args, data, 64)):
            found = compare_surfaces(dataset_mesh(str(augmented), split, name, 64), reference(), num_samples=2000)
            original = file_mesh(meshes / f"{'cone' if 'cone' in name else 'chair'}.ply", "y")
            turned = compare_surfaces(original, reference(), num_samples=2000)
            assert found.chamfer_l1() < 0.03 and (name == "held" or turned.chamfer_l1() > found.chamfer_l1()), name
            if name == "held":
                assert turned.chamfer_l1() > 0.05
    (meshes / "other.csv").write_text("id,mesh\ncone,cone.ply\n")
    args.meshes = meshes / "other.csv"
    with pytest.raises(ValueError, match=r"`meshes` must hold the meshes .*other.csv lacks 1 of 1, such as 'held'"):
        make_references(args, data, 64)


def test_processes_and_parts_make_the_same_files(meshes, augmented, tmp_path):
    prepare(meshes, tmp_path / "pool", *AUGMENTED, "--num_workers", "2")
    for part in ("1/2", "0/2"):
        prepare(meshes, tmp_path / "parts", *AUGMENTED, "--part", part)
    prepare(meshes, tmp_path / "parts", *AUGMENTED, "--merge")
    assert hashes(tmp_path / "pool") == hashes(tmp_path / "parts") == hashes(augmented)


def test_what_is_broken_off_between_shapes_goes_on_there(meshes, augmented, tmp_path, monkeypatch):
    made, original = [], record.make_record

    def interrupted(entry, *arguments):
        if len(made) == 1:
            raise KeyboardInterrupt
        made.append(entry.id)
        return original(entry, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(record, "make_record", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(meshes, tmp_path, *AUGMENTED)
    (first,) = made
    with monkeypatch.context() as patch:
        patch.setattr(record, "make_record", lambda entry, *rest: (made.append(entry.id), original(entry, *rest))[1])
        prepare(meshes, tmp_path, *AUGMENTED)
    assert made.count(first) == 1 and len(set(made)) == 7
    assert hashes(tmp_path) == hashes(augmented)


def test_a_shape_that_fails_costs_itself_alone(meshes, tmp_path, monkeypatch):
    original = record.make_record

    def failing(entry, *arguments):
        if entry.id == "chair~0":
            raise record.PreparationError("distances", "as planned")
        return original(entry, *arguments)

    monkeypatch.setattr(record, "make_record", failing)
    prepare(meshes, tmp_path, *AUGMENTED, "--limit", "1")
    assert list(rows_of(tmp_path)) == ["chair~1"]
    assert [(row["id"], row["cause"]) for row in read_rows(tmp_path / "failures.csv")] == [("chair~0", "distances")]
    # A second attempt, after the process was killed, makes what is missing.
    options = Options(tmp_path / "again", settings(augment=[("", 2.0)], renderer="raster"))
    (group,) = iterate_groups(MeshIndex(meshes, {}, [], 0.0), Selection(limit=1), options.settings, Part())
    job = MeshJob(tuple(group.entries), group.items(options.output), options)
    job.items.write(original(group.entries[0], options.settings))
    made = []
    monkeypatch.setattr(record, "make_record", lambda entry, *rest: (made.append(entry.id), original(entry, *rest))[1])
    job.run()
    assert made == ["chair~1"]
    monkeypatch.setattr(record, "make_record", failing)
    failures = prepare_group(group, replace(options, output=tmp_path / "other"))
    assert [(entry.id, failure.cause) for entry, failure in failures] == [("chair~0", "distances")]


def test_renders_of_shapes_come_from_elsewhere(meshes, augmented, tmp_path):
    prepare(meshes, tmp_path / "a", *AUGMENTED, "--renders_only")
    prepare(meshes, tmp_path / "b", *AUGMENTED, "--images_dir", str(tmp_path / "a" / "renders"))
    assert hashes(tmp_path / "b" / "shards") == hashes(augmented / "shards")


def test_the_ray_caster_renders_shapes_too(meshes, tmp_path):
    prepare(meshes, tmp_path, "--augment", "1", "--limit", "1")
    (row,) = rows_of(tmp_path).values()
    assert row["id"] == "chair~0" and row["azimuths"] == [0, 0] and row["rolls"] == [0, 0]


def test_a_dataset_that_was_begun_before_there_were_shapes_goes_on(meshes, tmp_path):
    prepare(meshes, tmp_path, "--limit", "1")
    before = hashes(tmp_path / "shards")
    path = tmp_path / "preparation.json"
    begun = json.loads(path.read_text())
    for name in ("renderer", "augment", "stretch", "bend", "dense_only"):
        del begun[name]
    path.write_text(json.dumps(begun))
    prepare(meshes, tmp_path, "--limit", "1")
    assert hashes(tmp_path / "shards") == before
    with pytest.raises(ValueError, match=r"`augment` must be \[\], with which .* got \['=2'\]"):
        prepare(meshes, tmp_path, "--augment", "2")


@pytest.mark.parametrize(
    "options", [["--augment", "x"], ["--augment", "a=-1"], ["--augment", "nan"], ["--stretch", "2"]]
)
def test_bad_options(options, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--input", "x", "--output", "y", *options])
    assert options[0] in capsys.readouterr().err
