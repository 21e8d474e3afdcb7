"""Hugging Face `datasets` shows a folder of shards: pictures, licences, splits and sizes."""

import pytest

from diffusers_sparse3d.data.hub import card_header
from tests.data.shapes import SHAPES, write_dataset


datasets = pytest.importorskip("datasets")


def test_load_dataset(tmp_path):
    folder = tmp_path / "shapes"
    write_dataset(folder)
    (folder / "README.md").write_text(card_header() + "# Shapes\n")
    loaded = datasets.load_dataset(str(folder), split="meshes", cache_dir=str(tmp_path / "cache"))
    assert loaded["id"][:] == list(SHAPES)
    assert loaded["split"][:] == ["train", "val", "train"] and set(loaded["license"]) == {"CC0-1.0"}
    assert min(loaded["tokens_16"]) > 0 and min(loaded["voxels_32"]) > max(loaded["tokens_32"])
    assert loaded["azimuths"][2] == [-90.0, 12.5]
    picture = loaded[0]["picture"]
    assert picture.size == (8, 8) and picture.getpixel((0, 0)) == (0, 9, 7, 255)
    assert isinstance(loaded.features["picture"], datasets.Image)
