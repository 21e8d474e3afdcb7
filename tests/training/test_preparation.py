"""Data preparation on tiny meshes: complete, resumable, and not to be stopped by a bad mesh."""

import csv
import json
import os
import shutil
import sys

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
import trimesh
from PIL import Image

from diffusers_sparse3d.data.records import CAMERA_COLUMNS
from diffusers_sparse3d.training.dataset import SparseSDFDataset
from diffusers_sparse3d.training.preparation import command, record
from diffusers_sparse3d.training.preparation.index import MeshEntry, read_index
from diffusers_sparse3d.training.preparation.record import PreparationError, make_record
from diffusers_sparse3d.training.preparation.report import read_rows
from tests.training.prepared import prepare, read_sections, settings, write_meshes


@pytest.fixture(scope="module")
def meshes(tmp_path_factory):
    return write_meshes(tmp_path_factory.mktemp("input") / "meshes")


@pytest.fixture(scope="module")
def dataset(meshes, tmp_path_factory):
    output = tmp_path_factory.mktemp("output") / "dataset"
    prepare(meshes, output)
    return output


def rows_of(dataset):
    return {row["id"]: row for row in parquet.read_table(dataset / "index.parquet").to_pylist()}


def test_everything_is_written(dataset):
    rows = rows_of(dataset)
    assert list(rows) == ["a-box", "a-torus"]
    assert (rows["a-box"]["num_images"], rows["a-box"]["num_given"]) == (3, 1)
    assert (rows["a-torus"]["split"], rows["a-torus"]["author"], rows["a-torus"]["num_given"]) == ("val", "Bob", 0)
    assert (rows["a-box"]["faces"], rows["a-torus"]["faces"]) == (12, 256)
    metadata = json.loads((dataset / "metadata.json").read_text())
    assert metadata["resolutions"] == [32, 64]
    assert metadata["dense_resolution"] == 4
    assert metadata["counts"] == {"boxes": {"train": 1}, "rings": {"val": 1}}
    assert metadata["licenses"] == {"CC-BY-4.0": 1, "CC0-1.0": 1}
    card = (dataset / "README.md").read_text()
    assert "| boxes | CC0-1.0 | Ann | 1 |" in card
    assert "| rings | val | 1 |" in card
    sections = read_sections(dataset)
    for resolution in (32, 64):
        sdf = sections["a-torus"][f"sdf_{resolution}"]
        num_blocks = len(sdf["coords"])
        assert num_blocks == rows["a-torus"][f"tokens_{resolution}"] > 0
        assert sdf["values"].shape == (num_blocks, 512)
        assert int((sdf["values"].abs() < 1).sum()) == rows["a-torus"][f"voxels_{resolution}"]
        assert sdf["sharp"].shape == (num_blocks, 64)
    assert not (dataset / "items").exists()
    assert sorted(path.name for path in dataset.iterdir()) == [
        ".lock", "README.md", "failures.csv", "index.parquet", "metadata.json", "preparation.json", "shards",
    ]  # fmt: skip


def test_bad_mesh_is_reported_with_a_cause_and_a_reason(dataset, capsys):
    (failure,) = read_rows(dataset / "failures.csv")
    assert (failure["id"], failure["cause"]) == ("bad", "reading")
    assert failure["reason"].startswith("ValueError: ")
    card = (dataset / "README.md").read_text()
    assert "1, listed with the reasons in `failures.csv`" in card and "| rings | reading | 1 |" in card


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
@pytest.mark.parametrize(
    ("place", "name"), [(b"caf\xe9.ply", r"caf\udce9"), (b"caf\xe9/cup.ply", r"caf\udce9-cup")], ids=["file", "folder"]
)
def test_a_file_whose_name_is_no_utf8_stops_no_other(tmp_path, place, name):
    root = tmp_path / "meshes"
    path = os.path.join(os.fsencode(root), place)
    os.makedirs(os.path.dirname(path))
    trimesh.creation.box().export(root / "box.ply")
    trimesh.creation.box().export(root / "tor\u00f6.ply")
    shutil.copy(root / "box.ply", path)
    (root / "torn.ply").write_text("no mesh")
    prepare(root, tmp_path / "data", "--resolutions", "32", "--num_views", "1", "--val_fraction", "0")
    assert list(rows_of(tmp_path / "data")) == ["box", "tor\u00f6"]
    failures = {row["id"]: row for row in read_rows(tmp_path / "data" / "failures.csv")}
    assert {key: row["cause"] for key, row in failures.items()} == {name: "row", "torn": "reading"}
    assert failures[name]["reason"].startswith("its file must have a name in UTF-8")
    assert failures[name]["mesh"].endswith(f"meshes/{name.replace('-', '/')}.ply")


