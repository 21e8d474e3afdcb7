"""Meshes of a fine-tuning as its pipeline wants them: as they stand, or as shapes that face their cameras exactly."""

from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image

from diffusers_sparse3d import DenseDiT
from diffusers_sparse3d.training import lora
from diffusers_sparse3d.training.dataset import SparseSDFDataset
from diffusers_sparse3d.training.lora_data import TURNED_SHAPES, prepare_meshes, shapes_per_mesh
from diffusers_sparse3d.training.lora_options import parse_arguments
from diffusers_sparse3d.training.preparation.report import read_rows


def parse(folder: Path, *options: str):
    required = ["--pretrained_model_name_or_path", str(folder / "pipeline"), "--output_dir", str(folder / "out")]
    required += ["--instance_data_dir", str(folder / "meshes"), "--num_views", "2", "--preparation_workers", "0"]
    return parse_arguments([*required, *options])


@pytest.fixture
def meshes(tmp_path: Path) -> Path:
    (tmp_path / "meshes").mkdir()
    trimesh.creation.box((2, 1, 0.5)).export(tmp_path / "meshes" / "plank.ply")
    trimesh.creation.box((1, 2, 1)).export(tmp_path / "meshes" / "post.ply")
    return tmp_path


def test_shapes_face_the_cameras_of_their_pictures(meshes):
    """All pictures are from the front, of shapes that stand otherwise than in their file."""
    args = parse(meshes, "--num_validation_meshes", "1", "--shapes_per_mesh", "3")
    data = SparseSDFDataset(prepare_meshes(args, [32], 28), "train")
    assert list(data.ids) in (["plank~0", "plank~1", "plank~2"], ["post~0", "post~1", "post~2"])
    assert all(azimuth == 0 for index in range(len(data)) for azimuth in data.azimuths(index))
    extents = [np.ptp(data.blocks(index, 32).band()[0].numpy(), axis=0) for index in range(len(data))]
    # As it stands, a box has one extent alone.
    assert len({tuple(extent) for extent in extents}) > 1


def test_a_pixel_aligned_pipeline_gets_them_by_default(meshes, monkeypatch):
    found = {}
    monkeypatch.setattr(lora, "prepare_meshes", lambda *args, exact: found.update(exact=exact) or 1 / 0)
    monkeypatch.setattr(lora, "pipeline_resolutions", lambda *args: [32])
    monkeypatch.setattr(lora.AutoConfig, "from_pretrained", lambda folder: type("Config", (), {"image_size": 28}))
    sizes = {"sample_size": 2, "in_channels": 4, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}
    for aligned in (True, False):
        model = DenseDiT(**sizes, cross_attention_dim=32, pixel_aligned=aligned)
        model.save_pretrained(meshes / "pipeline" / "dense_transformer")
        with pytest.raises(ZeroDivisionError):
            lora.prepare_data(parse(meshes), meshes / "pipeline")
        assert found["exact"] is aligned


def test_pictures_of_the_meshes_show_them_as_they_stand(meshes):
    assert shapes_per_mesh(parse(meshes), exact=True, pictures=False) == TURNED_SHAPES
    assert shapes_per_mesh(parse(meshes), exact=False, pictures=False) == 0
    assert shapes_per_mesh(parse(meshes), exact=True, pictures=True) == 0
    assert shapes_per_mesh(parse(meshes, "--shapes_per_mesh", "2"), exact=False, pictures=False) == 2
    for number, pictures in (("2", True), ("-1", False)):
        with pytest.raises(ValueError, match="`shapes_per_mesh` must be at least 0"):
            shapes_per_mesh(parse(meshes, "--shapes_per_mesh", number), exact=True, pictures=pictures)


def test_prepared_data_of_other_options_are_not_taken_for_these(meshes):
    """Another axis is another dataset; pictures that were not there before are told."""
    output = prepare_meshes(parse(meshes, "--up_axis", "z"), [32], 28)
    extents = np.ptp(SparseSDFDataset(output).blocks(1, 32).band()[0].numpy(), axis=0)
    # A post along y lies in a file whose z points up.
    assert SparseSDFDataset(output).ids[1] == "post" and extents.argmax() == 2
    with pytest.raises(ValueError, match=r"`up_axis` must be \['=z'\], with which the dataset .* got \[\]"):
        prepare_meshes(parse(meshes), [32], 28)
    (meshes / "pictures").mkdir()
    photo = Image.new("RGB", (60, 80), "white")
    photo.paste("blue", (20, 10, 40, 70))
    photo.save(meshes / "pictures" / "post.png")
    pictures = ["--instance_images_dir", str(meshes / "pictures"), "--up_axis", "z"]
    prepare_meshes(parse(meshes, *pictures), [32], 28)
    (failure,) = read_rows(output / "failures.csv")
    assert (failure["id"], failure["cause"]) == ("post", "changed")
    assert failure["reason"].startswith("num_given is 1, not 0; what is prepared stays as it was")


def test_pictures_that_an_index_names_are_kept(meshes):
    """Turned shapes would leave them out, and with them all that there is without renders."""
    photo = Image.new("RGB", (60, 80), "white")
    photo.paste("blue", (20, 10, 40, 70))
    photo.save(meshes / "meshes" / "post.png")
    index = meshes / "meshes" / "index.csv"
    index.write_text("id,mesh,image\npost,post.ply,post.png\n")
    args = parse(meshes, "--instance_data_dir", str(index), "--num_views", "0", "--num_validation_meshes", "0")
    data = SparseSDFDataset(prepare_meshes(args, [32], 28, exact=True), "train")
    assert list(data.ids) == ["post"] and data.num_images.tolist() == [1]
