"""Data preparation on tiny meshes: complete, resumable, and not to be stopped by a bad mesh."""

import csv
import json

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from diffusers_sparse3d.training.dataset import SparseSDFDataset
from diffusers_sparse3d.training.preparation import command, items, shards
from diffusers_sparse3d.training.preparation.command import main
from diffusers_sparse3d.training.preparation.index import read_index
from diffusers_sparse3d.training.preparation.shards import read_rows


SETTINGS = ["--num_workers", "0", "--resolutions", "32", "64", "--num_views", "2", "--image_size", "32"]


def prepare(root, output, *options):
    arguments = ["--input", str(root), "--output", str(output), *SETTINGS, *options]
    main(arguments)


def write_meshes(root):
    """An index of a tall box with a photo, a torus, and a file that is no mesh."""
    root.mkdir()
    trimesh.creation.box((1, 2, 1)).export(root / "box.ply")
    trimesh.creation.torus(1, 0.4, major_sections=16, minor_sections=8).export(root / "torus.ply")
    (root / "broken.ply").write_text("this is no mesh")
    photo = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    photo.paste((255, 0, 0, 255), (4, 5, 14, 15))
    photo.save(root / "box.png")
    columns = ["id", "source", "category", "name", "mesh", "image", "license", "author", "split"]
    rows = [
        ["a-box", "boxes", "Box", "Tall box", "box.ply", "box.png", "CC0-1.0", "Ann", "train"],
        ["a-torus", "rings", "Ring", "Torus", "torus.ply", "", "CC-BY-4.0", "Bob", "val"],
        ["bad", "rings", "Ring", "Broken", "broken.ply", "", "CC-BY-4.0", "Bob", "train"],
    ]
    with (root / "index.csv").open("w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])
    return root


def read_tensors(output):
    tensors = {}
    for path in sorted(output.glob("shard-*.safetensors")):
        with safe_open(path, "pt") as shard:
            tensors.update({key: shard.get_tensor(key) for key in shard.keys()})  # noqa: SIM118
    return tensors


@pytest.fixture(scope="module")
def meshes(tmp_path_factory):
    return write_meshes(tmp_path_factory.mktemp("input") / "meshes")


@pytest.fixture(scope="module")
def dataset(meshes, tmp_path_factory):
    output = tmp_path_factory.mktemp("output") / "dataset"
    prepare(meshes, output)
    return output


def test_everything_is_written(dataset):
    rows = {row["id"]: row for row in read_rows(dataset / "index.csv")}
    assert list(rows) == ["a-box", "a-torus"]
    assert (rows["a-box"]["num_images"], rows["a-box"]["num_given"]) == ("3", "1")
    assert (rows["a-torus"]["split"], rows["a-torus"]["author"], rows["a-torus"]["num_given"]) == ("val", "Bob", "0")
    metadata = json.loads((dataset / "metadata.json").read_text())
    assert metadata["resolutions"] == [32, 64]
    assert metadata["dense_resolution"] == 4
    assert metadata["counts"] == {"boxes": {"train": 1}, "rings": {"val": 1}}
    card = (dataset / "README.md").read_text()
    assert "| boxes | CC0-1.0 | Ann | 1 |" in card
    assert "| rings | val | 1 |" in card
    tensors = read_tensors(dataset)
    for resolution in (32, 64):
        num_blocks = len(tensors[f"a-torus/sdf_{resolution}/coords"])
        assert num_blocks > 0
        assert tensors[f"a-torus/sdf_{resolution}/values"].shape == (num_blocks, 512)
        assert tensors[f"a-torus/sdf_{resolution}/sharp"].shape == (num_blocks, 64)
    assert not (dataset / "items").exists()


def test_bad_mesh_is_reported_with_a_reason(dataset):
    (failure,) = read_rows(dataset / "failures.csv")
    assert failure["id"] == "bad"
    assert failure["reason"]
    assert "1, listed in failures.csv" in (dataset / "README.md").read_text()


def test_finished_meshes_are_skipped_and_new_ones_added(tmp_path, monkeypatch):
    meshes, output = write_meshes(tmp_path / "meshes"), tmp_path / "dataset"
    prepare(meshes, output, "--limit", "1")
    before = (output / "shard-00000.safetensors").stat().st_mtime_ns
    done = []
    original = command.prepare_entry
    monkeypatch.setattr(
        command, "prepare_entry", lambda entry, options: (done.append(entry.id), original(entry, options))
    )
    prepare(meshes, output)
    assert sorted(done) == ["a-torus", "bad"]
    assert (output / "shard-00000.safetensors").stat().st_mtime_ns == before
    assert [row["shard"] for row in read_rows(output / "index.csv")] == ["0", "1"]
    assert {key.split("/")[0] for key in read_tensors(output)} == {"a-box", "a-torus"}


def test_interrupted_run_keeps_items(tmp_path, meshes, monkeypatch, dataset):
    """A break between computing and packing loses nothing: the next run packs what is there."""
    output = tmp_path / "dataset"
    with monkeypatch.context() as patch:
        patch.setattr(command, "pack_shards", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(meshes, output)
    assert len(list((output / "items").glob("*.safetensors"))) == 2
    monkeypatch.setattr(items, "write_item", lambda *_: pytest.fail("computed again"))
    (output / "items" / "killed.part").touch()
    prepare(meshes, output, "--limit", "1")
    assert {key.split("/")[0] for key in read_tensors(output)} == {"a-box"}
    prepare(meshes, output, "--limit", "2")
    assert not (output / "items").exists()
    assert read_tensors(output).keys() == read_tensors(dataset).keys()


def test_rendering_elsewhere_gives_the_same_dataset(tmp_path, meshes, dataset):
    prepare(meshes, tmp_path / "a", "--renders_only")
    assert not list((tmp_path / "a").glob("shard-*"))
    prepare(meshes, tmp_path / "b", "--images_dir", str(tmp_path / "a" / "renders"))
    assert not (tmp_path / "b" / "renders").exists()
    expected, actual = read_tensors(dataset), read_tensors(tmp_path / "b")
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
    azimuths = [SparseSDFDataset(folder).azimuths(0) for folder in (dataset, tmp_path / "b")]
    assert azimuths[0][:2] == azimuths[1][:2] and np.isfinite(azimuths[0]).tolist() == [True, True, False]


def test_other_resolutions_in_a_dataset_are_refused(meshes, dataset):
    with pytest.raises(ValueError, match=r"`resolutions` must be \[32, 64\], .* got \[64\]"):
        prepare(meshes, dataset, "--resolutions", "64")


def test_small_shards(tmp_path, meshes):
    prepare(meshes, tmp_path / "dataset", "--shard_size", "0")
    assert len(list((tmp_path / "dataset").glob("shard-*.safetensors"))) == 2


def test_given_image_is_framed_like_a_render(dataset):
    image = Image.open(dataset / "renders" / "a-box" / "2.webp").convert("RGBA")
    assert image.size == (32, 32)
    left, top, right, bottom = image.getchannel("A").point(lambda alpha: 255 * (alpha > 127)).getbbox()
    assert max(left, top, 32 - right, 32 - bottom) <= 2
    red, green, blue, _ = image.getpixel((16, 16))
    assert red > 240 and max(green, blue) < 15


def test_up_axis_of_a_source(tmp_path, meshes):
    prepare(meshes, tmp_path / "dataset", "--limit", "1", "--up_axis", "rings=x", "boxes=z")
    coords = read_tensors(tmp_path / "dataset")["a-box/sdf_64/coords"].int()
    extent = coords.max(0).values - coords.min(0).values
    # The box was long in y, which a mesh with z up has in depth: -z.
    assert extent.argmax() == 2
    assert extent[0] == extent[1] < extent[2]


@pytest.mark.parametrize("up_axis", ["x", "y", "z"])
def test_the_axis_that_points_up_ends_up_as_y(tmp_path, up_axis):
    """A cone with its tip along the axis: its foot, wider than the tip, lies at small y."""
    axis = "xyz".index(up_axis)
    cone = trimesh.creation.cone(0.5, 2.0)  # tip along +z
    cone.vertices = np.roll(cone.vertices, axis - 2, axis=1)
    assert cone.vertices[cone.vertices[:, axis].argmax()].argmax() == axis
    meshes = tmp_path / "meshes"
    meshes.mkdir()
    cone.export(meshes / "cone.ply")
    prepare(meshes, tmp_path / "dataset", "--up_axis", up_axis, "--val_fraction", "0")
    data = SparseSDFDataset(tmp_path / "dataset", resolution=64)
    coords, feats, _ = data.blocks(0, 64).band()
    inside = coords[feats[:, 0] < 0].numpy()
    extents = {level: [int(np.ptp(inside[inside[:, 1] == level][:, axis])) for axis in (0, 2)] for level in (6, 56)}
    assert min(extents[6]) > 20 and max(extents[56]) < 8
    # The picture shows the same thing: the foreground is wide at the bottom.
    image = data.picture(0, 0).getchannel("A")
    rows = np.asarray(image)[[2, 6, -6]] > 128
    assert rows[0].sum() < rows[2].sum()


def test_views_depend_on_seed_and_id(tmp_path, meshes):
    def azimuths(folder, *options):
        prepare(meshes, tmp_path / folder, "--renders_only", *options)
        return [(tmp_path / folder / "renders" / name / "azimuths.txt").read_text() for name in ("a-box", "a-torus")]

    first, again, other = azimuths("a"), azimuths("b"), azimuths("c", "--seed", "1")
    assert first == again
    assert len({*first, *other}) == 4
    with Image.open(tmp_path / "a" / "renders" / "a-box" / "0.webp") as image:
        pixels = np.asarray(image)
    with Image.open(tmp_path / "c" / "renders" / "a-box" / "0.webp") as image:
        assert not np.array_equal(pixels, np.asarray(image))


@pytest.mark.parametrize("name", ["a-torus.part", "shard-00001.part", "index.part", "metadata.part"])
def test_a_file_appears_when_it_is_complete(tmp_path, meshes, monkeypatch, name):
    """A break in the middle of writing any file leaves the dataset as it was, and the next run completes it."""
    output = tmp_path / "dataset"
    prepare(meshes, output, "--limit", "1")
    before = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    reached = []

    def break_off(path):
        """Leaves half of the file with the name of the test, and of no other."""
        if path.name == name:
            reached.append(path)
            path.write_bytes(b"half a file")
            raise KeyboardInterrupt

    write_text = type(output).write_text
    with monkeypatch.context() as patch:
        for module in (items, shards):
            patch.setattr(module, "save_file", lambda tensors, path: break_off(path) or save_file(tensors, path))
        patch.setattr(
            type(output), "write_text", lambda path, *args, **kw: break_off(path) or write_text(path, *args, **kw)
        )
        with pytest.raises(KeyboardInterrupt):
            prepare(meshes, output, "--limit", "2")
    assert reached
    kept = {"shard-00000.safetensors", "index.csv", "metadata.json"}
    assert all((output / file).read_bytes() == before[file] for file in kept)
    prepare(meshes, output, "--limit", "2")
    assert [row["id"] for row in read_rows(output / "index.csv")] == ["a-box", "a-torus"]
    assert {key.split("/")[0] for key in read_tensors(output)} == {"a-box", "a-torus"}


def test_random_colors_depend_on_the_id_alone(tmp_path, meshes):
    def mean_color(folder, name):
        pixels = np.asarray(Image.open(folder / "renders" / name / "0.webp").convert("RGBA"), dtype=float)
        return pixels[..., :3][pixels[..., 3] > 200].mean(axis=0)

    for folder in ("a", "b"):
        prepare(meshes, tmp_path / folder, "--renders_only", "--random_colors", "rings")
    torus = mean_color(tmp_path / "a", "a-torus")
    assert np.ptp(torus) > 25
    assert np.ptp(mean_color(tmp_path / "a", "a-box")) < 12
    np.testing.assert_array_equal(torus, mean_color(tmp_path / "b", "a-torus"))


def test_folder_without_index(tmp_path):
    for folder in ("chairs", "tables"):
        (tmp_path / folder).mkdir()
        trimesh.creation.box().export(tmp_path / folder / "one.stl")
    (tmp_path / "notes.txt").write_text("not a mesh")
    entries = read_index(tmp_path, {"": "z"}, ["all"], val_fraction=1.0)
    assert [(entry.id, entry.category, entry.split) for entry in entries] == [
        ("chairs-one", "chairs", "val"),
        ("tables-one", "tables", "val"),
    ]
    assert all(entry.up_axis == "z" and entry.random_color for entry in entries)
    # By their names, both are validation from a share of 0.23 on, which would leave nothing to train on.
    assert {entry.split for entry in read_index(tmp_path, {}, [], val_fraction=0.999)} == {"train"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,file\nx,x.ply\n", "lacks the columns"),
        ("id,mesh\nx,x.ply\nx,y.ply\n", "not unique"),
        ("id,mesh\n", "lacks"),
    ],
)
def test_bad_index(tmp_path, text, message):
    (tmp_path / "index.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_index(tmp_path, {}, [], 0.0)


def test_folder_without_meshes(tmp_path):
    with pytest.raises(ValueError, match="holds no mesh"):
        read_index(tmp_path, {}, [], 0.0)