def test_finished_meshes_are_skipped_and_new_ones_added(tmp_path, monkeypatch):
    meshes, output = write_meshes(tmp_path / "meshes"), tmp_path / "dataset"
    prepare(meshes, output, "--limit", "1")
    (first,) = (output / "shards").glob("*.bin")
    before = first.stat().st_mtime_ns
    done = []
    original = record.make_record
    monkeypatch.setattr(record, "make_record", lambda entry, *args: (done.append(entry.id), original(entry, *args))[1])
    prepare(meshes, output)
    assert sorted(done) == ["a-torus", "bad"]
    assert first.stat().st_mtime_ns == before
    assert [row["shard"] for row in rows_of(output).values()] == ["000000-000000", "000000-000001"]
    assert list(read_sections(output)) == ["a-box", "a-torus"]


def test_a_finished_dataset_needs_no_packages(tmp_path, monkeypatch, capsys):
    """What prepares meshes is asked for where one is left, before it is worked on."""
    meshes, output = write_meshes(tmp_path / "meshes"), tmp_path / "dataset"
    prepare(meshes, output, "--limit", "1")
    for name in ("embreex", "igl"):
        monkeypatch.setitem(sys.modules, name, None)
    prepare(meshes, output, "--limit", "1")
    assert "1 meshes are in" in capsys.readouterr().out
    monkeypatch.setattr(record, "make_record", None)
    with pytest.raises(ImportError, match="rendering the meshes needs embreex"):
        prepare(meshes, output)
    assert list(rows_of(output)) == ["a-box"]


def test_interrupted_run_keeps_what_is_done(tmp_path, meshes, monkeypatch, dataset):
    """A break between computing and packing loses nothing: the next run packs what is there."""
    output = tmp_path / "dataset"
    with monkeypatch.context() as patch:
        patch.setattr(command.Preparation, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(meshes, output, "--limit", "1")
    (item,) = (output / "items" / "000000").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(record, "make_record", lambda *_: pytest.fail("computed again"))
        (item.parent / f".{item.stem}.partial.safetensors").touch()
        prepare(meshes, output, "--limit", "1")
    assert list(read_sections(output)) == ["a-box"] and not (output / "items").exists()
    prepare(meshes, output, "--limit", "2")
    assert list(read_sections(output)) == ["a-box", "a-torus"]


def test_damaged_leftovers_are_made_again(tmp_path, meshes, monkeypatch, dataset):
    output = tmp_path / "dataset"
    with monkeypatch.context() as patch:
        patch.setattr(command.Preparation, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare(meshes, output)
    (item,) = (output / "items" / "000000").iterdir()
    item.write_bytes(item.read_bytes()[:1000])
    prepare(meshes, output)
    assert (output / "index.parquet").read_bytes() == (dataset / "index.parquet").read_bytes()


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_shard_that_is_lost_is_made_again(tmp_path, meshes, damage, dataset):
    output = tmp_path / "dataset"
    prepare(meshes, output)
    (shard,) = (output / "shards").glob("*.bin")
    data = shard.read_bytes()
    shard.unlink()
    if damage == "cut":
        shard.write_bytes(data[:-100])
    prepare(meshes, output)
    assert shard.read_bytes() == data
    assert (output / "index.parquet").read_bytes() == (dataset / "index.parquet").read_bytes()


def test_rendering_elsewhere_gives_the_same_shards(tmp_path, meshes, dataset):
    prepare(meshes, tmp_path / "a", "--renders_only")
    assert not (tmp_path / "a" / "shards").exists()
    prepare(meshes, tmp_path / "b", "--images_dir", str(tmp_path / "a" / "renders"))
    (shard,), (other,) = ((folder / "shards").glob("*.bin") for folder in (dataset, tmp_path / "b"))
    assert shard.read_bytes() == other.read_bytes()
    azimuths = [SparseSDFDataset(folder).azimuths(0) for folder in (dataset, tmp_path / "b")]
    assert azimuths[0][:2] == azimuths[1][:2] and np.isfinite(azimuths[0]).tolist() == [True, True, False]
    names = CAMERA_COLUMNS
    rows, others = (rows_of(folder)["a-box"] for folder in (dataset, tmp_path / "b"))
    assert [rows[name] for name in names] == [others[name] for name in names]
    assert all(10 <= value <= 40 for value in rows["elevations"])
    assert all(30 <= value <= 100 for value in rows["focal_lengths"])
    # Folders of pictures that have the azimuths alone are taken, too.
    for folder in (tmp_path / "a" / "renders").iterdir():
        (folder / "cameras.csv").unlink()
        (folder / "azimuths.txt").write_text("10.5 -20.0\n")
    prepare(meshes, tmp_path / "c", "--images_dir", str(tmp_path / "a" / "renders"))
    assert rows_of(tmp_path / "c")["a-box"]["azimuths"] == [10.5, -20]
    assert np.isnan(rows_of(tmp_path / "c")["a-box"]["elevations"]).all()
    assert [row["id"] for row in read_rows(tmp_path / "b" / "failures.csv")] == ["bad"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resolutions", "64"], r"`resolutions` must be \[32, 64\], .* got \[64\]"),
        (["--seed", "1"], "`seed` must be 0, .* got 1"),
        (["--num_views", "3"], "`num_views` must be 2"),
        (["--azimuth_range", "0", "10"], "`azimuth_range` must be"),
        (["--up_axis", "z"], "`up_axis` must be"),
        (["--meshes_per_shard", "3"], "`meshes_per_shard` must be"),
    ],
)
def test_other_settings_in_a_dataset_are_refused(meshes, dataset, options, message):
    before = {path: path.stat().st_mtime_ns for path in dataset.rglob("*") if path.name != ".lock"}
    with pytest.raises(ValueError, match=message):
        prepare(meshes, dataset, *options)
    assert before == {path: path.stat().st_mtime_ns for path in dataset.rglob("*") if path.name != ".lock"}


def test_meshes_per_shard(tmp_path, meshes):
    prepare(meshes, tmp_path / "dataset", "--meshes_per_shard", "1")
    names = sorted(path.name for path in (tmp_path / "dataset" / "shards").iterdir())
    # The third mesh, which is none, would have been alone in the third shard.
    assert names == [f"{k:06d}-000000.{suffix}" for k in (0, 1) for suffix in ("bin", "parquet")]


def test_a_record_depends_on_its_mesh_alone(meshes):
    entry, threads = MeshEntry("a-box", meshes / "box.ply", image=meshes / "box.png"), torch.get_num_threads()
    try:
        hashes = set()
        for count in (1, 3):
            torch.set_num_threads(count)
            hashes.add(make_record(entry, settings()).hash)
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert len(hashes) == 1
    assert make_record(entry, settings(seed=1)).hash not in hashes


@pytest.mark.parametrize(
    ("mesh", "image", "cause"),
    [("broken.ply", None, "reading"), ("none.ply", None, "reading"), ("box.ply", "broken.ply", "pictures")],
)
def test_the_cause_of_a_failure_is_its_step(meshes, mesh, image, cause):
    entry = MeshEntry("x", meshes / mesh, image=image and meshes / image)
    with pytest.raises(PreparationError) as raised:
        make_record(entry, settings())
    assert raised.value.cause == cause


def test_given_image_is_framed_like_a_render(dataset):
    image = SparseSDFDataset(dataset).picture(0, 2)
    assert image.size == (32, 32)
    left, top, right, bottom = image.getchannel("A").point(lambda alpha: 255 * (alpha > 127)).getbbox()
    assert max(left, top, 32 - right, 32 - bottom) <= 2
    red, green, blue, _ = image.getpixel((16, 16))
    assert red > 240 and max(green, blue) < 15


def test_up_axis_of_a_source(tmp_path, meshes):
    prepare(meshes, tmp_path / "dataset", "--limit", "1", "--up_axis", "rings=x", "boxes=z")
    coords = read_sections(tmp_path / "dataset")["a-box"]["sdf_64"]["coords"].int()
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
    def cameras(folder, *options):
        prepare(meshes, tmp_path / folder, "--renders_only", *options)
        return [(tmp_path / folder / "renders" / name / "cameras.csv").read_text() for name in ("a-box", "a-torus")]

    first, again, other = cameras("a"), cameras("b"), cameras("c", "--seed", "1")
    assert first == again
    assert len({*first, *other}) == 4
    with Image.open(tmp_path / "a" / "renders" / "a-box" / "0.webp") as image:
        pixels = np.asarray(image)
    with Image.open(tmp_path / "c" / "renders" / "a-box" / "0.webp") as image:
        assert not np.array_equal(pixels, np.asarray(image))


def test_leftovers_of_a_killed_render_are_not_taken(tmp_path, meshes, dataset):
    """Pictures appear together; what a killed process has left is none of them, and other views are refused."""
    partial = tmp_path / "a" / "renders" / "a-box.partial"
    partial.mkdir(parents=True)
    for number in range(5):
        (partial / f"{number}.webp").write_bytes(b"half a picture")
    prepare(meshes, tmp_path / "a", "--renders_only", "--limit", "1")
    names = sorted(path.name for path in (tmp_path / "a" / "renders" / "a-box").iterdir())
    assert names == ["0.webp", "1.webp", "2.webp", "cameras.csv"] and not partial.exists()
    with pytest.raises(ValueError, match="`num_views` must be 2"):
        prepare(meshes, tmp_path / "a", "--renders_only", "--num_views", "1")


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


def test_odd_entries_stop_nothing(tmp_path):
    """Long ids, short rows, a byte order mark, ids that are there twice: what is wrong is told, the rest is made."""
    meshes = tmp_path / "meshes"
    deep = meshes / "/".join(["folder"] * 30)
    deep.mkdir(parents=True)
    trimesh.creation.box().export(deep / "box.ply")
    long = "x" * 300
    rows = [
        ["source", "id", "mesh", "license"],
        ["", long, str(deep / "box.ply"), "CC0-1.0"],
        ["", "short"],
        ["", "twice", str(deep / "box.ply")],
        ["", "twice", str(deep / "box.ply")],
        ["", "../up", str(deep / "box.ply")],
        ["", "wide", str(deep / "box.ply"), "", "more", "columns"],
    ]
    with (meshes / "index.csv").open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows(rows)
    prepare(meshes, tmp_path / "dataset")
    assert list(rows_of(tmp_path / "dataset")) == [long, "twice", "wide"]
    failures = {row["id"]: (row["cause"], row["reason"]) for row in read_rows(tmp_path / "dataset" / "failures.csv")}
    assert failures == {
        "short": ("row", "its row has no mesh"),
        "twice": ("row", "its id is not unique, a row before has it"),
        "../up": ("row", "its id must be a name without slashes, got '../up'"),
    }


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
    # Two files of one name are told apart by their suffixes.
    trimesh.creation.box().export(tmp_path / "chairs" / "one.ply")
    assert [entry.id for entry in read_index(tmp_path, {}, [], 0.0)] == [
        "chairs-one.ply",
        "chairs-one.stl",
        "tables-one",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,file\nx,x.ply\n", "lacks the columns"),
        ("id,mesh\nx,x.ply\nx,y.ply\n", "not unique"),
        ("id,mesh\n", "holds no mesh"),
        ("", "lacks the columns"),
    ],
)
def test_bad_index(tmp_path, text, message):
    (tmp_path / "index.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_index(tmp_path, {}, [], 0.0)


def test_folder_without_meshes(tmp_path):
    with pytest.raises(ValueError, match=r"`input` .*nowhere' does not exist"):
        read_index(tmp_path / "nowhere", {}, [], 0.0)
    with pytest.raises(ValueError, match="holds no mesh"):
        read_index(tmp_path, {}, [], 0.0)


def test_a_device_that_is_not_here_is_refused_before_any_work(meshes, tmp_path):
    with pytest.raises(ValueError, match="`--device` must be a device that PyTorch can use here, got 'meta'"):
        prepare(meshes, tmp_path / "output", "--device", "meta")
    assert not (tmp_path / "output").exists()
